"""What a run tells, and where."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option
from arriero.config.values import step_range
from arriero.errors import ConfigError

MAX_PROFILED = 100


@dataclass(kw_only=True)
class LoggingOptions(OptionGroup):
    """Logging."""

    logging_steps: int = option(10, "optimizer steps between log lines", minimum=1)
    logging_dir: str | None = option(None, "where TensorBoard files go (default: runs in --output_dir)")
    report_to: list[str] = option(
        ["auto"],
        "trackers, one or several; auto: TensorBoard if it is installed; visualdl is PaddleNLP's word for tensorboard. "
        "train_log.jsonl and loss.png are always written",
        ("auto", "tensorboard", "visualdl", "wandb", "trackio", "none"),
    )
    project: str = option("arriero", "the project in W&B and Trackio that the run belongs to")
    run_name: str | None = option(None, "a name for the run in trackers (default: the name of --output_dir)")
    disable_tqdm: bool = option(False, "no progress bar, only log lines")
    sample_prompts: list[str] = option(
        [], "texts, or text files of a prompt a line, that the model continues at every evaluation", split=False
    )
    sample_tokens: int = option(64, "longest such continuation in tokens", minimum=1, only_with="sample_prompts")
    sample_temperature: float = option(
        0.0,
        "temperature of the continuations; 0: always the likeliest token",
        minimum=0.0,
        maximum=100.0,
        only_with="sample_prompts",
    )
    grad_norm_spike: float = option(
        10.0, "warn of a gradient norm that is so many times the median of the last 100 steps; 0: never", minimum=0.0
    )
    stop_on_spike: bool = option(
        False, "stop the run there, before the step can get into a checkpoint", only_with="grad_norm_spike"
    )
    profile_steps: str | None = option(
        None, "steps to profile, e.g. 5-8: a trace for Perfetto and a table of operators in profile/ of --output_dir"
    )
    profile_memory: bool = option(False, "profile the memory of each operator too", only_with="profile_steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.report_to = list(dict.fromkeys("tensorboard" if word == "visualdl" else word for word in self.report_to))
        for word in ("none", "auto"):
            if word in self.report_to and len(self.report_to) > 1:
                others = ",".join(other for other in self.report_to if other != word)
                raise ConfigError(f"--report_to names {word} and {others}: keep one of the two")
        self.report_to = self.report_to or ["none"]
        if not self.project.strip():
            raise ConfigError("--project is empty: give the project a name, or leave it out")
        if "" in (prompt.strip() for prompt in self.sample_prompts):
            raise ConfigError("--sample_prompts holds an empty text, which leaves nothing to continue: leave it out")
        if 0.0 < self.grad_norm_spike <= 1.0:
            raise ConfigError(
                f"--grad_norm_spike is {self.grad_norm_spike:g}: every other step is above the median; give more than 1, "
                "or 0 for no warning"
            )
        self.profile_range()

    def profile_range(self) -> tuple[int, int] | None:
        """The first and last step of `profile_steps`, counted from 1, or None."""
        if self.profile_steps is None:
            return None
        steps = step_range(self.profile_steps)
        if steps is None:
            raise ConfigError(
                f"--profile_steps is {self.profile_steps!r}: give a step or two, counted from 1, e.g. 5-8"
            )
        first, last = steps
        if last - first >= MAX_PROFILED:
            raise ConfigError(
                f"--profile_steps {self.profile_steps} are {last - first + 1} steps, whose trace no viewer opens: "
                f"give at most {MAX_PROFILED}"
            )
        return steps
