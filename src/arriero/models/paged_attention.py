"""Attention of one new token for each of many sequences over a `PagedCache`, told by tensors alone.

What is computed depends on the tensors' values and not on anything in Python, so that a CUDA graph of a step serves all later
steps of its shape. Which kernel does it is chosen by `choose_kernel`, and nowhere else.

`Gathered` runs everywhere; `triton_attention.py` and `attention_libraries.py` have the others.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache as once
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.errors import ConfigError
from arriero.models.config import LlamaConfig
from arriero.models.paged_cache import PagedCache

logger = logging.getLogger(__name__)

KernelName = Literal["triton", "flashinfer", "flash_attn", "varlen", "gather"]

# A cache that is attended to by tables has so many blocks more, at its end: one for the rows that pad a step, one of zeros.
SPARE_BLOCKS = 2
# FlashAttention 2 reads pages of so many tokens, or multiples ("Paged KV cache block size must be divisible by 256").
FLASH_BLOCK_SIZE = 256


@dataclass(frozen=True)
class Table:
    """Where each of R sequences lies and what is new of it; R and W are the step's shape.

    Attributes:
        tokens, positions: (R,) int64, of the new tokens.
        blocks: (R, W) int64, of each sequence, in order; behind them, any that the cache has.
        slots: (R,) int64, where the new keys and values go.
        lengths: (R,) int32, of the sequences with their new tokens.
    """

    tokens: Tensor
    positions: Tensor
    blocks: Tensor
    slots: Tensor
    lengths: Tensor
    _seen: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, numbers: Tensor, block_size: int) -> Table:
        """
        Args:
            numbers: (R, 2 + W) int64, in each row a token, its position, and blocks.
        """
        tokens, positions, blocks = numbers[:, 0], numbers[:, 1], numbers[:, 2:]
        block = blocks.gather(1, (positions // block_size)[:, None])[:, 0]
        slots = block * block_size + positions % block_size
        return cls(tokens, positions, blocks, slots, (positions + 1).int())

    def seen(self, cache: PagedCache, sliding_window: int | None) -> tuple[Tensor, Tensor]:
        """The slots that hold what the rows may see, (R * W * block_size,), and what of it they see, (R, 1, 1, W * block_size).

        Zeros are read for what they do not see: there may be anything, and a weight of 0 does not make a number of NaN.
        """
        if sliding_window not in self._seen:  # in all layers of a step the same
            size = cache.block_size
            slots = (self.blocks[:, :, None] * size + torch.arange(size, device=self.blocks.device)).flatten(1)
            at = torch.arange(slots.shape[1], device=slots.device)
            seen = at < self.lengths[:, None]
            if sliding_window is not None:
                seen = seen & (at >= self.lengths[:, None] - sliding_window)
            zeros = (cache.num_blocks - 1) * size
            self._seen[sliding_window] = slots.where(seen, zeros).flatten(), seen[:, None, None]
        return self._seen[sliding_window]


class DecodeKernel(Protocol):
    """How the queries of a step attend.

    Attributes:
        name: what it is called by.
        reads_whole_tables: whether it costs more where a table is wider than its sequences need.
    """

    name: KernelName
    reads_whole_tables: bool

    def plan(self, blocks: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """What must be known in Python, before every step and outside of a graph: each row's blocks and its length."""
        ...

    def attend(
        self, query: Tensor, cache: PagedCache, layer: int, table: Table, scale: float, sliding_window: int | None
    ) -> Tensor:
        """(R, H, D) -> (R, H, D); the new keys and values are in the cache already."""
        ...


class DecodeView:
    """Stores the new tokens of a `Table` and lets each attend over its own sequence; a `PackedView`."""

    def __init__(self, cache: PagedCache, table: Table, kernel: DecodeKernel) -> None:
        self._cache, self._table, self._kernel = cache, table, kernel

    def sequence_lengths(self, device: torch.device) -> Tensor:
        """(1, R) int64."""
        return self._table.lengths.long().to(device)[None]

    def attend_packed(
        self, query: Tensor, new: Tensor, *, layer: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """See `PackedView`: (R, H, D) and (R, 2 KV, D) -> (R, H, D)."""
        cache, slots = self._cache, self._table.slots
        codes, scales = cache.format.encode(new)
        cache.layers[layer].index_copy_(1, slots, codes.transpose(0, 1))
        if cache.scales is not None and scales is not None:
            cache.scales[layer].index_copy_(1, slots, scales.transpose(0, 1))
        return self._kernel.attend(query, cache, layer, self._table, scale, sliding_window)


class Gathered:
    """Keys and values are copied out of their blocks and attended to by torch's own attention: for every device and format.

    It reads all W blocks of every row, so a table should be no wider than it must be.
    """

    name: KernelName = "gather"
    reads_whole_tables = True

    def plan(self, blocks: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Nothing has to be known."""

    def attend(
        self, query: Tensor, cache: PagedCache, layer: int, table: Table, scale: float, sliding_window: int | None
    ) -> Tensor:
        """See `DecodeKernel`."""
        slots, seen = table.seen(cache, sliding_window)
        rows, heads, size = query.shape
        codes = cache.layers[layer].index_select(1, slots)
        scales = cache.scales[layer].index_select(1, slots) if cache.scales is not None else None
        numbers = cache.format.decode(codes, scales, query.dtype)
        keys, values = numbers.view(len(numbers), rows, -1, size).transpose(0, 1).chunk(2, dim=1)
        # a group's heads are as good as queries of one head, and no kernel needs to know of groups
        own = query.reshape(rows, keys.shape[1], -1, size)
        attended = F.scaled_dot_product_attention(own, keys, values, attn_mask=seen, scale=scale)
        return attended.reshape(rows, heads, size)


def choose_kernel(device: torch.device) -> KernelName:
    """The fastest one of those that have been measured on a GPU (docs/gpu.md)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and _is_usable("triton"):
        return "triton"
    return "gather"


def block_size_of(name: KernelName, wanted: int) -> int:
    """The cache's block size for a kernel: the next one not below the wanted that it reads."""
    step = FLASH_BLOCK_SIZE if name in ("flash_attn", "varlen") else 1
    return -(-wanted // step) * step


def make_kernel(
    name: KernelName, cache: PagedCache, config: LlamaConfig, max_blocks: int, dtype: torch.dtype
) -> DecodeKernel:
    """The kernel of this name for a cache; `Gathered`, and a line that says why, where it does not compute what it should.

    Args:
        cache: its last blocks are overwritten.
        max_blocks: of a sequence.
        dtype: of the queries.

    Raises:
        ConfigError: there is none of this name, or it is not installed.
    """
    windows = [config.layer_sliding_window(layer) for layer in range(config.num_hidden_layers)]
    scale, heads = config.head_dim**-0.5, config.num_attention_heads
    if name == "gather":
        return Gathered()
    kernel: DecodeKernel
    try:
        if name == "triton":
            kernel = importlib.import_module("arriero.models.triton_attention").TritonAttention(cache)
        elif name in ("flashinfer", "flash_attn", "varlen"):
            libraries = importlib.import_module("arriero.models.attention_libraries")
            kernel = libraries.attention_by(name, cache, heads, scale, windows, max_blocks)
        else:
            raise ConfigError(
                f"paged attention by {name!r} is not to be had here: choose one of {', '.join(get_args(KernelName))}"
            )
    except ImportError as error:
        raise ConfigError(f"paged attention by {name} needs a package that cannot be imported: {error}") from None
    alike = all(agrees(kernel, cache, heads, scale, window, dtype) for window in dict.fromkeys(windows))
    return kernel if alike else Gathered()


@torch.no_grad()
def agrees(
    kernel: DecodeKernel,
    cache: PagedCache,
    heads: int,
    scale: float,
    sliding_window: int | None,
    dtype: torch.dtype,
) -> bool:
    """Whether a kernel gives what `Gathered` gives, on two sequences in the last blocks of a cache, which are overwritten.

    A kernel that raises gives nothing, and one line says why.
    """
    size, layer = cache.block_size, 0
    generator = torch.Generator().manual_seed(0)
    store = cache.layers[layer]
    numbers = torch.randn((len(store), 2 * size, store.shape[-1]), generator=generator).to(store.device, dtype)
    codes, scales = cache.format.encode(numbers)
    store[:, -2 * size :] = codes
    if cache.scales is not None and scales is not None:
        cache.scales[layer][:, -2 * size :] = scales
    first, second = cache.num_blocks - 1, cache.num_blocks - 2
    lengths = (size + 1, max(1, size - 1))
    rows = [[1, lengths[0] - 1, first, second], [1, lengths[1] - 1, second, first]]
    table = Table.of(torch.tensor(rows, device=cache.device), size)
    query = torch.randn((2, heads, store.shape[-1]), generator=generator).to(store.device, dtype)
    try:
        kernel.plan([row[2:] for row in rows], lengths)
        ours = kernel.attend(query, cache, layer, table, scale, sliding_window).float()
        wanted = Gathered().attend(query, cache, layer, table, scale, sliding_window).float()
    except Exception as error:  # whatever a library raises
        logger.warning(
            "%s cannot be used for paged attention: %s", type(kernel).__name__, str(error).partition("\n")[0]
        )
        return False
    tolerance = 0.02 if dtype != torch.float32 else 1e-5  # a few roundings of bf16
    if torch.allclose(ours, wanted, rtol=tolerance, atol=tolerance):
        return True
    logger.warning("%s gives other numbers than torch's attention and is not used", type(kernel).__name__)
    return False


@once
def _is_usable(package: str) -> bool:
    """Whether a package is installed; one that is broken is said to be."""
    if importlib.util.find_spec(package) is None:
        return False
    try:
        importlib.import_module(package)
    except (ImportError, OSError) as error:
        logger.warning("%s is installed and cannot be imported, so attention does without it: %s", package, error)
        return False
    return True
