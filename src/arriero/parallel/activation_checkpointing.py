"""Recompute activations in the backward pass instead of keeping them (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_activation_checkpointing(layers: Iterable[nn.Module], granularity: str = "full") -> None:
    """Keep only the input of each decoder layer ("full") or of each attention block ("core_attn"), in place.

    Parameter names do not change.
    """
    for layer in layers:
        module = layer if granularity == "full" else layer.get_submodule("self_attn")
        module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # a function of our own, not a partial of torch's: torch.compile does not look into torch's files
    def run(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False)

    return run
