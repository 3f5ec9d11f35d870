"""How the weights are trained."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "wsd")
DECAY_SHAPES = ("1-sqrt", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw_8bit", "muon", "lion", "sgd")
# Other names of the same: transformers' for the schedule and the optimizers.
_SYNONYMS = {
    "warmup_stable_decay": "wsd",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "lion_32bit": "lion",
}


@dataclass(kw_only=True)
class OptimizationOptions(OptionGroup):
    """Optimization."""

    do_train: bool = option(True, "train; no: only evaluate")
    do_eval: bool = option(
        False, "evaluate on the held-out part, during training as --evaluation_strategy says and at the end"
    )
    per_device_train_batch_size: int = option(8, "rows of one micro-batch on each device", minimum=1)
    per_device_eval_batch_size: int = option(8, "rows of one evaluation batch on each device", minimum=1)
    gradient_accumulation_steps: int = option(1, "micro-batches of one optimizer step", minimum=1)
    learning_rate: float = option(
        5e-5,
        "peak learning rate; where none is given, of --lora 3e-4, of --prefix_tuning 2e-2 (with --prefix_projection 2e-3), but "
        "with --preference as of all weights",
        minimum=0.0,
    )
    min_learning_rate: float = option(
        0.0,
        "the learning rate never falls below this after warm-up",
        aliases=("lr_end",),
        minimum=0.0,
    )
    lr_scheduler_type: str = option(
        "linear",
        "shape of the learning rate after warm-up; wsd: constant, then a decay at the end",
        (*SCHEDULES, "warmup_stable_decay"),
    )
    warmup_steps: int = option(0, "steps in which the learning rate rises from 0; wins over --warmup_ratio", minimum=0)
    warmup_ratio: float = option(0.0, "the same as a share of all steps", minimum=0.0, maximum=1.0)
    decay_steps: int | None = option(
        None, "step at which the learning rate reaches its floor (default: the last step)", minimum=1
    )
    wsd_decay_ratio: float = option(
        0.2, "length of the decay of wsd, as a share of --decay_steps", above=0.0, maximum=1.0
    )
    wsd_decay_shape: str = option("1-sqrt", "shape of the decay of wsd", DECAY_SHAPES)
    lr_power: float = option(1.0, "exponent of the polynomial schedule", above=0.0)
    num_train_epochs: float = option(3.0, "passes over the data; a fraction stops within one", above=0.0)
    max_steps: int = option(-1, "optimizer steps; if positive, it wins over --num_train_epochs", minimum=-1)
    optim: str = option(
        "adamw",
        f"the optimizer, one of {', '.join(OPTIMIZERS)}: fused AdamW, AdamW with 8-bit moments, Muon on the matrices of the "
        "layers (AdamW on the rest), Lion, SGD; transformers' names mean the same",
    )
    muon_momentum: float = option(0.95, "Nesterov momentum of Muon", minimum=0.0, below=1.0)
    lion_beta1: float = option(0.9, "beta1 of Lion: of the mean whose sign is the step", minimum=0.0, below=1.0)
    lion_beta2: float = option(0.99, "beta2 of Lion: of the mean that is kept", minimum=0.0, below=1.0)
    sgd_momentum: float = option(0.0, "momentum of SGD", aliases=("momentum",), minimum=0.0, below=1.0)
    weight_decay: float = option(0.0, "decoupled weight decay; norms and biases are left out", minimum=0.0)
    adam_beta1: float = option(0.9, "beta1 of AdamW", minimum=0.0, below=1.0)
    adam_beta2: float = option(0.999, "beta2 of AdamW", minimum=0.0, below=1.0)
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", above=0.0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never", minimum=0.0)
    label_smoothing: float = option(
        0.0,
        "share of the target spread over the vocabulary",
        aliases=("label_smoothing_factor",),
        minimum=0.0,
        below=1.0,
    )
    freeze: list[str] = option(
        [],
        "parameters that keep their values: names, or of modules that hold them, with the wildcards of a shell "
        "(model.embed_tokens,model.layers.[0-3])",
    )
    neftune_noise_alpha: float = option(
        0.0,
        "NEFTune: uniform noise of this size on the embeddings while training (5 to 15 are usual); 0: none",
        minimum=0.0,
    )
    seed: int = option(42, "seed of the data order, dropout and fresh weights", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optim = optimizer_name(self.optim)
        self.lr_scheduler_type = _SYNONYMS.get(self.lr_scheduler_type, self.lr_scheduler_type)
        if self.max_steps == 0:
            raise ConfigError("--max_steps is 0: give a positive number, or -1 to train for --num_train_epochs")
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"--min_learning_rate {self.min_learning_rate:g} is above --learning_rate {self.learning_rate:g}: "
                f"lower the first or raise the second"
            )
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ConfigError(
                f"--decay_steps {self.decay_steps} is not after --warmup_steps {self.warmup_steps}: "
                f"raise the first or lower the second"
            )
        if 0 < self.max_steps < self.warmup_steps:
            raise ConfigError(
                f"--warmup_steps {self.warmup_steps} is longer than the run, --max_steps {self.max_steps}: "
                f"lower the first or raise the second"
            )
        if self.max_steps > 0:
            self.check_decay(self.max_steps)
        if self.lr_scheduler_type == "wsd" and self.warmup_steps == 0 and self.warmup_ratio + self.wsd_decay_ratio > 1:
            raise ConfigError(
                f"--warmup_ratio {self.warmup_ratio:g} and --wsd_decay_ratio {self.wsd_decay_ratio:g} are more than the "
                "whole run together: lower one of them"
            )

    def check_decay(self, total_steps: int) -> None:
        """Refuse a decay of wsd that would begin before the end of the warm-up, in a run of `total_steps`.

        Raises:
            ConfigError: naming both options.
        """
        if self.lr_scheduler_type != "wsd" or self.warmup_steps == 0:  # of a --warmup_ratio the shares are compared
            return
        end = self.decay_steps or total_steps
        decay = int(self.wsd_decay_ratio * end)
        if self.warmup_steps + decay > end:
            raise ConfigError(
                f"--warmup_steps {self.warmup_steps} and the {decay} steps of --wsd_decay_ratio {self.wsd_decay_ratio:g} are "
                f"more than the {end} steps that there are together: lower one of them"
            )


def rate_of_method(*, lora: bool, prefix: bool, network: bool) -> float | None:
    """The peak learning rate of a small trained part, where none is given; None where all weights are trained.

    Few numbers have a longer way to go than all weights: at the usual rate of those they hardly learn. Those of prefixes are
    the rates of the recipes (configs/finetune), whose scores are in configs/README.md.

    Args:
        network: the prefix is made by one.
    """
    if lora:
        return 3e-4
    if prefix:
        return 2e-3 if network else 2e-2
    return None


def optimizer_name(word: str) -> str:
    """One of `OPTIMIZERS`, by its name or transformers'.

    Raises:
        ConfigError: it is none; where something near is, that is named.
    """
    name = word.strip().lower()
    name = _SYNONYMS.get(name, name)
    if name in OPTIMIZERS:
        return name
    plain = name.removeprefix("paged_")
    plain = {"lion_8bit": "lion"}.get(_SYNONYMS.get(plain, plain), _SYNONYMS.get(plain, plain))
    plain = "adamw" if plain == "adamw_32bit" else plain
    if plain in OPTIMIZERS:
        what = "no optimizer state is paged here" if name.startswith("paged_") else "Lion's state is fp32 here"
        raise ConfigError(f"--optim {word}: {what}; give --optim {plain}")
    raise ConfigError(f"--optim is {word!r}: choose one of {', '.join(OPTIMIZERS)}")
