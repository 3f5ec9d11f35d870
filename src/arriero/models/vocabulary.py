"""Another number of rows for embedding and output head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from arriero.models.llama import LlamaForCausalLM
from arriero.models.products import Linear

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def resize_vocabulary(model: LlamaForCausalLM, rows: int) -> None:
    """Give a model an embedding and a head of so many rows, without values, in place; tied ones stay one.

    They are where the embedding was (the meta device, say) and of its dtype.
    """
    model.config = replace(model.config, vocab_size=rows)
    old, width = model.model.embed_tokens.weight, model.config.hidden_size
    with torch.device("meta"):  # without drawing values
        embedding, head = nn.Embedding(rows, width), Linear(width, rows, bias=False)
    model.model.embed_tokens, model.lm_head = embedding.to(old.dtype), head.to(old.dtype)
    for module in (model.model.embed_tokens, model.lm_head):
        module.to_empty(device=old.device).train(model.training).requires_grad_(old.requires_grad)
    model.tie_weights()
