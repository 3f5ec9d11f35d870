"""arriero: one tool for the whole life of a LLaMA-family model.

    import arriero

    model = arriero.load("smollm2-135m-instruct")
    print(model.chat("What is a mule?", max_new_tokens=40))

The names of `__all__` are stable; other modules may change. Importing this imports no torch: each name is fetched when it is
first used. What goes wrong for a user's reasons is an `ArrieroError` with one line. See docs/python.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from arriero.api.files import convert, download, export_model, merge, quantize
    from arriero.api.model import Model, load
    from arriero.api.text import TextModel, load_bundle
    from arriero.api.training import Run, evaluate, finetune, preprocess, pretrain
    from arriero.engine.answer import Generation
    from arriero.engine.sampling_params import SamplingParams
    from arriero.engine.structure import Structure
    from arriero.errors import (
        ArrieroError,
        ConfigError,
        DataError,
        FormatError,
        GenerationError,
        MissingExtraError,
        RunStopped,
        TemplateError,
        TrainingError,
    )

__all__ = [
    "ArrieroError",
    "ConfigError",
    "DataError",
    "FormatError",
    "Generation",
    "GenerationError",
    "MissingExtraError",
    "Model",
    "Run",
    "RunStopped",
    "SamplingParams",
    "Structure",
    "TemplateError",
    "TextModel",
    "TrainingError",
    "__version__",
    "convert",
    "download",
    "evaluate",
    "export_model",
    "finetune",
    "load",
    "load_bundle",
    "merge",
    "preprocess",
    "pretrain",
    "quantize",
]

_HOMES = {
    "arriero.api.files": ("convert", "download", "export_model", "merge", "quantize"),
    "arriero.api.model": ("Model", "load"),
    "arriero.api.text": ("TextModel", "load_bundle"),
    "arriero.api.training": ("Run", "evaluate", "finetune", "preprocess", "pretrain"),
    "arriero.engine.answer": ("Generation",),
    "arriero.engine.sampling_params": ("SamplingParams",),
    "arriero.engine.structure": ("Structure",),
    "arriero.errors": (
        "ArrieroError",
        "ConfigError",
        "DataError",
        "FormatError",
        "GenerationError",
        "MissingExtraError",
        "RunStopped",
        "TemplateError",
        "TrainingError",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'arriero' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
