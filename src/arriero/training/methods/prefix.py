"""Prefix tuning from its options."""

from __future__ import annotations

from torch import Tensor

from arriero.adapters.prefix import (
    PrefixConfig,
    apply_prefix,
    initial_values,
    load_prefix_state,
    prefix_state,
)
from arriero.adapters.prefix_files import StoredPrefix, open_prefix, whole_state, with_prefix
from arriero.config.rules.methods import check_projection
from arriero.engine.loading import LoadedModel
from arriero.errors import ConfigError
from arriero.formats.download import published_name
from arriero.formats.parts import Placement
from arriero.parallel.materialize import Values
from arriero.training.finetune_options import FinetuneOptions
from arriero.training.prefix_weights import PrefixWeights


def prefix_weights(loaded: LoadedModel, options: FinetuneOptions) -> tuple[PrefixWeights, Values | None]:
    """Put a fresh or a stored prefix before the model's keys and values, in place; see
    `arriero.training.methods.build.build_weights`."""
    adapter, shape = options.adapter, loaded.model.config
    base_model, seed = options.model.model_name_or_path, options.optimization.seed
    stored: StoredPrefix | None = None
    if adapter.prefix_path:
        stored = open_prefix(adapter.prefix_path, shape, base_model, trainable=True, dropout=adapter.prefix_dropout)
        config = stored.config
        if adapter.prefix_projection and not config.projection:
            raise ConfigError(
                f"--prefix_path {adapter.prefix_path} holds keys and values without a network that makes them: "
                "drop --prefix_projection"
            )
    else:
        config = PrefixConfig(
            adapter.num_prefix_tokens,
            adapter.prefix_projection,
            adapter.prefix_projection_hidden_size,
            adapter.prefix_dropout,
        )
    if config.projection:  # also one that a stored prefix brings along
        check_projection(options.parallel)
    apply_prefix(loaded.model, config, seed)
    values = loaded.values
    if values is not None:

        def fresh(name: str, where: Placement) -> Tensor:
            return initial_values(name, where.box, where.shape, shape, seed)

        values = with_prefix(values, stored.read if stored is not None else fresh)
    elif stored is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in prefix_state(loaded.model).items()}
        load_prefix_state(loaded.model, whole_state(stored, shapes))
    trained, total = sum(tensor.numel() for tensor in prefix_state(loaded.model).values()), shape.num_parameters()
    size = f", made by a network of width {config.projection_size or shape.hidden_size}" if config.projection else ""
    print(
        f"prefix: {config.length} keys and values a layer{size}, {trained:,} trained parameters "
        f"({trained / total:.2%} of {total:,})"
    )
    return PrefixWeights(loaded.model, config, published_name(base_model), options.quantization.quantize_base), values
