"""Rules about `bench`: what loads a model and what asks a server are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arriero.config.bench import BenchOptions
from arriero.config.load import LoadOptions
from arriero.config.model import ModelOptions
from arriero.config.option import specs_of
from arriero.config.rules.groups import changed, find
from arriero.errors import ConfigError

# Workloads that an option of `BenchOptions` is for, where it is not for all.
_WORKLOADS = {
    "batch_sizes": ("decode",),
    "src_length": ("decode", "mixed"),
    "max_new_tokens": ("decode", "mixed", "shared_prefix", "long_context"),
    "prompt_lengths": ("prefill",),
    "num_requests": ("mixed", "shared_prefix"),
    "max_running": ("mixed", "shared_prefix"),
    "shared_length": ("shared_prefix",),
    "context_length": ("long_context",),
}
# Options of `BenchOptions` that `serve` has a use for.
_OF_SERVE = frozenset({"workloads", "max_new_tokens", "num_requests", "seed", "output_file", "plot"})


def bench_rule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    bench, load = find(groups, BenchOptions), find(groups, LoadOptions)
    if bench is None or load is None:
        return
    serve = "serve" in bench.workloads
    if serve and len(bench.workloads) > 1:
        raise ConfigError(
            f"serve asks a running server and {next(name for name in bench.workloads if name != 'serve')} loads a model: "
            "measure them one after the other"
        )
    if not serve:
        _other_workloads(bench, given, warnings)
        model = find(groups, ModelOptions)
        if model is not None and load.model is not None and "model_name_or_path" not in given:
            model.model_name_or_path, load.model = load.model, None  # --model is short for it in other verbs
    for group in groups:
        for name in (spec.name for spec in specs_of(type(group))):
            idle = (group is not load and name not in _OF_SERVE) if serve else group is load
            if idle and changed(group, name, given):
                hint = ": --model names what the server has" if serve and name == "model_name_or_path" else ""
                warnings.append(f"--{name} has no effect {'in' if serve else 'without'} bench serve{hint}")


def _other_workloads(bench: BenchOptions, given: frozenset[str], warnings: list[str]) -> None:
    """One warning about options of workloads that are not measured."""
    idle = [
        f"--{name}"
        for name, workloads in _WORKLOADS.items()
        if not set(workloads) & set(bench.workloads) and changed(bench, name, given)
    ]
    if idle:
        have = "has" if len(idle) == 1 else "have"
        warnings.append(f"{', '.join(idle)} {have} no effect in bench {' '.join(bench.workloads)}")
