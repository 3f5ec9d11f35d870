"""Memory and values for the parameters that this process holds of a model built on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arriero.formats.parts import Placement
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.placement import local_tensors, placements

# name (as stored), placement -> the box of the whole tensor
Values = Callable[[str, Placement], Tensor]


@torch.no_grad()
def materialize(model: LlamaForCausalLM, device: torch.device, values: Values) -> None:
    """Allocate what this process holds and fill it, one tensor at a time."""
    embedding, head = model.model.embed_tokens, model.lm_head
    tied = embedding is not None and head is not None and head.weight is embedding.weight
    parallel = getattr(model, "parallel", None)
    offloaded = parallel is not None and parallel.processes.layout.offload
    # by the stages, which FSDP knows: it must see the memory of what it shares out, to pad the shards that are uneven
    outside = [model.prefix_encoder] if model.prefix_encoder is not None else []
    for module in [*parallel.stages, *outside] if parallel is not None else [model]:
        module.to_empty(device="cpu" if offloaded else device)
    if offloaded:
        model.model.rotary.reset(device)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    held = local_tensors(model)
    for name, placement in placements(model).items():
        if held[name].numel():
            held[name].copy_(values(placement.stored_as or name, placement))
