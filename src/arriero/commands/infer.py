"""`arriero infer`: run an exported bundle."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.commands.unavailable import not_available
from arriero.config.generation import GenerationOptions
from arriero.config.model import device_name
from arriero.config.option import REQUIRED, OptionGroup, option

HELP = "Run a bundle made by arriero export."


@dataclass(kw_only=True)
class InferOptions(OptionGroup):
    """Inference."""

    model_dir: str = option(REQUIRED, "folder of the bundle")
    model_prefix: str = option("llama", "its name in that folder")
    device: str = option("auto", "auto, cpu, gpu or cuda:N")
    src_length: int = option(1024, "longest prompt in tokens", minimum=1)
    data_file: str | None = option(None, "jsonl rows to answer; without it, the two built-in prompts")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.device = device_name(self.device)


OPTIONS: tuple[type, ...] = (
    InferOptions,
    GenerationOptions,
)


def run(infer: InferOptions, generation: GenerationOptions) -> int:
    """Answer that this comes in a later version."""
    raise not_available("infer", "arriero predict answers the same prompts from a model folder")
