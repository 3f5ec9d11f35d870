"""Linear layers as generation computes them: those of one input as one product, with what follows it where a kernel can.

On a CPU the weights may be held once more in the layout of oneDNN's kernels, which then need not rearrange them in every call
and apply SiLU, products and sums to a result while it is in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.models.products import is_plain_linear
from arriero.onednn import has_onednn
from arriero.processor_info import features, has_units_that_mkl_leaves, is_intel

# oneDNN also takes weights in the ordinary layout: it then copies each part of them while it computes, which many rows pay for,
# and on processors whose units MKL leaves unused any number of them.
MANY_ROWS = 32
# For weights in its own layout its kernels for fewer rows are no faster, on Zen 4 slower; in the ordinary layout one row takes
# three quarters of the time of four (docs/performance.md).
FEW_ROWS = 4
# Linux' names of what multiplies bf16 numbers, on x86 and on ARM; elsewhere they are emulated.
BF16_PRODUCTS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


def kernel_rows(rows: int) -> int:
    """How many rows oneDNN is given for so many: `FEW_ROWS` at least, and beyond `MANY_ROWS` one of 16 sizes to each doubling.

    It compiles a kernel for each number of rows, about 0.6 MiB that it keeps. A server, whose steps have any number of tokens,
    grew by hundreds of MiB. What is computed in vain is at most a 16th.
    """
    if rows <= MANY_ROWS:
        return max(rows, FEW_ROWS)
    step = 1 << ((rows - 1).bit_length() - 5)
    return -(-rows // step) * step


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's kernels can be called for a device and a number format, and are fast."""
    return (
        device.type == "cpu"
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and not BF16_PRODUCTS.isdisjoint(features())))
        and has_onednn()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def is_for_mkl(rows: int, dtype: torch.dtype) -> bool:
    """Whether MKL, which torch's own products are, reads the weights for so few rows faster than oneDNN's kernels do.

    On Intel's processors it does, up to 1.8 times; on AMD's oneDNN's are faster (docs/performance.md).
    """
    return rows < FEW_ROWS and dtype == torch.float32 and _prefers_mkl()


@cache
def _prefers_mkl() -> bool:
    return torch.backends.mkl.is_available() and is_intel()  # type: ignore[no-untyped-call]


def is_plain(*layers: nn.Module) -> bool:
    """Whether these are linear layers and nothing more, all of one number format, so that they can be computed as one."""
    return (
        all(is_plain_linear(x) and not x._forward_hooks and not x._forward_pre_hooks for x in layers)
        and len({(layer.weight.dtype, layer.weight.device) for layer in layers}) == 1
    )


def filled(x: Tensor) -> Tensor:
    """(T, ...) with zeros behind, so that it has `kernel_rows`; as it is where it `is_for_mkl`."""
    more = 0 if is_for_mkl(len(x), x.dtype) else kernel_rows(len(x)) - len(x)
    return torch.cat((x, x.new_zeros(more, *x.shape[1:]))) if more else x


class PackedLinear:
    """Plain linear layers of one input as one product: (T, in) -> (T, sum of out), in their order.

    Without a copy the layers' weights become slices of one tensor: parameters as before, which can be trained and saved.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, copy: bool) -> None:
        """
        Args:
            layers: `is_plain` ones.
            copy: hold the weights once more for oneDNN's kernels, where they can be called.
        """
        self._layers = layers
        weights = [layer.weight for layer in layers]
        self._kernels = has_kernels(weights[0].device, weights[0].dtype)
        self._copied = copy and self._kernels
        left = weights[0].dtype == torch.float32 and has_units_that_mkl_leaves()
        self._least_rows = 1 if left else MANY_ROWS
        if self._copied:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(_joined(weights), None)
        else:
            self._weight = _joined(weights)
            if len(weights) > 1:
                for weight, part in zip(weights, self._weight.split([len(w) for w in weights]), strict=True):
                    weight.data = part
            self._transposed = self._weight.t()
        self._bias: Tensor | None = None
        if any(layer.bias is not None for layer in layers):
            zeros = weights[0].new_zeros
            self._bias = torch.cat([zeros(len(x.weight)) if x.bias is None else x.bias.detach() for x in layers])

    def fuses(self, x: Tensor) -> bool:
        """Whether for an input of so many rows what follows the product is best computed with it."""
        if self._copied:
            return not is_for_mkl(len(x), x.dtype)
        return self._kernels and len(x) >= (MANY_ROWS if torch.compiler.is_compiling() else self._least_rows)

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        if self.fuses(x):
            return self._pointwise(x, "none")
        if not self._copied:
            return F.linear(x, self._weight, self._bias)
        found = [F.linear(x, layer.weight, layer.bias) for layer in self._layers]  # the copy is for oneDNN alone
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        return self._pointwise(x, "swish") if self.fuses(x) else F.silu(self(x))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product, times `other` of its shape, element by element."""
        return self._binary(x, other, "mul") if self.fuses(x) else self(x).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus `other` of its shape, which may hold the result."""
        if self.fuses(x):
            return self._binary(x, other, "add")
        if self._copied:
            return other.add_(self(x))
        other.addmm_(x, self._transposed)
        return other if self._bias is None else other.add_(self._bias)

    def _filled(self, x: Tensor) -> Tensor:
        return filled(x) if self._copied or len(x) >= FEW_ROWS else x

    def _pointwise(self, x: Tensor, function: str) -> Tensor:
        x, rows = self._filled(x), len(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, function, [], "")
        return y if len(y) == rows else y[:rows]

    def _binary(self, x: Tensor, other: Tensor, function: str) -> Tensor:
        x, other, rows = self._filled(x), self._filled(other), len(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, function)
        return y if len(y) == rows else y[:rows]


class PackedGate:
    """``silu(gate(x)) * up(x)`` of two plain linear layers: (T, in) -> (T, out)."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, *, copy: bool, join: bool = True) -> None:
        """
        Args:
            copy: as of `PackedLinear`.
            join: without a copy, the two weights become slices of one tensor.
        """
        copy = copy and has_kernels(gate.weight.device, gate.weight.dtype)
        self._both = PackedLinear((gate, up), copy=False) if join and not copy else None
        self._gate, self._up = PackedLinear((gate,), copy=copy), PackedLinear((up,), copy=copy)

    def __call__(self, x: Tensor) -> Tensor:
        if self._up.fuses(x):
            return self._up.times(x, self._gate.silu(x))
        gate, up = self.products(x)
        return F.silu(gate).mul_(up)

    def products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gate(x) and up(x), which may lie in one tensor."""
        if self._both is None:
            return self._gate(x), self._up(x)
        gate, up = self._both(x).chunk(2, dim=-1)
        return gate, up


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """(sum of out, in): no copy of a single one, nor of those that lie one behind the other already."""
    first = weights[0].detach()
    if len(weights) == 1:
        return first
    rows = sum(map(len, weights))
    ends, at = [], first.data_ptr()
    for weight in weights:
        ends.append(weight.is_contiguous() and weight.data_ptr() == at)
        at += weight.nbytes
    if all(ends) and len({weight.untyped_storage().data_ptr() for weight in weights}) == 1:
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    return torch.cat([weight.detach() for weight in weights])
