"""Forward passes through all stages of a pipeline: for scoring and for generating text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.config.layout import Coordinates
from arriero.models.llama import LayerInputs
from arriero.parallel.parallelize import Parallel


@torch.no_grad()
def relay(parallel: Parallel, inputs: Sequence[tuple[Tensor, LayerInputs]]) -> list[Tensor]:
    """Every process runs its stages over all micro-batches.

    Args:
        inputs: of each micro-batch, its token ids (B, S) int64 and what the layers take besides; the same in every stage.

    Returns:
        The hidden states (B, S, hidden) of each micro-batch after the last stage, where that is in this process; else [].
    """
    layout, at = parallel.processes.layout, parallel.processes.at

    def rank_of(stage: int) -> int:
        return layout.rank(Coordinates(layout.process_of(stage), at.dp_replicate, at.dp_shard, at.cp, at.tp))

    own = parallel.processes.rank
    group = parallel.processes.group("pp")
    split = parallel.tensor.size if parallel.tensor is not None and parallel.tensor.split else 1
    sent: list[tuple[dist.Work | None, Tensor]] = []  # a tensor must live until it is sent
    outputs: list[Tensor] = []
    width = parallel.shapes["model.norm.weight"][0]
    # a micro-batch at a time: where two processes hold alternate stages, each receives before it sends the next
    for input_ids, layer_inputs in inputs:
        output = input_ids
        for stage in parallel.stages:
            if not stage.is_first and rank_of(stage.index - 1) != own:
                rows, tokens = input_ids.shape
                dtype = stage.dtype
                output = torch.empty(rows, tokens // split, width, dtype=dtype, device=input_ids.device)
                dist.recv(output, rank_of(stage.index - 1), group=group)
            output = stage(output, layer_inputs)
            if not stage.is_last and rank_of(stage.index + 1) != own:
                output = output.contiguous()
                sent.append((dist.isend(output, rank_of(stage.index + 1), group=group), output))
        outputs.append(output)
    for work, _ in sent:
        if work is not None:
            work.wait()
    return outputs if parallel.stages[-1].is_last else []
