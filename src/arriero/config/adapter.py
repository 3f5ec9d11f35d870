"""Small trained parts beside a frozen model: LoRA and prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(kw_only=True)
class AdapterPathOptions(OptionGroup):
    """Adapter."""

    lora_path: str | None = option(
        None, "folder of a LoRA adapter in PEFT's format to load (in training: to go on with)"
    )
    prefix_path: str | None = option(
        None, "folder of a trained prefix in PEFT's format to load (in training: to go on with)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_path is not None and self.prefix_path is not None:
            raise ConfigError("--lora_path and --prefix_path both name an adapter: give one of them")

    def check_one(self) -> None:
        """Refuse several LoRA adapters, which only `merge` adds up.

        Raises:
            ConfigError: naming the way out.
        """
        path = self.lora_path
        if path is not None and "," in path and not Path(path).expanduser().exists():
            raise ConfigError(
                f"--lora_path {path}: one adapter here; `arriero merge --lora_path {path} ...` joins them"
            )


@dataclass(kw_only=True)
class AdapterOptions(AdapterPathOptions):
    """Adapter training."""

    lora: bool = option(False, "train low-rank additions (LoRA) and leave the model's own weights alone")
    lora_rank: int = option(8, "rank of the additions", aliases=("lora_r",), minimum=1, only_with="lora")
    lora_alpha: float | None = option(
        None,
        "strength of the additions: they are scaled by alpha / rank (default: 2 x rank, or that of --lora_path)",
        above=0.0,
        only_with="lora",
    )
    lora_dropout: float = option(0.0, "dropout on the input of the additions", minimum=0.0, below=1.0, only_with="lora")
    lora_target_modules: list[str] = option(
        list(LINEAR_LAYERS),
        "linear layers that get one, by the last part of their name, or all-linear",
        only_with="lora",
    )
    lora_bias: str = option("none", "which biases are trained too", ("none", "all", "lora_only"), only_with="lora")
    lora_rslora: bool = option(
        False,
        "scale by alpha / sqrt(rank), for large ranks (rsLoRA)",
        aliases=("use_rslora", "rslora"),
        only_with="lora",
    )
    lora_dora: bool = option(
        False,
        "train the length of each row of the weights beside the additions (DoRA)",
        aliases=("use_dora",),
        only_with="lora",
    )
    lora_plus_scale: float = option(
        1.0,
        "learning rate of every B matrix over that of A (LoRA+)",
        aliases=("loraplus_lr_ratio",),
        above=0.0,
        only_with="lora",
    )
    lora_init: str = option(
        "default",
        "how the additions start: as zero, or from the greatest singular values of the weights (pissa)",
        ("default", "pissa"),
        aliases=("init_lora_weights",),
        only_with="lora",
    )
    pissa: bool = option(False, "the same as --lora_init pissa", only_with="lora")
    merge_weights: bool = option(
        False, "after training also write the model with the additions merged into its weights", only_with="lora"
    )
    prefix_tuning: bool = option(False, "train keys and values put before each layer's own (prefix tuning)")
    num_prefix_tokens: int = option(10, "length of the prefix", minimum=1, only_with="prefix_tuning")
    prefix_projection: bool = option(
        False, "make the prefix by a small network, which only training needs", only_with="prefix_tuning"
    )
    prefix_projection_hidden_size: int | None = option(
        None, "width of that network (default: the model's hidden size)", minimum=1, only_with="prefix_projection"
    )
    prefix_dropout: float = option(
        0.0, "dropout on the prefix's keys and values", minimum=0.0, below=1.0, only_with="prefix_tuning"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_tuning and self.lora_path is not None:
            raise ConfigError(
                "--prefix_tuning and --lora_path do not go together: merge the adapter first (arriero merge)"
            )
        if self.prefix_tuning and self.lora:
            raise ConfigError("--lora and --prefix_tuning exclude each other: keep one")
        # training with a given adapter means going on with it
        self.lora = self.lora or self.lora_path is not None
        self.prefix_tuning = self.prefix_tuning or self.prefix_path is not None
        if self.lora and self.prefix_path is not None:
            raise ConfigError("--lora and --prefix_path do not go together: drop one of them")
        if "all-linear" in self.lora_target_modules:
            others = [name for name in self.lora_target_modules if name != "all-linear"]
            self.lora_target_modules = list(dict.fromkeys([*LINEAR_LAYERS, *others]))
        if self.lora and not self.lora_target_modules:
            raise ConfigError(f"--lora_target_modules is empty: name some of {', '.join(LINEAR_LAYERS)}")
        if self.pissa:
            self.lora_init = "pissa"
        if self.lora_dora and self.lora_init == "pissa":
            raise ConfigError("--lora_dora and --lora_init pissa do not go together: choose one of them")
        if self.lora and self.lora_path is None:
            self.lora_alpha = self.alpha

    @property
    def alpha(self) -> float:
        """Strength of fresh additions."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
