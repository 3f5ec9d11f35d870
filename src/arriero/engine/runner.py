"""What computes a step's tokens: one interface for a torch model and, later, exported bundles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor

from arriero.adapters.prefix import PrefixKV, prefix_kv
from arriero.models.llama import LlamaForCausalLM
from arriero.models.paged_cache import PagedCache, Run
from arriero.parallel.generation import SharedModel

# The share of the free memory that keys and values may take.
CACHE_MEMORY_SHARE = 0.4
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Work:
    """One sequence's part of a step.

    Attributes:
        tokens: to compute, (count) ids.
        start: the position of the first.
        blocks: the sequence's block table.
        logits: of how many of the last of them logits are wanted.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits: int


class Runner(Protocol):
    """A model with a key-value cache in blocks.

    Attributes:
        num_blocks, block_size: of the cache.
        vocab_size: ids are below it.
        context: positions that the model has, less those of a prefix.
        prefix_length: learned keys and values that come before every sequence; they take the first positions of its blocks.
        reuses: whether what one sequence computed can serve another that begins alike.
        device: of the logits.
    """

    num_blocks: int
    block_size: int
    vocab_size: int
    context: int
    prefix_length: int
    reuses: bool
    device: torch.device

    def agree(self, numbers: list[int]) -> list[int]:
        """One list for all processes that hold the model together: the least of each place."""
        ...

    def run(self, work: Sequence[Work]) -> Tensor:
        """Compute and store; returns the wanted logits, in the order of the work: (sum of `logits`, vocab_size)."""
        ...

    def begin(self, blocks: Sequence[int], start: int, end: int) -> None:
        """Store the prefix's keys and values of these positions for a sequence with these blocks."""
        ...


class TorchRunner:
    """A `Runner` of a torch model, on a CPU or a GPU, or of one that several processes hold (all of them call it alike)."""

    def __init__(
        self, model: LlamaForCausalLM | SharedModel, *, block_size: int = BLOCK_SIZE, max_tokens: int | None = None
    ) -> None:
        """
        Args:
            max_tokens: room for keys and values, in tokens; default: a share of the free memory. It is not taken until it
                is used, on a CPU.
        """
        self.model, self.block_size = model, block_size
        self.device = model.device if isinstance(model, SharedModel) else model.model.embed_tokens.weight.device
        # The embedding's, since adapters may stand in for any linear layer.
        self._dtype = model.dtype if isinstance(model, SharedModel) else model.model.embed_tokens.weight.dtype
        prefix: PrefixKV | None = model.prefix_kv() if isinstance(model, SharedModel) else prefix_kv(model)
        self._prefix = prefix
        self.prefix_length = prefix.length if prefix is not None else 0
        self.vocab_size = model.config.vocab_size
        self.context = model.config.max_position_embeddings - self.prefix_length
        scaling = model.config.rope_scaling
        self.reuses = scaling is None or scaling["rope_type"] != "dynamic"  # whose angles depend on the whole length
        if max_tokens is None:
            max_tokens = self.agree([self._room()])[0]
        self.num_blocks = max(1, max_tokens // block_size)
        self._cache = PagedCache(model.config, self.num_blocks, block_size, self._dtype, self.device)

    def agree(self, numbers: list[int]) -> list[int]:
        """See `Runner`."""
        return self.model.agree(numbers) if isinstance(self.model, SharedModel) else numbers

    def _room(self) -> int:
        """How many tokens' keys and values the memory holds."""
        cuda = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if cuda else psutil.virtual_memory().available
        return int(free * CACHE_MEMORY_SHARE) // PagedCache.bytes_of_block(self.model.config, 1, self._dtype)

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> Tensor:
        """See `Runner`."""
        view = self._cache.view([Run(item.start, len(item.tokens), item.blocks) for item in work])
        tokens = torch.tensor([[token for item in work for token in item.tokens]], device=self.device)
        hidden = self.model.hidden_states(tokens, view.positions, view.attention, view)[0]
        wanted: list[int] = []
        end = 0
        for item in work:
            end += len(item.tokens)
            wanted += range(end - item.logits, end)
        if len(wanted) < hidden.shape[0]:
            hidden = hidden[torch.tensor(wanted, dtype=torch.long, device=self.device)]
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    @torch.inference_mode()
    def begin(self, blocks: Sequence[int], start: int, end: int) -> None:
        """See `Runner`."""
        if self._prefix is not None:
            keys, values = (
                {layer: tensor[:, start:end] for layer, tensor in given.items()}
                for given in (self._prefix.keys, self._prefix.values)
            )
            self._cache.put(blocks, start, keys, values)
