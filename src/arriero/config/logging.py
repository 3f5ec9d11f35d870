"""What a run tells, and where."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError


@dataclass(kw_only=True)
class LoggingOptions(OptionGroup):
    """Logging."""

    logging_steps: int = option(10, "optimizer steps between log lines", minimum=1)
    logging_dir: str | None = option(None, "where TensorBoard files go (default: runs in --output_dir)")
    report_to: list[str] = option(
        ["auto"],
        "trackers; auto: TensorBoard if it is installed; visualdl is the seed's word for tensorboard. "
        "train_log.jsonl and loss.png are always written",
        ("auto", "tensorboard", "visualdl", "none"),
    )
    run_name: str | None = option(None, "a name for the run in trackers (default: the name of --output_dir)")
    disable_tqdm: bool = option(False, "no progress bar, only log lines")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.report_to = list(dict.fromkeys("tensorboard" if word == "visualdl" else word for word in self.report_to))
        for word in ("none", "auto"):
            if word in self.report_to and len(self.report_to) > 1:
                others = ",".join(other for other in self.report_to if other != word)
                raise ConfigError(f"--report_to names {word} and {others}: keep one of the two")
        self.report_to = self.report_to or ["none"]
