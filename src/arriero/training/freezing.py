"""Parameters that keep their values, chosen by pattern."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn

from arriero.errors import ConfigError


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Leave the parameters that a pattern names out of training, in place.

    Args:
        patterns: with the wildcards of a shell (`*` matches dots too), against the whole name of a parameter or of a module
            that holds it: `model.embed_tokens`, `model.layers.[0-3]`, `*.bias`.

    Returns:
        How many numbers are frozen by it.

    Raises:
        ConfigError: a pattern that matches no parameter; patterns that leave none to train.
    """
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in parameters if _matches(name, pattern)}
        if not found:
            hint = ""
            if _matches("lm_head.weight", pattern) and "lm_head.weight" not in parameters:
                hint = "; this model's head is its embedding: model.embed_tokens"
            raise ConfigError(
                f"--freeze {pattern} matches no parameter: the names are like {', '.join(_examples(list(parameters)))}{hint}"
            )
        chosen |= found
    frozen = sum(parameters[name].numel() for name in chosen if parameters[name].requires_grad)
    for name in chosen:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"--freeze {','.join(patterns)} leaves no parameter to train: choose fewer")
    return frozen


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter's name or that of a module around it."""
    around = accumulate(name.split("."), lambda outer, part: f"{outer}.{part}")
    return any(fnmatchcase(part, pattern) for part in around)


def _examples(names: list[str]) -> list[str]:
    return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
