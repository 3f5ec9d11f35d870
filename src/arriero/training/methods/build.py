"""From options to trainable parameters: the one place that knows every method."""

from __future__ import annotations

from arriero.engine.loading import LoadedModel
from arriero.parallel.materialize import Values
from arriero.quantization.linear import refuse_quantized
from arriero.training.checkpoint import WeightStore
from arriero.training.finetune_options import FinetuneOptions
from arriero.training.methods.lora import lora_weights
from arriero.training.methods.prefix import prefix_weights
from arriero.training.methods.qat import qat_weights
from arriero.training.weights import FullWeights


def build_weights(loaded: LoadedModel, options: FinetuneOptions) -> tuple[WeightStore, Values | None]:
    """Make the model trainable as asked, in place.

    Returns:
        How its trained weights are stored; and where all its weights come from, if it is on the meta device still.
    """
    if options.quantization.qat:
        refuse_quantized(loaded.model, "--qat", "give the original model")
    weights, values = _exact_weights(loaded, options)
    return qat_weights(loaded, options, weights, values) if options.quantization.qat else (weights, values)


def _exact_weights(loaded: LoadedModel, options: FinetuneOptions) -> tuple[WeightStore, Values | None]:
    if options.adapter.lora:
        return lora_weights(loaded, options)
    if options.adapter.prefix_tuning:
        return prefix_weights(loaded, options)
    refuse_quantized(loaded.model, "full fine-tuning", "add --lora")
    weights = FullWeights(loaded.model, loaded.folder, loaded.tokenizer, options.checkpoint.max_shard_size)
    return weights, loaded.values
