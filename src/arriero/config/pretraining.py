"""Pre-training: the corpus and what differs from fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.model import ModelOptions
from arriero.config.optimization import SCHEDULES, OptimizationOptions
from arriero.config.option import REQUIRED, OptionGroup, option
from arriero.errors import ConfigError

TINY_MODEL = "__internal_testing__/tiny-random-llama"


@dataclass(kw_only=True)
class PretrainModelOptions(ModelOptions):
    """Model."""

    model_name_or_path: str = option(
        TINY_MODEL, "folder, named model or Hub id: its configuration, and with --continue_training its weights"
    )
    model_type: str = option("llama", "the architecture", ("llama",))
    config_name: str | None = option(None, "a configuration from elsewhere (default: that of --model_name_or_path)")
    continue_training: bool = option(False, "start from the weights of --model_name_or_path instead of random ones")


@dataclass(kw_only=True)
class PretrainOptimizationOptions(OptimizationOptions):
    """Optimization."""

    min_learning_rate: float = option(
        1e-5, "the learning rate never falls below this after warm-up", aliases=("lr_end",), minimum=0.0
    )
    lr_scheduler_type: str = option(
        "cosine", "shape of the learning rate after warm-up", (*SCHEDULES, "wsd", "inverse_sqrt")
    )
    optim: str = option("adamw", "the optimizer", ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "muon"))


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
    share_folder: bool = option(False, "the nodes see one file system: only one process of all builds the indexes")
    reset_attention_mask: bool = option(False, "tokens do not attend across document boundaries")
    best_fit_packing: bool = option(False, "fill samples with whole documents where they fit")
    dataloader_num_workers: int = option(0, "processes that prepare batches; 0: the main process", minimum=0)
    skip_data_intervals: list[str] = option([], "ranges of steps whose data is left out, e.g. 100-120")
    sample_prompts: str | None = option(None, "file of prompts that are continued at every evaluation")
    torch_compile: bool = option(False, "compile each layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.split_parts()

    def split_parts(self) -> tuple[float, float, float]:
        """The shares of training, validation and test, summing to 1 (missing ones are 0)."""
        words = self.split.replace("/", ",").split(",")
        try:
            parts = [float(word) for word in words if word.strip()]
        except ValueError:
            parts = []
        if not 1 <= len(parts) <= 3 or not all(0 <= part < float("inf") for part in parts) or sum(parts) <= 0:
            raise ConfigError(f"--split is {self.split!r}: give one to three numbers, e.g. 949,50,1")
        parts += [0.0] * (3 - len(parts))
        return parts[0] / sum(parts), parts[1] / sum(parts), parts[2] / sum(parts)
