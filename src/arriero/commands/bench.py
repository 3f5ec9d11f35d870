"""`arriero bench`: the speed of a model on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.commands.unavailable import not_available
from arriero.config.model import ModelOptions
from arriero.config.option import OptionGroup, option

HELP = "Measure the speed of a model on this machine, against installed peers."


@dataclass(kw_only=True)
class BenchOptions(OptionGroup):
    """Benchmark."""

    what: list[str] = option(["generate"], "what is measured", ("train", "generate", "serve"))
    batch_size: int = option(1, "rows or requests at a time", minimum=1)
    src_length: int = option(128, "tokens of a prompt", minimum=1)
    max_new_tokens: int = option(128, "tokens of an answer", aliases=("tgt_length",), minimum=1)
    peers: list[str] = option([], "installed programs to compare with", ("transformers", "llama.cpp", "vllm"))
    output_file: str | None = option(None, "JSON file for the numbers")


OPTIONS: tuple[type, ...] = (
    ModelOptions,
    BenchOptions,
)


def run(model: ModelOptions, bench: BenchOptions) -> int:
    """Answer that this comes in a later version."""
    raise not_available("bench", "make bench compares training with the transformers Trainer")
