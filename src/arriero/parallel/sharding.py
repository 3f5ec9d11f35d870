"""Data parallelism: copies and shards of the model by FSDP2 (Zhao et al. 2023, arXiv:2304.11277; ZeRO, arXiv:1910.02054)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from arriero.config.layout import Layout
from arriero.parallel.pipeline import Stage


def apply_sharding(stage: Stage, mesh: DeviceMesh, layout: Layout, reduce_dtype: torch.dtype, on_gpu: bool) -> None:
    """Share a stage's parameters out, layer by layer, in place.

    Gradients are sums over the processes: each loss is already divided by the number of labels in the whole step.

    Args:
        mesh: of the processes that hold the same parameters: (shard,) or (replicate, shard).
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if layout.offload else OffloadPolicy(),
    }
    for layer in stage.layers.values():
        fully_shard(layer, reshard_after_forward=layout.stage == 3, **options)
    # what is left (embedding, norm, head) is needed at both ends of the step; the head also after the forward pass
    fully_shard(stage, reshard_after_forward=False, **options)
    for module in sharded_modules(stage):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no sums with factors
        module.set_gradient_divide_factor(1.0)


def sharded_modules(stage: nn.Module) -> list[FSDPModule]:
    return [module for module in stage.modules() if isinstance(module, FSDPModule)]


def hold_gradients(stage: nn.Module, layout: Layout, *, last: bool) -> None:
    """Before each backward pass: whether its gradients are sent to the other processes now, or added up first.

    Stage 2 and 3 keep only a shard of the gradients, so they are sent each time; copies hear of the sum once.

    Args:
        last: whether it is the last micro-batch of the step.
    """
    if not isinstance(stage, FSDPModule):
        return
    stage.set_is_last_backward(last)
    if layout.stage >= 2:
        stage.set_requires_all_reduce(last)
    else:
        stage.set_requires_gradient_sync(last)
        stage.set_reshard_after_backward(last)
