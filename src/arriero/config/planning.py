"""What `plan` is asked: the options of a pre-training run, none of them required, and those of the question itself."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.checkpoint import CheckpointOptions
from arriero.config.option import OptionGroup, option
from arriero.config.pretraining import CorpusOptions, PretrainModelOptions, PretrainOptimizationOptions
from arriero.errors import ConfigError


@dataclass(kw_only=True)
class PlanOptions(OptionGroup):
    """Planning."""

    memory: str | None = option(None, "memory of one device, e.g. 80GB or 24GiB (default: what this machine has)")
    gpu: str | None = option(None, "plan for this kind of GPU, e.g. H100: its memory and peak from the data sheet")
    num_devices: int = option(
        1,
        "devices of the run; more than one holds a copy of the model each, or shares it out as --sharding says",
        minimum=1,
    )
    num_tokens: float | None = option(None, "tokens of the whole run, for its time, e.g. 2e9", above=0.0)
    flops: float | None = option(
        None, "floating-point operations a second of one device (default: of --gpu, or measured here)", above=0.0
    )
    mfu: float | None = option(
        None,
        "share of those FLOP/s that training reaches, recomputation counted too (default: 0.4 on a GPU, 0.7 on a CPU)",
        above=0.0,
        maximum=1.0,
    )
    json: bool = option(False, "print one JSON object in place of the tables")
    output_file: str | None = option(None, "write that JSON object into this file too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu is not None and not self.gpu.strip():
            raise ConfigError("--gpu is empty: name a GPU, e.g. --gpu H100")


@dataclass(kw_only=True)
class PlanModelOptions(PretrainModelOptions):
    """Model."""

    model_name_or_path: str = option(
        "facebook/llama-7b", "folder with a config.json, named model or Hub id; of that, only config.json is fetched"
    )


@dataclass(kw_only=True)
class PlanCorpusOptions(CorpusOptions):
    """Corpus."""

    input_dir: list[str] = option([], "as in pretrain; the corpus is not looked at", split=False)
    max_seq_length: int = option(2048, "tokens of one sample", minimum=1)


@dataclass(kw_only=True)
class PlanOptimizationOptions(PretrainOptimizationOptions):
    """Optimization."""

    per_device_train_batch_size: int = option(1, "rows of one micro-batch on each device", minimum=1)


@dataclass(kw_only=True)
class PlanCheckpointOptions(CheckpointOptions):
    """Checkpoints and evaluation."""

    output_dir: str = option("runs/planned", "as in pretrain; nothing is written there")
