"""What `plan` is asked: the options of a pre-training run, none of them required, and those of the question itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from arriero.config.checkpoint import CheckpointOptions
from arriero.config.data import DataOptions
from arriero.config.option import OptionGroup, option
from arriero.config.pretraining import CorpusOptions, PretrainModelOptions, PretrainOptimizationOptions
from arriero.errors import ConfigError

DEFAULT_LENGTH = 2048


@dataclass(kw_only=True)
class PlanOptions(OptionGroup):
    """Planning."""

    memory: str | None = option(None, "memory of one device, e.g. 80GB or 24GiB (default: what this machine has)")
    gpu: str | None = option(None, "plan for this kind of GPU, e.g. H100: its memory and peak from the data sheet")
    num_devices: int = option(
        1,
        "devices of the run, one process each; how they share the work is said as in pretrain: --sharding, degrees",
        aliases=("world_size",),
        minimum=1,
    )
    search: bool = option(
        False,
        "list the fastest layouts of --num_devices that fit, for as many rows a step as without degrees; it chooses every "
        "degree itself, and takes none",
    )
    dry_run: bool = option(False, "build the real program of some of the ranks and print the shapes that they hold")
    bandwidth_in_node: float | None = option(
        None,
        "GB/s that a device sends to others of its node, of 8 (default: 80 % of the data sheet of --gpu)",
        above=0.0,
    )
    bandwidth_between_nodes: float | None = option(
        None, "GB/s that a device sends to other nodes (default: 80 % of the usual network with --gpu)", above=0.0
    )
    num_tokens: float | None = option(None, "tokens of the whole run, for its time, e.g. 2e9", above=0.0)
    flops: float | None = option(
        None, "floating-point operations a second of one device (default: of --gpu, or measured here)", above=0.0
    )
    mfu: float | None = option(
        None,
        "share of those FLOP/s that is reached, recomputation counted too (default: 0.4 on a GPU, 0.7 on a CPU; of several "
        "GPUs while they compute, 0.53)",
        above=0.0,
        maximum=1.0,
    )
    json: bool = option(False, "print one JSON object in place of the tables")
    output_file: str | None = option(None, "write that JSON object into this file too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu is not None and not self.gpu.strip():
            raise ConfigError("--gpu is empty: name a GPU, e.g. --gpu H100")
        given = [name for name in ("bandwidth_in_node", "bandwidth_between_nodes") if getattr(self, name) is not None]
        if len(given) == 1 and self.gpu is None:
            raise ConfigError(
                f"--{given[0]} alone: without --gpu both bandwidths are needed, in a node and between nodes"
            )
        if self.search and self.num_devices == 1:
            raise ConfigError("--search looks for layouts of several devices: give --num_devices")
        if self.search and self.dry_run:
            raise ConfigError("--search and --dry_run: take a layout from the first, then build it with the second")


@dataclass(kw_only=True)
class PlanModelOptions(PretrainModelOptions):
    """Model."""

    model_name_or_path: str = option(
        "facebook/llama-7b",
        "folder with a config.json, named model or Hub id; of that, only config.json is fetched",
        aliases=("model",),
        alone=True,
    )


@dataclass(kw_only=True)
class PlanCorpusOptions(CorpusOptions):
    """Corpus."""

    TAKES_FILES_OF_TRAINING: ClassVar[bool] = True

    input_dir: list[str] = option([], "as in pretrain; the corpus is not looked at", split=False)
    max_seq_length: int = option(
        0, "tokens of one sample; 0: 2048, or of finetune src_length + tgt_length where one of them is given", minimum=0
    )
    src_length: int | None = option(None, "of finetune: longest prompt in tokens", minimum=1)
    tgt_length: int | None = option(None, "of finetune: longest answer in tokens", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.src_length is None and self.tgt_length is None:
            self.max_seq_length = self.max_seq_length or DEFAULT_LENGTH
            return
        rows = DataOptions(
            max_seq_length=self.max_seq_length or None, src_length=self.src_length, tgt_length=self.tgt_length
        )
        self.max_seq_length = rows.sequence_length


@dataclass(kw_only=True)
class PlanOptimizationOptions(PretrainOptimizationOptions):
    """Optimization."""

    per_device_train_batch_size: int = option(1, "rows of one micro-batch on each device", minimum=1)


@dataclass(kw_only=True)
class PlanCheckpointOptions(CheckpointOptions):
    """Checkpoints and evaluation."""

    output_dir: str = option("runs/planned", "as in pretrain; nothing is written there")
