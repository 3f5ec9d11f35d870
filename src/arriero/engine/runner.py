"""What computes a step's tokens with a torch model; see `work` for the interface."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Thread

import torch
from torch import Tensor

from arriero.adapters.packed_deltas import PackedDeltas
from arriero.adapters.prefix import PrefixKV, prefix_kv
from arriero.cuda_capture import CudaCapture
from arriero.engine.compiled_steps import CompiledSteps
from arriero.engine.decode_graphs import DecodeSteps
from arriero.engine.kv_memory import KVMemory
from arriero.engine.machine_memory import free_memory
from arriero.engine.request_adapters import AdapterPool
from arriero.engine.work import NO_ADAPTER, Library
from arriero.engine.work import Runner as Runner
from arriero.engine.work import Work as Work
from arriero.errors import ConfigError
from arriero.models.attention import kernels_for_any_shape
from arriero.models.compiled_rows import CompiledRows
from arriero.models.compiler import check_compiler
from arriero.models.llama import LlamaForCausalLM
from arriero.models.packed_model import PackedModel
from arriero.models.paged_attention import SPARE_BLOCKS, KernelName, block_size_of, choose_kernel, make_kernel
from arriero.models.paged_cache import PagedCache, Run
from arriero.parallel.generation import SharedModel
from arriero.process_pages import HUGE_PAGE, enlarge_pages, large_pages

logger = logging.getLogger(__name__)

# The share of the free memory that weights may take once more, in the layout of faster kernels (see `PackedModel`).
COPY_MEMORY_SHARE = 0.25
BLOCK_SIZE = 16
# With fewer of one token, in a step with prompts, these attend one after the other as the prompts do.
FEW_SINGLES = 4


class TorchRunner:
    """A `Runner` of a torch model, on a CPU or a GPU, or of one that several processes hold (all of them call it alike)."""

    library: Library = "torch"
    # of dynamic NTK RoPE too: up to `context` its angles do not depend on the length of the whole sequence
    reuses = True
    recalled: Sequence[int] = ()

    def __init__(
        self,
        model: LlamaForCausalLM | SharedModel,
        *,
        block_size: int | None = None,
        max_tokens: int | None = None,
        useful_tokens: int | None = None,
        memory_share: float | None = None,
        adapters: AdapterPool | None = None,
        weight_copies: bool | None = None,
        kv_cache_dtype: str = "auto",
        paged_attention: KernelName | None = None,
        cuda_graphs: bool = True,
        compile: bool = False,
    ) -> None:
        """
        Args:
            block_size: default: 16, or what the GPU's attention kernel needs; see `cache_block_size`.
            max_tokens: room for keys and values, in tokens; default: a share of the free memory. It is not taken until it
                is used, on a CPU.
            useful_tokens: of that share, no more than this is taken: for more there would be no use.
            memory_share: that share, above 0 and at most 1; default: `kv_memory.default_bytes`.
            adapters: of this model, that requests can name.
            weight_copies: hold the weights once more in the layout of faster kernels, where there are such (CPU, fp32);
                default: if they take no more than a quarter of the free memory. False leaves them as they lie, on a GPU too,
                where by default those of one input are joined.
            kv_cache_dtype: how keys and values are held, see `KVFormat.of`.
            paged_attention: what steps of one token a sequence attend with, all sequences at once; default: the fastest
                kernel on a GPU (`choose_kernel`), and on a CPU none: there each sequence is read where it lies.
            cuda_graphs: let a GPU repeat such steps without Python.
            compile: let torch.compile make the layers of small steps: on a GPU see `PackedModel`, on a CPU `CompiledRows`,
                which holds the weights once more. A model that it cannot be done for is computed in the ordinary way, and
                one line says why.

        Raises:
            ConfigError: adapters of another model; an unknown `kv_cache_dtype`; a kernel that is not to be had; `compile` on a
                CPU without a C++ compiler.
        """
        if block_size is None:
            block_size = cache_block_size(model, paged_attention)
        self.model, self.block_size, self.adapters = model, block_size, adapters
        if adapters is not None and adapters.model is not model:
            raise ConfigError("the adapters are read for another model: make the pool with the runner's")
        rows: CompiledRows | None = None
        self._compute: SharedModel | PackedModel
        if isinstance(model, SharedModel):
            self._compute = model
            if compile:
                logger.warning("a model that several processes hold is computed without torch.compile")
        else:
            self._compute, rows = _computing(model, weight_copies, compile, tables=paged_attention is not None)
        self.device = model.device if isinstance(model, SharedModel) else model.model.embed_tokens.weight.device
        # The embedding's, since adapters may stand in for any linear layer.
        self._dtype = model.dtype if isinstance(model, SharedModel) else model.model.embed_tokens.weight.dtype
        prefix: PrefixKV | None = model.prefix_kv() if isinstance(model, SharedModel) else prefix_kv(model)
        self._prefix = prefix
        self.prefix_length = prefix.length if prefix is not None else 0
        self.vocab_size = model.config.vocab_size
        self.context = model.config.max_position_embeddings - self.prefix_length
        self.kv_memory = KVMemory.measure(model.config, self._dtype, kv_cache_dtype, self.device, memory_share)
        if max_tokens is None:
            room = self.kv_memory.tokens
            if useful_tokens is not None:
                room = min(room, -(-useful_tokens // block_size) * block_size)
            max_tokens = model.agree([room])[0] if isinstance(model, SharedModel) else room
        self.num_blocks = max(1, max_tokens // block_size)
        kernel = _kernel(model, paged_attention)
        packed = self._compute if isinstance(self._compute, PackedModel) else None
        blocks = self.num_blocks + (SPARE_BLOCKS if kernel is not None and packed is not None else 0)
        self._cache = PagedCache(model.config, blocks, block_size, self._dtype, self.device, kv_cache_dtype)
        self._compiled = CompiledSteps(rows, packed, self._cache) if rows is not None and packed is not None else None
        self._steps: DecodeSteps | None = None
        if kernel is not None and packed is not None:
            most = -(-model.config.max_position_embeddings // block_size)
            graphs = cuda_graphs and self.device.type == "cuda"
            self._steps = DecodeSteps(
                packed,
                self._cache,
                make_kernel(kernel, self._cache, model.config, most, self._dtype),
                most,
                CudaCapture(self.device) if graphs else None,
            )

    @property
    def paged_attention(self) -> str | None:
        """What steps of one token a sequence attend with, all at once; None where each sequence is read by itself."""
        return self._steps.kernel if self._steps is not None else None

    @property
    def graphs(self) -> int:
        """CUDA graphs that are held."""
        return self._steps.graphs if self._steps is not None else 0

    @torch.inference_mode()
    def prepare(self) -> None:
        """Do now what steps would have to wait for, if there is a lot of it; only before the first one."""
        if self._compiled is not None:
            self._compiled.prepare()

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> Tensor:
        """See `Runner`."""
        with kernels_for_any_shape(self.device):
            return self._run(work)

    def _run(self, work: Sequence[Work]) -> Tensor:
        deltas = self._deltas(work)
        if deltas is None and self._compiled is not None and self._compiled.takes(work):
            logits = self._compiled.run(work)
            if logits is not None:
                return logits
        if self._steps is None or deltas is not None:
            return self._run_packed(work, deltas)
        singles = [len(item.tokens) == 1 == item.logits for item in work]
        if all(singles):
            return self._steps.run(work)
        if sum(singles) < FEW_SINGLES:
            return self._run_packed(work, None)
        # apart, each weight is read once more, and no sequence waits for another
        alone, others = ([item for item, one in zip(work, singles, strict=True) if one == of] for of in (True, False))
        places, others_places, at = list[int](), list[int](), 0
        for item, one in zip(work, singles, strict=True):
            (places if one else others_places).extend(range(at, at + item.logits))
            at += item.logits
        logits = torch.cat((self._steps.run(alone), self._run_packed(others, None)))
        order = torch.empty(at, dtype=torch.long)
        order[torch.tensor(places + others_places)] = torch.arange(at)
        return logits[order.to(self.device)]

    def _run_packed(self, work: Sequence[Work], deltas: PackedDeltas | None) -> Tensor:
        """All as one packed row, in which each sequence attends by itself."""
        view = self._cache.view([Run(item.start, len(item.tokens), item.blocks) for item in work])
        tokens = torch.tensor([[token for item in work for token in item.tokens]], device=self.device)
        inputs = (tokens, view.positions, view.attention, view)
        if isinstance(self._compute, PackedModel):
            hidden = self._compute.hidden_states(*inputs, deltas)[0]
        else:
            hidden = self._compute.hidden_states(*inputs)[0]
        wanted: list[int] = []
        end = 0
        for item in work:
            end += len(item.tokens)
            wanted += range(end - item.logits, end)
        if len(wanted) < hidden.shape[0]:
            hidden = hidden[torch.tensor(wanted, dtype=torch.long, device=self.device)]
        logits: Tensor = self._compute.lm_head(hidden)
        return logits

    def _deltas(self, work: Sequence[Work]) -> PackedDeltas | None:
        """What the adapters of a step add to its linear layers' outputs."""
        if self.adapters is None:
            return None
        return self.adapters.deltas([item.adapter for item in work], [len(item.tokens) for item in work])

    @torch.inference_mode()
    def begin(self, blocks: Sequence[int], start: int, end: int, adapter: int = NO_ADAPTER) -> None:
        """See `Runner`."""
        own = self.adapters.prefix(adapter) if self.adapters is not None and adapter != NO_ADAPTER else None
        prefix = own or self._prefix
        if prefix is not None:
            keys, values = (
                {layer: tensor[:, start:end] for layer, tensor in given.items()}
                for given in (prefix.keys, prefix.values)
            )
            self._cache.put(blocks, start, keys, values)


def cache_block_size(model: LlamaForCausalLM | SharedModel, paged_attention: KernelName | None = None) -> int:
    """Of the blocks that a `TorchRunner` gives this model, in tokens."""
    name = _kernel(model, paged_attention)
    return BLOCK_SIZE if name is None else block_size_of(name, BLOCK_SIZE)


def _kernel(model: LlamaForCausalLM | SharedModel, wanted: KernelName | None) -> KernelName | None:
    """What a step of one token a sequence attends with."""
    if wanted is not None or isinstance(model, SharedModel):
        return wanted
    device = model.model.embed_tokens.weight.device
    return choose_kernel(device) if device.type == "cuda" else None


def _computing(
    model: LlamaForCausalLM, copies: bool | None, compile: bool, tables: bool
) -> tuple[PackedModel, CompiledRows | None]:
    """What computes all steps, and what computes small ones on a CPU if that is wanted and can be.

    Args:
        tables: all sequences of a step attend at once, by tables of their blocks.
    """
    if model.model.embed_tokens.weight.device.type != "cpu":
        return PackedModel(model, join=copies is not False, compile=compile), None
    by_rows = compile and not tables and _compiles(model)
    own = CompiledRows.weight_bytes(model) if by_rows else 0
    size = PackedModel.copy_bytes(model)
    if copies is None:
        copies = size + own <= COPY_MEMORY_SHARE * free_memory()
    large = own + copies * size >= HUGE_PAGE
    known = large_pages() if large else frozenset()
    rows = CompiledRows(model) if by_rows else None
    packed = PackedModel(model, copy=copies, join=False, compile=compile and tables)
    if large:  # nobody waits for it
        Thread(target=enlarge_pages, args=(large_pages() - known,), daemon=True).start()
    return packed, rows


def _compiles(model: LlamaForCausalLM) -> bool:
    check_compiler("--torch_compile", "leave it out")
    obstacle = CompiledRows.obstacle(model)
    if obstacle is not None:
        logger.warning("the model is computed without torch.compile: %s", obstacle)
    return obstacle is None
