"""Rules about `bench`: what loads a model and what asks a server are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arriero.config.bench import BenchOptions
from arriero.config.load import LoadOptions
from arriero.config.option import specs_of
from arriero.config.rules.groups import changed, find
from arriero.errors import ConfigError

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
    for group in groups:
        for name in (spec.name for spec in specs_of(type(group))):
            idle = (group is not load and name not in _OF_SERVE) if serve else group is load
            if idle and changed(group, name, given):
                hint = ": --model names what the server has" if serve and name == "model_name_or_path" else ""
                warnings.append(f"--{name} has no effect {'in' if serve else 'without'} bench serve{hint}")
