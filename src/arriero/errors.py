"""What can go wrong for a user, as one hierarchy.

Each error's message is one line that says what is wrong, where, and what to do about it. The command line prints that line
and exits with `exit_code`; a traceback is shown only with `--debug`.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class ArrieroError(Exception):
    """Base of every error that a user can mend."""

    exit_code = 2


class ConfigError(ArrieroError):
    """An option, or a combination of options, that cannot work."""


class DataError(ArrieroError):
    """A data set, a corpus or one row of it that cannot be used."""


class FormatError(ArrieroError):
    """A file of weights, configuration or tokenizer that is missing, broken or of an unsupported kind."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a file's own words may have more than one line


class TemplateError(ArrieroError):
    """A chat template that is malformed, unsafe, or outgrew its time or size limit."""


class GenerationError(ArrieroError):
    """A generation request that cannot be served."""


class TrainingError(ArrieroError):
    """A training run that cannot start or go on."""


class RunStopped(ArrieroError):
    """A training run that a signal ended in order, with everything saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PeerError(ArrieroError):
    """Another process of this run failed; it says itself why."""

    peers_know = False  # whether the other processes have been told


class MissingExtraError(ArrieroError):
    """An optional dependency that is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: the dotted module name.
        extra: the extra of this package that installs it.

    Raises:
        MissingExtraError: naming the pip command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.partition('.')[0]} is needed for this and is not installed: pip install 'arriero[{extra}]' ({error})"
        ) from error
