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
from arriero.formats.quantized import QuantizedFolder, is_quantized
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.source import ModelSource
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import HEAD
from arriero.quantization.schemes import IntegerWeights


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
    return WeightSource(opened, quantized_folder(model), bits if mixed else {})


class WeightSource:
    """Reads the tensors of a model as they are asked for.

    Attributes:
        config: of the model.
        layers: names of the layers whose integers are kept where a format allows it.
    """

    def __init__(
        self, source: ModelSource, quantized: QuantizedFolder | None = None, bits: Mapping[str, int] | None = None
    ) -> None:
        """
        Args:
            quantized: the same folder, if its layers are quantized.
            bits: of the stored numbers of matrices, where they matter.
        """
        self.config = source.config
        self._source = source
        self._scheme: IntegerWeights | None = None
        self._quantized, self._bits = quantized, bits or {}
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

    def blocks(self, names: Sequence[str], form: BlockFormat) -> BlockWeight:
        """Weights one after the other, rounded, or with the integers that they have already; in 8 bits instead of 4 if one of
        them is stored in more than 4.

        Raises:
            ConfigError: if the integers do not fit the format.
        """
        if form.bits == 4 and self.wider(names):
            form = form.wide
        parts = [self._blocks(name, form) for name in names]
        return stack(parts) if len(parts) > 1 else parts[0]

    def wider(self, names: Sequence[str]) -> bool:
        """Whether one of them is stored in more than 4 bits, where that matters."""
        return any(self._bits.get(name, 0) > 4 for name in names)

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale of the integers that are kept; None: all of an output, or there are none."""
        return None if self._scheme is None else self._scheme.integer.group_size

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
            return quantize(self.load(name), form)
        if self._scheme.integer.bits != form.bits or not form.symmetric:
            raise ConfigError(
                f"the model's weights are int{self._scheme.integer.bits} already, without zero points: "
                f"export it as int{self._scheme.integer.bits}, symmetric, or export the original weights"
            )
        stored = {part: self._quantized.read(f"{layer}.{part}") for part in self._scheme.weight_names}
        return from_integers(self._scheme.integers(stored), stored["weight_scale"], form)
