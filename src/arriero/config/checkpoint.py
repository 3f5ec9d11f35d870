"""When a run is evaluated and saved, and where."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import REQUIRED, OptionGroup, option
from arriero.config.values import FALSE_WORDS, TRUE_WORDS
from arriero.errors import ConfigError

STRATEGIES = ("no", "steps", "epoch")
_LOWER_IS_BETTER = ("loss", "ppl", "bits_per_byte")


@dataclass(kw_only=True)
class CheckpointOptions(OptionGroup):
    """Checkpoints and evaluation.

    `evaluation_strategy` left out means: as `save_strategy` if the best model is to be loaded; else, with `--do_eval`,
    every `eval_steps` if given and with each checkpoint if not (`compatibility.check` settles it after parsing).
    """

    output_dir: str = option(
        REQUIRED,
        "the run folder: checkpoints, log, plot, effective configuration and the final model",
        unless="preview",
    )
    overwrite_output_dir: bool = option(
        False, "start afresh in a folder that already holds a run; its checkpoints are deleted"
    )
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint folder to go on from, or auto: the newest whole one in --output_dir, if any"
    )
    save_strategy: str = option("steps", "when a checkpoint is written", STRATEGIES)
    save_steps: int = option(500, "optimizer steps between checkpoints", minimum=1)
    save_total_limit: int | None = option(
        None, "keep only the newest N checkpoints (the best one is always kept)", minimum=1
    )
    async_save: bool = option(
        False,
        "write checkpoints in the background while training goes on; costs a copy of weights and optimizer in host memory",
        aliases=("use_async_save",),
    )
    evaluation_strategy: str | None = option(
        None,
        "when to evaluate during training (default: with --do_eval, at each checkpoint)",
        STRATEGIES,
        ("eval_strategy",),
    )
    eval_steps: int | None = option(None, "optimizer steps between evaluations (default: --save_steps)", minimum=1)
    load_best_model_at_end: bool = option(
        False, "finish with the checkpoint of the best evaluation instead of the last"
    )
    metric_for_best_model: str | None = option(
        None,
        "what the best is judged by: loss, accuracy, ... (default: loss)",
        only_with=("load_best_model_at_end", "early_stopping_patience"),
    )
    greater_is_better: bool | None = option(
        None,
        "whether more of that metric is better (default: yes, but for loss and perplexity)",
        only_with=("load_best_model_at_end", "early_stopping_patience"),
    )
    early_stopping_patience: int | None = option(
        None, "end the run after so many evaluations in a row without a better --metric_for_best_model", minimum=1
    )
    early_stopping_threshold: float = option(
        0.0, "by more than this it must be better", minimum=0.0, only_with="early_stopping_patience"
    )
    max_shard_size: str = option("5GB", "largest safetensors file of a saved model; a larger model is cut into several")
    save_sharded_model: bool = option(
        False,
        "also write the final model into sharded/ as one file a process (model-tp00-of-04.safetensors), as the processes of "
        "tensor and pipeline parallelism share it out",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output_dir.strip():
            raise ConfigError("--output_dir is empty: name a folder for the run")
        if self.resume_from_checkpoint is not None:
            word = self.resume_from_checkpoint.strip().lower()
            if word == "auto" or word in TRUE_WORDS:
                self.resume_from_checkpoint = "auto"
            elif word in FALSE_WORDS or word in ("", "none"):
                self.resume_from_checkpoint = None
        if self.resume_from_checkpoint is not None and self.overwrite_output_dir:
            raise ConfigError(
                "--resume_from_checkpoint and --overwrite_output_dir contradict each other: "
                "one goes on, the other starts afresh; drop one of them"
            )
        if self.load_best_model_at_end:
            self._settle_best()
        if self.load_best_model_at_end or self.early_stopping_patience is not None:
            self._settle_metric()
        if self.evaluation_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.save_steps

    def _settle_best(self) -> None:
        if self.save_strategy == "no":
            raise ConfigError(
                "--load_best_model_at_end needs checkpoints and --save_strategy is no: set it to steps or epoch"
            )
        if self.evaluation_strategy is None:
            self.evaluation_strategy = self.save_strategy
        if self.evaluation_strategy != self.save_strategy:
            raise ConfigError(
                f"--load_best_model_at_end needs --evaluation_strategy ({self.evaluation_strategy}) and "
                f"--save_strategy ({self.save_strategy}) to be the same: change one of them"
            )
        if self.evaluation_strategy == "steps" and self.save_steps % (self.eval_steps or self.save_steps):
            raise ConfigError(
                f"--load_best_model_at_end needs every checkpoint evaluated: --save_steps {self.save_steps} is not "
                f"a multiple of --eval_steps {self.eval_steps}"
            )

    def _settle_metric(self) -> None:
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        self.metric_for_best_model = self.metric_for_best_model.removeprefix("eval_").replace("perplexity", "ppl")
        if self.greater_is_better is None:
            self.greater_is_better = self.metric_for_best_model not in _LOWER_IS_BETTER
