"""Whether generation is compiled."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option


@dataclass(kw_only=True)
class CompilationOptions(OptionGroup):
    """Compilation."""

    torch_compile: bool = option(
        False,
        "let torch.compile make steps of few tokens: the first of each number of sequences (up to 1, 2, 4 and 8 on a CPU) then "
        "takes seconds. On a CPU, with a C++ compiler, answers come up to twice as fast, and the weights are held once more, "
        "in 16 bits if these hold them without loss",
    )
