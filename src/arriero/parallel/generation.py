"""A model that several processes share out, as text generation sees it: token ids in, logits out, the same in each.

Every process runs the same prompts in step with the others, or whole copies of the model run their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arriero.adapters.prefix import PrefixKV, prefix_kv
from arriero.config.layout import Coordinates
from arriero.models.attention import AttentionInfo
from arriero.models.cache import CacheView
from arriero.models.llama import LayerInputs, LlamaForCausalLM
from arriero.parallel.parallelize import Parallel
from arriero.parallel.processes import Processes
from arriero.parallel.relay import relay
from arriero.parallel.tensor import whole_logits


class SharedModel:
    """Stands in for the `LlamaForCausalLM` that was shared out.

    Attributes:
        config: with the key-value heads that this process caches.
        device: where it computes; its weights may lie elsewhere.
    """

    def __init__(self, model: LlamaForCausalLM, parallel: Parallel, *, apart: bool = False) -> None:
        self._model, self._parallel = model, parallel
        self._peers = Processes() if apart else parallel.processes
        self.device = parallel.device
        layout = parallel.processes.layout
        heads = max(1, model.config.num_key_value_heads // layout.tp)
        self.config = dataclasses.replace(
            model.config,
            num_attention_heads=model.config.num_attention_heads // layout.tp,
            num_key_value_heads=heads,
            head_dim=model.config.head_dim,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._parallel.stages[0].dtype

    def prefix_kv(self) -> PrefixKV | None:
        """Those of this process's layers and heads; every process must ask."""
        return prefix_kv(self._model)

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """One value for all processes that run the same prompts: the least that any of them has."""
        return [-round(number) for number in self._peers.max([-float(number) for number in numbers])]

    @torch.inference_mode(False)  # FSDP keeps gathered weights, which must be ordinary tensors
    @torch.no_grad()
    def hidden_states(
        self, input_ids: Tensor, positions: Tensor, attention: AttentionInfo, cache: CacheView | None = None
    ) -> Tensor:
        """(B, S) int64 -> (B, S, hidden); zeros where another process has the last stage."""
        parallel = self._parallel
        dynamic = self._model.model.rotary.is_dynamic
        lengths = attention.sequence_lengths(positions.device) if dynamic else None
        inputs = LayerInputs(positions, attention, cache, lengths)
        tensor = parallel.tensor
        with tensor.whole_sequences() if tensor is not None else contextlib.nullcontext():
            if parallel.processes.layout.pp == 1:
                hidden: Tensor = parallel.stages[0](input_ids, inputs)
                return hidden
            outputs = relay(parallel, [(input_ids, inputs)])
        if outputs:
            return outputs[0]
        width = parallel.shapes["model.norm.weight"][0]
        return torch.zeros(1, dtype=self.dtype, device=self.device).expand(*input_ids.shape, width)

    @torch.inference_mode(False)
    @torch.no_grad()
    def lm_head(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocab_size), in every process."""
        parallel, vocab_size = self._parallel, self.config.vocab_size
        head = next((stage.lm_head for stage in parallel.stages if stage.is_last), None)
        if head is not None:
            logits = self._logits(head, hidden)
        else:
            logits = hidden.new_empty(*hidden.shape[:-1], vocab_size)
        layout, at = parallel.processes.layout, parallel.processes.at
        if layout.pp > 1:
            last = dataclasses.replace(at, pp=layout.process_of(layout.stages - 1))
            logits = logits.contiguous()
            dist.broadcast(logits, layout.rank(Coordinates(**vars(last))), group=parallel.processes.group("pp"))
        return logits

    def _logits(self, head: nn.Module, hidden: Tensor) -> Tensor:
        if self._parallel.tensor is None:
            logits: Tensor = head(hidden)
            return logits
        return whole_logits(head, hidden, self.config.vocab_size, self._parallel.tensor)


def for_generation(model: LlamaForCausalLM, *, apart: bool = False) -> LlamaForCausalLM | SharedModel:
    """The model, or what stands in for one that several processes share out.

    Args:
        apart: each process has a whole copy and runs prompts of its own.
    """
    parallel: Parallel | None = getattr(model, "parallel", None)
    return model if parallel is None else SharedModel(model, parallel, apart=apart)
