"""What `prefix_config.json` says of a prefix's size, and where in its columns the keys and values of a layer are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.models.config import LlamaConfig
from arriero.models.config_reader import ConfigReader

EMBEDDING = "0.weight"
KINDS = ("key", "value")


@dataclass(frozen=True)
class PrefixShape:
    """The size of a prefix.

    Attributes:
        length: its virtual tokens.
        heads: key-value heads of a layer.
        head_dim: of each.
        layers: of the model.
        hidden_size: of the model.
        projection_size: hidden units of the network that makes the prefix; None: there is none.
    """

    length: int
    heads: int
    head_dim: int
    layers: int
    hidden_size: int
    projection_size: int | None

    @classmethod
    def read(cls, reader: ConfigReader) -> PrefixShape:
        """Of `prefix_config.json`.

        Raises:
            FormatError: for a key that is missing, or a number that is none.
        """
        queries, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
        heads = reader.integer("multi_query_group_num", queries)
        numbers = {"num_prefix_tokens": reader.integer("num_prefix_tokens"), "multi_query_group_num": heads}
        numbers |= {
            "num_attention_heads": queries,
            "hidden_size": hidden,
            "num_hidden_layers": reader.integer("num_hidden_layers"),
        }
        projection = reader.boolean("prefix_projection", False)
        size = reader.integer("prefix_projection_hidden_size", hidden) if projection else None
        numbers |= {} if size is None else {"prefix_projection_hidden_size": size}
        for key, value in numbers.items():
            if not 1 <= value < 2**31:
                raise FormatError(f"{reader.source}: {key} must be a number of at least 1, got {value}")
        if hidden % queries:
            raise FormatError(f"{reader.source}: hidden_size {hidden} is no multiple of num_attention_heads {queries}")
        return cls(numbers["num_prefix_tokens"], heads, hidden // queries, numbers["num_hidden_layers"], hidden, size)

    @property
    def width(self) -> int:
        """Of a layer's keys, or of its values."""
        return self.heads * self.head_dim

    @property
    def output_tensors(self) -> tuple[str, ...]:
        """The stored tensors whose last axis is the columns of the prefix."""
        return (EMBEDDING,) if self.projection_size is None else ("3.weight", "3.bias")

    def stored(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole stored tensors, in Paddle's layout."""
        columns = 2 * self.layers * self.width
        if self.projection_size is None:
            return {EMBEDDING: (self.length, columns)}
        return {
            EMBEDDING: (self.length, self.width),
            "1.weight": (self.width, self.projection_size),
            "1.bias": (self.projection_size,),
            "3.weight": (self.projection_size, columns),
            "3.bias": (columns,),
        }

    def columns(self) -> dict[tuple[int, str], slice]:
        """Where the keys and values of each layer lie."""
        return {
            (layer, kind): slice(
                (number * self.layers + layer) * self.width, (number * self.layers + layer + 1) * self.width
            )
            for layer in range(self.layers)
            for number, kind in enumerate(KINDS)
        }

    def order_of_processes(self, tp: int) -> Tensor:
        """For each column (2 * layers, heads, head size) of the prefix, the column in which the processes keep it."""
        columns = torch.arange(2 * self.layers * self.width)
        return columns.view(tp, 2 * self.layers, self.heads // tp, self.head_dim).transpose(0, 1).reshape(-1)

    def check_model(self, source: str, model: LlamaConfig) -> None:
        """Raises FormatError for a model that this prefix is not for."""
        found = (self.layers, self.heads, self.head_dim, self.hidden_size)
        wanted = (model.num_hidden_layers, model.num_key_value_heads, model.head_dim, model.hidden_size)
        if found != wanted:
            words = ["{} layers, {} key-value heads of {}, hidden size {}".format(*row) for row in (found, wanted)]
            raise FormatError(
                f"{source}: is for a model of {words[0]}; the base model has {words[1]}: give the one it was for"
            )

    def check_degree(self, tp: int) -> None:
        """Raises FormatError for a degree of tensor parallelism that the prefix cannot be cut into."""
        for what, size in (
            ("prefix tokens", self.length),
            ("heads", self.heads),
            ("hidden units", self.projection_size or tp),
        ):
            if size % tp:
                raise FormatError(f"tensor_parallel_degree {tp} does not divide the {size} {what} of the prefix")
