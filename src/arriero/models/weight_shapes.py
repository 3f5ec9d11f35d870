"""Which tensors a model folder stores."""

from __future__ import annotations

import torch

from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

HEAD = "lm_head.weight"


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights that a model stores, in the model's order; a tied output head is not stored."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes
