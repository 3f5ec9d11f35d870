"""Fine-tuning and evaluation data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arriero.config.option import OptionGroup, option
from arriero.config.row_lengths import RowLengths
from arriero.errors import ConfigError

USUAL_PROMPT, USUAL_ANSWER = 512, 256  # tokens at most
DATA_FORMATS = ("auto", "messages", "sharegpt", "context", "instruction", "alpaca", "src", "prompt", "text")


@dataclass(frozen=True)
class DataPart:
    """A file or folder of a data set, and its share of the training rows.

    Attributes:
        weight: in proportion to the other parts' weights; None where every row is visited once an epoch.
    """

    path: str
    weight: float | None = None


def dataset_parts(dataset_path: str, weights: Sequence[float] | None = None) -> list[DataPart]:
    """The parts that `--dataset_path` names: `PATH`, `PATH,PATH` or `PATH:WEIGHT,PATH:WEIGHT`.

    Args:
        weights: those of `--dataset_weights`, one for each path.

    Raises:
        ConfigError: weights that are no positive numbers, that are missing for some or given twice; a path named twice.
    """
    items = [dataset_path] if Path(dataset_path).exists() else [item.strip() for item in dataset_path.split(",")]
    parts = [_part(item) for item in items if item]
    if not parts:
        raise ConfigError("--dataset_path names no file")
    if len({part.path for part in parts}) < len(parts):
        raise ConfigError(f"--dataset_path {dataset_path} names a file twice: give it once, with a larger weight")
    given = [part.weight for part in parts if part.weight is not None]
    if weights is not None:
        if given:
            raise ConfigError("--dataset_weights and the weights in --dataset_path say the same: give one of them")
        if len(weights) != len(parts):
            raise ConfigError(
                f"--dataset_weights has {len(weights)} numbers and --dataset_path names {len(parts)}: give one for each"
            )
        parts = [DataPart(part.path, weight) for part, weight in zip(parts, weights, strict=True)]
        given = list(weights)
    elif given and len(given) < len(parts):
        unweighted = next(part.path for part in parts if part.weight is None)
        raise ConfigError(f"--dataset_path: {unweighted} has no weight and others have: give all of them one, or none")
    if any(not math.isfinite(weight) or weight <= 0 for weight in given):
        raise ConfigError(f"a weight of a mixture must be a number above 0, found {', '.join(f'{w:g}' for w in given)}")
    return parts


def _part(item: str) -> DataPart:
    path, colon, weight = item.rpartition(":")
    if not colon or Path(item).exists():
        return DataPart(item)
    try:
        return DataPart(path, float(weight))
    except ValueError:
        return DataPart(item)


TASK_HELP = (
    "how rows become prompt and answer: squad (question generation, as in PaddleNLP), squad_qa (question answering); none: as "
    "their keys say"
)
FORMAT_HELP = (
    "what rows are; auto: by their keys. alpaca: instruction rows as turns of a chat, or in Alpaca's words where the model has "
    "no chat template"
)


def task_of(name: str | None) -> str | None:
    """A task by its name; none is there to take back what a file of options says."""
    return None if name is None or name.strip().lower() == "none" else name


def check_row_kind(task_name: str | None, data_format: str) -> None:
    """
    Raises:
        ConfigError: the two contradict each other.
    """
    if task_name == "squad_qa" and data_format != "auto":
        raise ConfigError(
            f"--task_name squad_qa and --data_format {data_format} both say what rows are: drop the second"
        )


@dataclass(kw_only=True)
class RowOptions(OptionGroup):
    """Data."""

    task_name: str | None = option(None, TASK_HELP)
    data_name: str | None = option(None, "a data set by its Hub id; --task_name must be given too")
    dataset_path: str | None = option(
        None,
        "your own data: a file (.json, .jsonl, .csv, .tsv, .parquet), or a folder with train.json and dev.json (or so); "
        "several with commas between them are mixed, PATH:WEIGHT,PATH:WEIGHT in these shares",
    )
    data_format: str = option("auto", FORMAT_HELP, DATA_FORMATS)
    train_on: str = option(
        "all_assistant",
        "what of a conversation is learned: all_assistant: every turn of the assistant; last: its last one",
        ("all_assistant", "last"),
    )
    src_length: int | None = option(
        None, "longest prompt in tokens; a longer one loses the end of its context (default: 512)", minimum=1
    )
    tgt_length: int | None = option(None, "longest answer in tokens (default: 256)", minimum=1)
    eval_with_do_generation: bool = option(
        False, "evaluate by generating answers and scoring them, instead of by loss and token accuracy"
    )
    max_eval_samples: int | None = option(None, "use only the first N evaluation rows (of each file)", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.task_name = task_of(self.task_name)
        if self.data_name is not None and self.task_name is None and self.data_format == "auto":
            raise ConfigError(
                f"--data_name {self.data_name} needs --task_name (or --data_format), which says how its rows become prompts "
                "and answers"
            )
        if self.data_name is not None and self.dataset_path is not None:
            raise ConfigError("--data_name and --dataset_path both name the data: give one of them")
        check_row_kind(self.task_name, self.data_format)
        if self.dataset_path is not None:
            dataset_parts(self.dataset_path)


@dataclass(kw_only=True)
class DataOptions(RowOptions):
    """Data."""

    dataset_weights: list[float] | None = option(
        None, "share of the training rows that each file of --dataset_path gives, in proportion", above=0.0
    )
    max_seq_length: int | None = option(
        None,
        "longest prompt + answer in tokens (default: src_length + tgt_length); each may have what the other leaves, as far as "
        "these two are not given; where both are too long the answer has a third",
        minimum=2,
    )
    share_prefixes: bool = option(
        True,
        "put rows that begin alike (questions on one passage) into one batch and compute their common part once; "
        "the loss is the same, the order is shuffled by passage",
    )
    packing: bool = option(
        True,
        "rows of a micro-batch end to end, each its own document; no: as a matrix, padded to the longest of them "
        "(the loss is the same)",
    )
    group_by_length: bool = option(
        False, "rows of like length into one step, for less padding with --packing no (transformers' way of shuffling)"
    )
    max_tokens_per_batch: int | None = option(
        None,
        "fill micro-batches with up to N tokens by best fit, however many rows these are; the rows of a step stay those of "
        "--per_device_train_batch_size and --gradient_accumulation_steps",
        minimum=1,
    )
    val_size: float | None = option(
        None,
        "hold out this share of the training rows (below 1), or so many of each file, as the evaluation rows; a dev file is "
        "not read then; 0: none",
        aliases=("val_set_size",),
        minimum=0.0,
    )
    max_train_samples: int | None = option(None, "use only the first N training rows (of each file)", minimum=1)
    dataloader_num_workers: int = option(0, "taken and without effect: batches are made in the main process", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_path is not None:
            dataset_parts(self.dataset_path, self.dataset_weights)
        elif self.dataset_weights is not None:
            raise ConfigError("--dataset_weights needs --dataset_path with as many files")
        self.val_size = self.val_size or None
        if self.val_size is not None and self.val_size >= 1 and not self.val_size.is_integer():
            raise ConfigError(f"--val_size {self.val_size:g} is neither a share below 1 nor a whole number of rows")
        if self.max_tokens_per_batch is not None and not self.packing:
            raise ConfigError(
                "--max_tokens_per_batch fills micro-batches with packed rows and --packing no pads them: drop one of them"
            )
        if self.max_seq_length is not None and (self.tgt_length or 0) >= self.max_seq_length:
            raise ConfigError(
                f"--max_seq_length {self.max_seq_length} leaves no room for a prompt beside "
                f"--tgt_length {self.tgt_length}: raise the first or lower the second"
            )

    @property
    def lengths(self) -> RowLengths:
        """What a row has room for; what is not told may be as long as `max_seq_length`, which holds for both."""
        prompt, answer = (USUAL_PROMPT, USUAL_ANSWER) if self.max_seq_length is None else [self.max_seq_length] * 2
        return RowLengths(self.src_length or prompt, self.tgt_length or answer, self.max_seq_length)

    @property
    def sequence_length(self) -> int:
        """The longest row in tokens, prompt and answer together."""
        return self.lengths.row


@dataclass(kw_only=True)
class PreviewOptions(OptionGroup):
    """Preview."""

    preview: int | None = option(
        None, "show N training rows as the model sees them, what is learned marked, and stop there", minimum=1
    )
    preview_color: str = option(
        "auto",
        "mark what is learned by colour; auto: on a terminal, else [[learned]]",
        ("auto", "always", "never"),
        only_with="preview",
    )
