"""Quantization-aware training from its options, of all weights or with an adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.adapters.qat import apply_qat, inputs_of_layers
from arriero.engine.loading import LoadedModel
from arriero.errors import ConfigError
from arriero.formats.parts import Placement
from arriero.parallel.materialize import Values
from arriero.parallel.processes import launched_size
from arriero.quantization.qat import QatSettings, is_range
from arriero.training.checkpoint import WeightStore
from arriero.training.finetune_options import FinetuneOptions
from arriero.training.qat_weights import ExactAdapterWeights, ExactWeights, QatWeights
from arriero.training.weights import AdapterWeights, FullWeights


def qat_weights(
    loaded: LoadedModel, options: FinetuneOptions, weights: WeightStore, values: Values | None
) -> tuple[QatWeights, Values | None]:
    """Let a trainable model round its weights, in place; see `arriero.training.methods.build.build_weights`.

    Args:
        weights, values: of the model without rounding.
    """
    chosen, inputs = options.quantization, inputs_of_layers(loaded.model)
    settings = QatSettings.of(chosen.qat_type, chosen.qat_group_size, chosen.qat_activation, inputs)
    tensor_parts = options.parallel.layout(launched_size()).tp
    names = apply_qat(loaded.model, settings, column_parts=tensor_parts)
    print(f"QAT: {settings}; {len(names)} layers, embedding and output head stay exact")
    return QatWeights(loaded.model, exact(weights), settings), None if values is None else with_ranges(values)


def exact(weights: WeightStore) -> WeightStore:
    """The same store, of a model that has ranges too, which it leaves alone."""
    if isinstance(weights, FullWeights):
        return ExactWeights(**vars(weights))
    if isinstance(weights, AdapterWeights):
        return ExactAdapterWeights(**vars(weights))
    raise ConfigError("--qat trains all weights or a LoRA adapter: drop the other method")


def with_ranges(values: Values) -> Values:
    """The values of a model whose ranges are still to be set."""

    def value(name: str, placement: Placement) -> Tensor:
        return torch.ones(placement.size) if is_range(name) else values(name, placement)

    return value
