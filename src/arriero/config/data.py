"""Fine-tuning and evaluation data."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError


@dataclass(kw_only=True)
class DataOptions(OptionGroup):
    """Data."""

    task_name: str | None = option(
        None,
        "how rows become prompt and answer: squad (question generation, as the seed), squad_qa (question answering)",
    )
    data_name: str | None = option(None, "a data set by its Hub id; --task_name must be given too")
    dataset_path: str | None = option(
        None,
        "your own data: a file (.json, .jsonl), or a folder with train.json and dev.json (jsonl rows or SQuAD format)",
    )
    src_length: int = option(512, "longest prompt in tokens; a longer one loses the end of its context", minimum=1)
    tgt_length: int = option(256, "longest answer in tokens", minimum=1)
    max_seq_length: int | None = option(
        None, "longest prompt + answer in tokens (default: src_length + tgt_length)", minimum=2
    )
    share_prefixes: bool = option(
        True,
        "put rows that begin alike (questions on one passage) into one batch and compute their common part once; "
        "the loss is the same, the order is shuffled by passage",
    )
    eval_with_do_generation: bool = option(
        False, "evaluate by generating answers and scoring them, instead of by loss and token accuracy"
    )
    max_train_samples: int | None = option(None, "use only the first N training rows", minimum=1)
    max_eval_samples: int | None = option(None, "use only the first N evaluation rows", minimum=1)
    dataloader_num_workers: int = option(0, "processes that prepare batches; 0: the main process", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_name is not None and self.task_name is None:
            raise ConfigError(
                f"--data_name {self.data_name} needs --task_name, which says how its rows become prompts and answers"
            )
        if self.data_name is not None and self.dataset_path is not None:
            raise ConfigError("--data_name and --dataset_path both name the data: give one of them")
        if (
            self.max_seq_length is not None
            and self.max_seq_length <= self.tgt_length
            and self.max_seq_length < (self.src_length + self.tgt_length)
        ):
            raise ConfigError(
                f"--max_seq_length {self.max_seq_length} leaves no room for a prompt beside "
                f"--tgt_length {self.tgt_length}: raise the first or lower the second"
            )

    @property
    def sequence_length(self) -> int:
        """The longest row in tokens, prompt and answer together."""
        both = self.src_length + self.tgt_length
        return both if self.max_seq_length is None else min(both, self.max_seq_length)
