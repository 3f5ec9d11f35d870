"""Pre-training: the corpus and what differs from fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.model import ModelOptions
from arriero.config.optimization import SCHEDULES, OptimizationOptions
from arriero.config.option import REQUIRED, OptionGroup, option
from arriero.config.values import step_range
from arriero.errors import ConfigError

MAX_SKIPPED = 1_000_000
TINY_MODEL = "__internal_testing__/tiny-random-llama"


@dataclass(kw_only=True)
class PretrainModelOptions(ModelOptions):
    """Model."""

    model_name_or_path: str = option(
        TINY_MODEL,
        "folder, named model or Hub id: its configuration, and with --continue_training its weights",
        aliases=("model",),
        alone=True,
    )
    model_type: str = option("llama", "PaddleNLP's word for the one architecture there is", ("llama",))
    config_name: str | None = option(
        None, "a model's shape from elsewhere: a folder, config.json or name (default: that of --model_name_or_path)"
    )
    continue_training: bool = option(False, "start from the weights of --model_name_or_path instead of random ones")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.continue_training and self.config_name is not None:
            raise ConfigError(
                "--continue_training takes the shape of --model_name_or_path: drop --config_name, or train from scratch"
            )


@dataclass(kw_only=True)
class PretrainOptimizationOptions(OptimizationOptions):
    """Optimization."""

    learning_rate: float = option(5e-5, "peak learning rate", minimum=0.0)
    min_learning_rate: float = option(
        1e-5, "the learning rate never falls below this after warm-up", aliases=("lr_end",), minimum=0.0
    )
    lr_scheduler_type: str = option(
        "cosine",
        "shape of the learning rate after warm-up; wsd: constant, then a decay at the end",
        (*SCHEDULES, "warmup_stable_decay"),
    )


@dataclass(kw_only=True)
class CorpusOptions(OptionGroup):
    """Corpus."""

    input_dir: list[str] = option(
        REQUIRED, "folder or prefix of a token corpus, or several with weights: 0.7 a 0.3 b", split=False
    )
    split: str = option("949,50,1", "parts of the documents for training, validation and test")
    max_seq_length: int = option(1024, "tokens of one sample", minimum=2)
    data_impl: str = option("auto", "format of the corpus: npy/npz pair or Megatron's bin/idx", ("auto", "npy", "mmap"))
    data_cache: str | None = option(None, "folder of the sample indexes (default: beside the corpus)")
    share_folder: bool = option(
        False,
        "PaddleNLP's word for nodes with one file system; taken and without effect: a lock in the cache serves shared and "
        "separate ones",
    )
    reset_attention_mask: bool = option(False, "tokens do not attend across document boundaries")
    best_fit_packing: bool = option(False, "fill samples with whole documents where they fit")
    dataloader_num_workers: int = option(0, "taken and without effect: batches are made in the main process", minimum=0)
    document_order: str = option(
        "file",
        "file: documents follow one another as in the file and samples are shuffled, as in PaddleNLP; shuffled: both are",
        ("file", "shuffled"),
    )
    eval_iters: int = option(
        10, "batches of the validation part that an evaluation takes, always the same; 0: all of it", minimum=0
    )
    do_predict: bool | None = option(
        None, "score the test part at the end (default: with --do_eval, if --split leaves it documents)"
    )
    test_iters: int = option(100, "batches of the test part that are scored at the end; 0: all of it", minimum=0)
    skip_data_intervals: list[str] = option([], "ranges of steps whose data is left out, e.g. 100-120")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.split_parts()
        self.skipped_steps()

    def skipped_steps(self) -> frozenset[int]:
        """The steps of `skip_data_intervals`, counted from 0 (the option counts from 1, both ends included)."""
        steps: set[int] = set()
        for interval in self.skip_data_intervals:
            found = step_range(interval)
            if found is None or found[1] - found[0] > MAX_SKIPPED:
                raise ConfigError(
                    f"--skip_data_intervals has {interval!r}: give ranges of at most {MAX_SKIPPED:,} steps counted from 1, "
                    "e.g. 100-120"
                )
            steps.update(range(found[0] - 1, found[1]))
        return frozenset(steps)

    def split_parts(self) -> tuple[float, float, float]:
        """The shares of training, validation and test as they are written; missing ones are 0."""
        words = self.split.replace("/", ",").split(",")
        try:
            parts = [float(word) for word in words if word.strip()]
        except ValueError:
            parts = []
        if not 1 <= len(parts) <= 3 or not all(0 <= part < float("inf") for part in parts) or sum(parts) <= 0:
            raise ConfigError(f"--split is {self.split!r}: give one to three numbers, e.g. 949,50,1")
        parts += [0.0] * (3 - len(parts))
        return parts[0], parts[1], parts[2]
