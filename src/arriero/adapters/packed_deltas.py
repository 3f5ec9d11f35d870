"""What many low-rank adapters add to one linear layer's output, each for its own rows of a packed batch.

As in S-LoRA (Sheng et al. 2023, arXiv:2311.03285) the base product is computed once for all rows, and what an adapter adds is
computed beside it, so that one base serves them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arriero.adapters.dora import MAGNITUDE
from arriero.adapters.lora_config import LoRAConfig
from arriero.errors import ConfigError
from arriero.models.products import is_plain_linear
from arriero.quantization.linear import QuantizedLinear

# Of so few rows the products of several adapters are joined: each row then meets all of their ranks, its own are kept.
JOINED_ROWS = 64

_LAYER = re.compile(r"model\.layers\.(\d+)\.((?:self_attn|mlp)\.\w+)")

Place = tuple[int, str]  # a layer's number, and a linear layer in it: "self_attn.q_proj"


@dataclass(frozen=True)
class LayerDelta:
    """What an adapter makes of a linear layer's output y: ``y * factor + shift + (x A^T) B``.

    Attributes:
        a: (rank, in), or None where only a bias differs.
        b: (rank, out): the transposed B, with the scaling (and DoRA's factor) in it.
        factor: (out,), DoRA's: the length that a row of the sum is to have over the length that it has.
        shift: (out,): what takes the place of the base's bias, less that bias as `factor` has scaled it.
    """

    a: Tensor | None
    b: Tensor | None
    factor: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0] if self.a is not None else 0

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.a, self.b, self.factor, self.shift) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


LayerDeltas = Mapping[Place, LayerDelta]


def place_of(layer: str) -> Place | None:
    """Where a linear layer with this full name is; None for one outside the decoder layers."""
    match = _LAYER.fullmatch(layer)
    return (int(match[1]), match[2]) if match else None


@torch.no_grad()
def layer_deltas(
    model: nn.Module, config: LoRAConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[Place, LayerDelta]:
    """An adapter, as read and checked against the model, in the form in which it is applied.

    Args:
        model: the base, for the rows' lengths of DoRA and for biases.
        state: named as in the adapted model.

    Raises:
        ConfigError: for what cannot be added to a layer's output: an adapter of the output head, or DoRA over a layer whose
            weight is not known as a matrix. It names the layer.
    """
    found = {}
    for layer in dict.fromkeys(name.partition(".lora_")[0].removesuffix(".bias") for name in state):
        place = place_of(layer)
        if place is None:
            raise ConfigError(f"{layer} is adapted, and only linear layers of the decoder can be at request time")
        base = model.get_submodule(layer)
        a, b = state.get(f"{layer}.lora_A.weight"), state.get(f"{layer}.lora_B.weight")
        factor = None
        if a is not None and b is not None:
            a, b = a.to(device, torch.float32), b.to(device, torch.float32).t() * config.of_layer(layer).scaling
            lengths = state.get(f"{layer}.{MAGNITUDE}")
            if lengths is not None:
                whole = _weight(base, layer).addmm(b.t(), a)
                factor = lengths.to(device, torch.float32) / torch.linalg.vector_norm(whole, dim=1)
                b = b * factor
        shift = _shift(base.bias, state.get(f"{layer}.bias"), factor, device)  # type: ignore[arg-type]
        tensors = (None if t is None else t.to(dtype).contiguous() for t in (a, b, factor, shift))
        found[place] = LayerDelta(*tensors)
    return found


def _shift(base: Tensor | None, own: Tensor | None, factor: Tensor | None, device: torch.device) -> Tensor | None:
    if base is None or (own is None and factor is None):
        return None
    before = base.to(device, torch.float32)
    after = before if own is None else own.to(device, torch.float32)
    return after - (before if factor is None else before * factor)


def _weight(base: nn.Module, layer: str) -> Tensor:
    """(out, in), fp32."""
    if is_plain_linear(base):
        return base.weight.float()
    if isinstance(base, QuantizedLinear):
        return base.dequantized(torch.float32)
    raise ConfigError(f"{layer} is a {type(base).__name__} in the model, to which no DoRA adapter can be added")


class JoinedDeltas:
    """The adapters of a batch with their ranks side by side, a layer at a time; made of them when a layer first asks."""

    def __init__(self, adapters: Sequence[LayerDeltas]) -> None:
        self._adapters = adapters
        self._layers: dict[Place, tuple[tuple[int, ...], Tensor, Tensor] | None] = {}

    @property
    def nbytes(self) -> int:
        """What the copies take."""
        return sum(found[1].nbytes + found[2].nbytes for found in self._layers.values() if found is not None)

    def layer(self, place: Place) -> tuple[tuple[int, ...], Tensor, Tensor] | None:
        """The rank of each adapter in this layer, all A, (sum of ranks, in), and all B, (sum of ranks, out)."""
        if place not in self._layers:
            parts = [adapter.get(place) for adapter in self._adapters]
            pairs = [(p.a, p.b) for p in parts if p is not None and p.a is not None and p.b is not None]
            ranks = tuple(part.rank if part is not None else 0 for part in parts)
            joined = (ranks, torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])) if pairs else None
            self._layers[place] = joined
        return self._layers[place]


@dataclass(frozen=True)
class _Rows:
    """One adapter's rows: a slice where they are neighbours, else their numbers."""

    where: slice | Tensor
    deltas: LayerDeltas


class PackedDeltas:
    """The adapters of one step: `add` is called for each linear layer after the base's product.

    Rows without an adapter are left as they are.
    """

    def __init__(
        self,
        adapters: Sequence[LayerDeltas],
        owners: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
        joined: JoinedDeltas | None = None,
    ) -> None:
        """
        Args:
            owners: the place in `adapters` of each run of rows; -1 where it has none.
            counts: of rows of each run.
            joined: of `adapters`, where their products are to be computed as one.
        """
        self._joined, self._device = joined, device
        self._owners = [owner for owner, count in zip(owners, counts, strict=True) for _ in range(count)]
        rows: list[list[int]] = [[] for _ in adapters]
        for row, owner in enumerate(self._owners):
            if owner >= 0:
                rows[owner].append(row)
        self._rows = [_Rows(_where(own, device), deltas) for own, deltas in zip(rows, adapters, strict=True)]
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def add(self, layer: int, name: str, x: Tensor, y: Tensor) -> None:
        """Let y, (T, out), which holds the base's output for x, (T, in), become the adapters', in place.

        Args:
            y: may be a slice of the columns of a wider output.
        """
        place = (layer, name)
        joined = self._joined.layer(place) if self._joined is not None else None
        for own in self._rows:
            delta = own.deltas.get(place)
            if delta is not None and (joined is None or delta.factor is not None or delta.shift is not None):
                _add(delta, own.where, x, y, products=joined is None)
        if joined is not None:
            ranks, a, b = joined
            y.addmm_(F.linear(x, a).masked_fill_(self._foreign(ranks), 0.0), b)

    def _foreign(self, ranks: tuple[int, ...]) -> Tensor:
        """(T, sum of ranks): what of each row's products is another adapter's."""
        found = self._masks.get(ranks)
        if found is None:
            columns = torch.tensor([number for number, rank in enumerate(ranks) for _ in range(rank)])
            found = (torch.tensor(self._owners)[:, None] != columns).to(self._device)
            self._masks[ranks] = found
        return found


def _where(rows: list[int], device: torch.device) -> slice | Tensor:
    if rows and rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, dtype=torch.long, device=device)


def _add(delta: LayerDelta, where: slice | Tensor, x: Tensor, y: Tensor, *, products: bool) -> None:
    part = y[where]  # a view of neighbours, a copy of others
    if delta.factor is not None:
        part.mul_(delta.factor)
    if delta.shift is not None:
        part.add_(delta.shift)
    if products and delta.a is not None and delta.b is not None:
        part.addmm_(F.linear(x[where], delta.a), delta.b)
    if isinstance(where, Tensor):
        y[where] = part
