"""Several adapters as one: the weighted sum of their updates, by putting their ranks side by side.

``joinedi w_i s_i B_i A_i = B A`` with ``A = [A_1; A_2; ...]`` and ``B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]``: exact, and an
ordinary adapter again (PEFT's combination "cat").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from arriero.adapters.lora_config import LoRAConfig
from arriero.errors import ConfigError, FormatError
from arriero.formats.peft import BASE_COPIES

Adapter = tuple[LoRAConfig, Mapping[str, Tensor]]  # as stored: the tensors named as in the adapted model


def mix_adapters(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """One adapter whose update is the weighted sum of several; fp32, with a scaling of 1.

    A layer that one of them does not adapt gets zeros for it.

    Raises:
        ConfigError: for adapters that are more than a sum of matrices (DoRA, trained biases), that adapt one layer in
            different shapes, or a number of weights that differs.
    """
    if len(weights) != len(adapters):
        raise ConfigError(
            f"--adapter_weights has {len(weights)} numbers for {len(adapters)} adapters: give one for each"
        )
    for number, (config, state) in enumerate(adapters, start=1):
        _check_plain(number, config, state)
    layers = dict.fromkeys(name.partition(".lora_")[0] for _, state in adapters for name in state)
    mixed = {}
    for layer in layers:
        a, b = _joined(layer, adapters, weights)
        mixed[f"{layer}.lora_A.weight"], mixed[f"{layer}.lora_B.weight"] = a, b
    rank = sum(_greatest_rank(config) for config, _ in adapters)
    return LoRAConfig(rank=rank, alpha=float(rank), target_modules=_targets(adapters, list(layers))), mixed


def check_mix(mixed: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    """Compare the update of every layer with the weighted sum of those of the adapters.

    Raises:
        FormatError: where they differ by more than rounding.
    """
    _, state = mixed
    for layer in dict.fromkeys(name.partition(".lora_")[0] for name in state):
        joined = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
        total = torch.zeros_like(joined)
        for (config, own), weight in zip(adapters, weights, strict=True):
            if f"{layer}.lora_A.weight" in own:
                delta = own[f"{layer}.lora_B.weight"].float() @ own[f"{layer}.lora_A.weight"].float()
                total += weight * config.of_layer(layer).scaling * delta
        difference = float((joined - total).abs().max())
        if not difference <= 1e-5 * max(1.0, float(total.abs().max())):
            raise FormatError(f"{layer}: the joined update differs by {difference:.2e} from the sum of the adapters'")


def _check_plain(number: int, config: LoRAConfig, state: Mapping[str, Tensor]) -> None:
    if config.use_dora:
        raise ConfigError(f"adapter {number} is a DoRA adapter, which is no sum of matrices: merge it alone")
    for name in BASE_COPIES & state.keys():
        raise ConfigError(
            f"adapter {number} holds a copy of the base's {name}, with which nothing is compared here: save it without "
            "(PEFT: save_embedding_layers=False), or merge it alone"
        )
    biases = [name for name in state if ".lora_" not in name]
    if biases:
        raise ConfigError(
            f"adapter {number} has trained biases ({biases[0]} and {len(biases) - 1} more), which cannot be weighted: "
            "merge it alone"
        )


def _greatest_rank(config: LoRAConfig) -> int:
    return max(config.rank, *config.rank_pattern.values()) if config.rank_pattern else config.rank


def _joined(layer: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A, (sum of ranks, in), and B, (out, sum of ranks), of a layer."""
    shapes = {
        (state[f"{layer}.lora_B.weight"].shape[0], state[f"{layer}.lora_A.weight"].shape[1])
        for _, state in adapters
        if f"{layer}.lora_A.weight" in state
    }
    if len(shapes) > 1:
        raise ConfigError(f"the adapters are for different models: {layer} is {' and '.join(map(str, sorted(shapes)))}")
    ((rows, columns),) = shapes
    parts_a, parts_b = [], []
    for (config, state), weight in zip(adapters, weights, strict=True):
        rank = _greatest_rank(config)
        a, b = torch.zeros(rank, columns), torch.zeros(rows, rank)
        if f"{layer}.lora_A.weight" in state:
            own = config.of_layer(layer)
            a[: own.rank] = state[f"{layer}.lora_A.weight"].float()
            b[:, : own.rank] = state[f"{layer}.lora_B.weight"].float() * (weight * own.scaling)
        parts_a.append(a)
        parts_b.append(b)
    return torch.cat(parts_a), torch.cat(parts_b, dim=1)


def _targets(adapters: Sequence[Adapter], layers: list[str]) -> tuple[str, ...]:
    """Names for the layers adapted by any: the adapters' own words if all of them list words, else each layer's full name."""
    words = [config.target_modules for config, _ in adapters]
    if any(isinstance(targets, str) for targets in words):
        return tuple(layers)
    return tuple(dict.fromkeys(word for targets in words for word in targets))
