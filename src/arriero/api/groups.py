"""Which options each function takes as keyword arguments. The verbs of the same names take these and their own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

from arriero.api.arguments import plain
from arriero.config.adapter import AdapterPathOptions
from arriero.config.compilation import CompilationOptions
from arriero.config.converting import ConvertOptions
from arriero.config.data import DataOptions
from arriero.config.evaluation import EvaluateOptions
from arriero.config.export import ExportOptions
from arriero.config.generation import GenerationOptions
from arriero.config.kv_cache import KVCacheOptions
from arriero.config.merging import MergeOptions
from arriero.config.model import ModelOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.parser import from_keywords
from arriero.config.preprocessing import PreprocessOptions
from arriero.config.quantization import QuantizeOptions
from arriero.config.training import FINETUNE, PRETRAIN
from arriero.errors import ConfigError

EVALUATE: tuple[type, ...] = (
    ModelOptions,
    AdapterPathOptions,
    DataOptions,
    EvaluateOptions,
    ParallelOptions,
    CompilationOptions,
)
MERGE: tuple[type, ...] = (ModelOptions, AdapterPathOptions, MergeOptions)
EXPORT: tuple[type, ...] = (ExportOptions, AdapterPathOptions)

KEYWORDS: dict[str, tuple[type, ...]] = {
    "load": (ModelOptions, KVCacheOptions, CompilationOptions),
    "generate": (GenerationOptions,),
    "preprocess": (PreprocessOptions,),
    "pretrain": PRETRAIN,
    "finetune": FINETUNE,
    "evaluate": EVALUATE,
    "merge": MERGE,
    "quantize": (ModelOptions, QuantizeOptions),
    "convert": (ConvertOptions,),
    "export_model": EXPORT,
}
# Options that are arguments of their own, or belong to the command line only.
_ADAPTER = frozenset({"lora_path", "prefix_path"})
_MODEL = frozenset({"model_name_or_path"})
_TASKS = frozenset({"tasks", "include_path", "num_fewshot", "limit", "apply_chat_template"})  # of lm-eval
RESERVED: dict[str, frozenset[str]] = {
    "load": _MODEL,
    "generate": frozenset({"batch_size"}),
    "preprocess": frozenset(),
    "pretrain": _MODEL,
    "finetune": _MODEL,
    "evaluate": _MODEL | _ADAPTER | _TASKS,
    "merge": _MODEL | _ADAPTER | {"output_path"},
    "quantize": _MODEL | {"output_path"},
    "convert": _MODEL | {"output_dir"},
    "export_model": _MODEL | _ADAPTER | {"output_path"},
}
# Names that options go by on the command line, as in PaddleNLP, and that mean something else in Python.
_OTHERWISE = {
    "batch_size": "it is an argument of arriero.load",
    "max_length": "transformers counts the prompt in it and PaddleNLP does not: say max_new_tokens, the answer's tokens alone",
    "min_length": "transformers counts the prompt in it and PaddleNLP does not: say min_new_tokens, the answer's tokens alone",
}
_OUTPUTS = frozenset({"output_dir", "output_path"})  # a shell would have resolved their `~`
REFUSED: dict[str, frozenset[str]] = {**RESERVED, "generate": frozenset(_OTHERWISE)}


def build(function: str, keywords: Mapping[str, Any], **own: Any) -> tuple[Any, ...]:
    """The option groups of a function.

    Args:
        keywords: as its caller gave them.
        own: options that it has arguments of its own for.

    Raises:
        ConfigError: an unknown name, a value of the wrong kind or an impossible combination.
    """
    place = "generate" if function == "generate" else f"arriero.{function}"  # a method
    for name in sorted(REFUSED[function] & keywords.keys()):
        why = _OTHERWISE[name] if function == "generate" else f"see help({place})"
        raise ConfigError(f"{place} takes no {name}: {why}")
    values = {name: plain(value) for name, value in {**own, **keywords}.items()}
    for name in _OUTPUTS & values.keys():
        if isinstance(values[name], str | PathLike):
            values[name] = os.path.expanduser(values[name])
    return from_keywords(KEYWORDS[function], values, place)
