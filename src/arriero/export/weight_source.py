"""The weights that a graph is made of, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from arriero.errors import ConfigError
from arriero.export.block_weights import BlockFormat, BlockWeight, from_integers, quantize, stack
from arriero.export.gguf_bits import layer_bits, usual_bits
from arriero.export.weight_names import EMBEDDING
from arriero.formats.low_rank import LowRank, stacked
from arriero.formats.quantized import QuantizedFolder, is_quantized
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.source import ModelSource
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import HEAD
from arriero.quantization.schemes import IntegerWeights

_LAYERS = "model.layers."
# An adapter of a rank above so many inputs of a matrix is rounded with it, in 8 bits.
_RANKS = 4


def quantized_folder(model: str | Path | ModelSource) -> QuantizedFolder | None:
    """A model folder whose weights are quantized, to be read as they are stored."""
    if isinstance(model, ModelSource):
        return None
    config = LlamaConfig.from_file(model)
    return QuantizedFolder(Path(model), config) if is_quantized(config) else None


def integer_source(opened: ModelSource, model: str | Path | ModelSource) -> WeightSource:
    """The weights of a model that are to be integers: those that it has already stay what they are.

    Args:
        model: what was opened.
    """
    bits = layer_bits(opened)
    mixed = usual_bits(bits) == 4  # a matrix of more bits has them for a reason
    return WeightSource(opened, quantized_folder(model), bits if mixed else {}, opened.updates)


def adapter_words(source: WeightSource) -> str:
    """What a manifest says of an adapter that stays beside weights of 4 bits."""
    ranks = source.updated
    return f"; beside {len(ranks)} matrices an adapter of rank {max(ranks.values())}" if ranks else ""


class WeightSource:
    """Reads the tensors of a model as they are asked for.

    Attributes:
        config: of the model.
        layers: names of the layers whose integers are kept where a format allows it.
    """

    def __init__(
        self,
        source: ModelSource,
        quantized: QuantizedFolder | None = None,
        bits: Mapping[str, int] | None = None,
        updates: Mapping[str, LowRank] | None = None,
    ) -> None:
        """
        Args:
            quantized: the same folder, if its layers are quantized.
            bits: of the stored numbers of matrices, where they matter.
            updates: what an adapter added to weights, where it is to stay beside those of 4 bits.
        """
        self.config = source.config
        self._source = source
        self._scheme: IntegerWeights | None = None
        self._quantized, self._bits = quantized, bits or {}
        kept = (updates or {}).items()
        self._updates = {name: update.balanced() for name, update in kept if name.startswith(_LAYERS)}
        if quantized is not None and isinstance(quantized.scheme, IntegerWeights):
            self._scheme = quantized.scheme
        self.layers = frozenset(quantized.layers) if quantized is not None and self._scheme is not None else frozenset()

    @property
    def names(self) -> Collection[str]:
        """Of all stored weights."""
        return self._source.tensors.keys()

    def load(self, name: str) -> Tensor:
        """A weight as it is stored, or dequantized; a tied head is the embedding."""
        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        value = self._source.tensors[name]
        return value.load() if isinstance(value, LazyTensor) else value

    def rows(self, names: Sequence[str]) -> Tensor:
        """Weights or biases one after the other, fp32."""
        parts = [self.load(name).float() for name in names]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def update(self, names: Sequence[str]) -> LowRank | None:
        """What an adapter added to these weights, one after the other, and what is not in their 4 bits.

        An adapter is small beside the steps between numbers of 4 bits: rounded with a weight, most of it would be lost, and
        all of it where the weight lay on such a number before.
        """
        if not self._updates:
            return None
        return stacked(
            [self._updates.get(name) for name in names], [self._source.tensors[name].shape[0] for name in names]
        )

    def without_update(self, name: str) -> Tensor:
        """A weight as it was before the adapter, fp32."""
        value = self.load(name).float()
        return value - self._updates[name].whole() if name in self._updates else value

    def blocks(self, names: Sequence[str], form: BlockFormat) -> BlockWeight:
        """Weights one after the other, rounded, or with the integers that they have already; in 8 bits instead of 4 where they
        are `wider`. Those of 4 bits are without the `update` of an adapter.

        Raises:
            ConfigError: if the integers do not fit the format.
        """
        if form.bits == 4 and self.wider(names):
            form = form.wide
        parts = [self._blocks(name, form) for name in names]
        return stack(parts) if len(parts) > 1 else parts[0]

    def wider(self, names: Sequence[str]) -> bool:
        """Whether 8 bits take the place of 4: where the model stores one of them in more, or an adapter has so large a rank
        that its factors would be no smaller."""
        updates = [self._updates[name] for name in names if name in self._updates]
        large = bool(updates) and _RANKS * sum(update.rank for update in updates) > updates[0].down.shape[1]
        return large or any(self._bits.get(name, 0) > 4 for name in names)

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale of the integers that are kept; None: all of an output, or there are none."""
        return None if self._scheme is None else self._scheme.integer.group_size

    @property
    def updated(self) -> dict[str, int]:
        """The weights that an adapter added something to, which `update` tells of, and the rank of each."""
        return {name: update.rank for name, update in self._updates.items() if update.rank}

    @property
    def wider_count(self) -> int:
        """Of matrices that are stored in more than 4 bits, where that matters."""
        return sum(count > 4 for count in self._bits.values())

    def has_integers(self, names: Sequence[str]) -> bool:
        """Whether these are integers already, all or some of them."""
        return any(name.removesuffix(".weight") in self.layers for name in names)

    def _blocks(self, name: str, form: BlockFormat) -> BlockWeight:
        layer = name.removesuffix(".weight")
        if layer not in self.layers or self._quantized is None or self._scheme is None:
            return quantize(self.without_update(name) if form.bits == 4 else self.load(name), form)
        if self._scheme.integer.bits != form.bits or not form.symmetric:
            raise ConfigError(
                f"the model's weights are int{self._scheme.integer.bits} already, without zero points: "
                f"export it as int{self._scheme.integer.bits}, symmetric, or export the original weights"
            )
        stored = {part: self._quantized.read(f"{layer}.{part}") for part in self._scheme.weight_names}
        return from_integers(self._scheme.integers(stored), stored["weight_scale"], form)
