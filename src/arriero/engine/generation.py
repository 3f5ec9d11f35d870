"""Text from a model: many prompts at once, or one as a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import psutil
import torch
from torch import Tensor

from arriero.adapters.prefix import prefix_kv
from arriero.data.tokenizer import Tokenizer
from arriero.engine.row_pool import PrefillJob, RowPool, split_jobs
from arriero.engine.sampling import BROKEN, Sampler, SamplingParams, SamplingRow
from arriero.engine.text_stream import TextStream
from arriero.errors import GenerationError
from arriero.models.cache import ContiguousCache
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.generation import SharedModel

FinishReason = Literal["stop", "length", "stop_string"]
# The share of the free memory that keys and values may take.
CACHE_MEMORY_SHARE = 0.4


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        token_ids: all generated tokens, with the stop token or the stop string's tokens that ended them.
        text: without special tokens, and ending before a stop string.
        finish_reason: "stop" by a stop token, "stop_string", or "length" after max_new_tokens.
        prompt_tokens: the length of the prompt.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass
class _Request:
    """A prompt on its way to a `Generation`."""

    index: int
    prompt: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    sampling: SamplingRow
    stream: TextStream | None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def longest(self) -> int:
        """Tokens of prompt and longest answer together."""
        return len(self.prompt) + self.params.max_new_tokens

    def take(self, token: int) -> str:
        """Add the next token; returns the text that it releases."""
        self.token_ids.append(token)
        count = len(self.token_ids)
        may_stop = count >= self.params.min_new_tokens
        piece = ""
        if token in self.stop_ids and may_stop:
            self.finish_reason = "stop"
        else:
            if self.stream is not None:
                piece = self.stream.push(token, may_stop=may_stop)
            if count >= self.params.max_new_tokens:
                self.finish_reason = "length"
        if self.stream is not None:
            if self.finish_reason is not None:
                piece += self.stream.finish(may_stop=may_stop)
            if self.stream.stopped:
                self.finish_reason = "stop_string"
        return piece

    def result(self, tokenizer: Tokenizer) -> Generation:
        """The finished answer."""
        assert self.finish_reason is not None
        if self.stream is not None:
            text = self.stream.text
        else:
            text = tokenizer.decode(self.token_ids[:-1] if self.finish_reason == "stop" else self.token_ids)
        return Generation(self.token_ids, text, self.finish_reason, len(self.prompt))


class Generator:
    """Generates with one model.

    A batch of rows decodes together; a row whose answer ends takes the next prompt at once, or leaves the batch.
    Prompts are run in an order that puts common beginnings side by side, and a common beginning is computed once.
    """

    def __init__(
        self,
        model: LlamaForCausalLM | SharedModel,
        tokenizer: Tokenizer,
        *,
        max_batch_size: int = 32,
        device: torch.device | str | None = None,
        max_prefill_tokens: int = 2048,
        max_cache_tokens: int | None = None,
    ) -> None:
        """
        Args:
            max_batch_size: rows that decode together at most.
            device: moves the model there; default: where it is.
            max_prefill_tokens: prompt tokens in one forward pass at most, which bounds its memory.
            max_cache_tokens: room for keys and values, in tokens; default: a share of the free memory.

        Raises:
            GenerationError: a limit below 1.
        """
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("max_prefill_tokens", max_prefill_tokens),
            ("max_cache_tokens", max_cache_tokens),
        ):
            if value is not None and value < 1:
                raise GenerationError(f"{name} is {value}: it must be at least 1")
        self.model = model.to(device) if device is not None and isinstance(model, LlamaForCausalLM) else model
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens = max_prefill_tokens
        self._max_cache_tokens = max_cache_tokens
        self._sampler = Sampler()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_text: Callable[[int, str], None] | None = None,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """Answers in the order of the prompts.

        Args:
            prompts: token ids each.
            params: for all, or one for each.
            on_text: called with (index of the prompt, new text) as text comes.
            on_done: called with (index of the prompt, answer) as soon as an answer is complete.

        Raises:
            GenerationError: a prompt that is empty, too long, or holds ids that the model does not have.
        """
        requests = self._requests(prompts, params, streaming=on_text is not None)
        results: dict[int, Generation] = {}
        for request, piece in self._run(requests):
            if piece and on_text is not None:
                on_text(request.index, piece)
            if request.finish_reason is not None:
                results[request.index] = request.result(self.tokenizer)
                if on_done is not None:
                    on_done(request.index, results[request.index])
        return [results[index] for index in range(len(prompts))]

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[str]:
        """One answer's text, piece by piece; leave the iterator to stop generating.

        Raises:
            GenerationError: as `generate`, at once.
        """
        requests = self._requests([prompt], params, streaming=True)
        return (piece for _, piece in self._run(requests) if piece)

    def _requests(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], streaming: bool
    ) -> list[_Request]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise GenerationError(
                f"{len(prompts)} prompts and {len(each)} sampling parameters: give one for each, or one"
            )
        config = self.model.config
        requests = []
        for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            if not prompt:
                raise GenerationError(f"prompt {index} is empty: give at least one token, such as bos")
            strange = next((i for i in (min(prompt), max(prompt)) if not 0 <= i < config.vocab_size), None)
            if strange is not None:
                raise GenerationError(
                    f"prompt {index} holds token id {strange} and the model has ids 0 to {config.vocab_size - 1}: "
                    "the tokenizer is not this model's"
                )
            if len(prompt) + own.max_new_tokens > self.context:
                prefix = f" less a prefix of {self._prefix_length}" if self._prefix_length else ""
                raise GenerationError(
                    f"prompt {index} has {len(prompt)} tokens and max_new_tokens is {own.max_new_tokens}: together "
                    f"more than max_position_embeddings, {config.max_position_embeddings}{prefix}; shorten one of them"
                )
            stop_ids = frozenset(own.stop_token_ids) | frozenset(
                () if own.ignore_eos else self.tokenizer.stop_token_ids
            )
            stream = None
            if streaming or own.stop_strings:
                stream = TextStream(self.tokenizer.stream_decoder(), own.stop_strings)
            sampling = SamplingRow.start(own, prompt, stop_ids, config.vocab_size, self._device)
            requests.append(_Request(index, list(prompt), own, stop_ids, sampling, stream))
        return requests

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.model.config.max_position_embeddings - self._prefix_length

    @property
    def _prefix_length(self) -> int:
        model = self.model
        return model.prefix_length if isinstance(model, SharedModel) else model.model.prefix_length

    @property
    def _device(self) -> torch.device:
        return self.model.device if isinstance(self.model, SharedModel) else self.model.model.embed_tokens.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        # The embedding's, since adapters may stand in for any linear layer.
        return self.model.dtype if isinstance(self.model, SharedModel) else self.model.model.embed_tokens.weight.dtype

    def _agree(self, numbers: list[int]) -> list[int]:
        """One decision in all processes that share out the model."""
        return self.model.agree(numbers) if isinstance(self.model, SharedModel) else numbers

    def _run(self, requests: list[_Request]) -> Iterator[tuple[_Request, str]]:
        """Yield (request, released text) for every token, and see that the model is as it was afterwards."""
        was_training = self.model.training
        self.model.eval()
        try:
            for group, rows in self._groups(requests):
                yield from self._run_group(group, rows)
        finally:
            self.model.train(was_training)

    def _groups(self, requests: list[_Request]) -> Iterator[tuple[list[_Request], int]]:
        """Requests that share a cache, and its rows: all together if the memory allows, else those of like length.

        Within a group the order is that of the tokens, so that common beginnings meet.
        """
        if not requests:
            return
        room, prefix = self._cache_room(), self._prefix_length
        need = prefix + max(request.longest for request in requests)
        if need > room:
            raise GenerationError(
                f"{need} tokens of prompt and answer need more memory for keys and values than there is room for "
                f"({room} tokens); shorten the prompt or lower max_new_tokens"
            )
        by_size: dict[int, list[_Request]] = {}
        if need * min(self.max_batch_size, len(requests)) <= room:
            by_size[0] = requests
        else:
            for request in requests:
                by_size.setdefault(request.longest.bit_length(), []).append(request)
        for _, group in sorted(by_size.items()):
            need = prefix + max(request.longest for request in group)
            yield sorted(group, key=lambda r: r.prompt), min(self.max_batch_size, len(group), room // need)

    def _cache_room(self) -> int:
        """How many tokens' keys and values the memory holds."""
        if self._max_cache_tokens is not None:
            return self._max_cache_tokens
        config, device = self.model.config, self._device
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = psutil.virtual_memory().available
        size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self._dtype.itemsize
        return self._agree([int(free * CACHE_MEMORY_SHARE) // size])[0]

    def _run_group(self, requests: list[_Request], rows: int) -> Iterator[tuple[_Request, str]]:
        pool = self._pool(rows, max(request.longest for request in requests))
        waiting = deque(requests)
        active: list[_Request | None] = [None] * rows
        while True:
            free = [row for row, request in enumerate(active) if request is None]
            if free and waiting:
                admitted = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                for placed, jobs in pool.place([request.prompt for request in admitted], free):
                    for index, row in placed.items():
                        active[row] = admitted[index]
                    for request, token in self._prefill(pool.cache, jobs, active):
                        yield request, request.take(token)
                active = [None if r is not None and r.finish_reason is not None else r for r in active]
                if waiting:
                    continue
            self._drop_free(pool, active)
            if not active:
                return
            for request, token in self._decode(pool.cache, [r for r in active if r is not None]):
                yield request, request.take(token)
            active = [None if r is not None and r.finish_reason is not None else r for r in active]

    @staticmethod
    def _drop_free(pool: RowPool, active: list[_Request | None]) -> None:
        """Take rows without a request out of the batch; there is nothing left to fill them with."""
        for row in range(len(active) - 1, -1, -1):
            if active[row] is None:
                active[row] = active[pool.drop(row)]
                active.pop()

    @torch.no_grad()
    def _pool(self, rows: int, length: int) -> RowPool:
        model = self.model
        cache = ContiguousCache(model.config, rows, self._prefix_length + length, self._dtype, self._device)
        prefix = model.prefix_kv() if isinstance(model, SharedModel) else prefix_kv(model)
        if prefix is not None:
            cache.begin_with(prefix.keys, prefix.values)
        return RowPool(cache)

    def _prefill(
        self, cache: ContiguousCache, jobs: Sequence[PrefillJob], active: Sequence[_Request | None]
    ) -> Iterator[tuple[_Request, int]]:
        """Run prompts, many in one packed pass; yields each request's first token."""
        for batch in split_jobs(jobs, self.max_prefill_tokens):
            requests = [request for job in batch if job.last and (request := active[job.row]) is not None]
            yield from zip(requests, self._prefill_step(cache, batch, requests), strict=True)

    @torch.no_grad()
    def _prefill_step(
        self, cache: ContiguousCache, batch: Sequence[PrefillJob], requests: Sequence[_Request]
    ) -> list[int]:
        lengths = [len(job.tokens) for job in batch]
        view = cache.prefill([job.row for job in batch], lengths, [job.start for job in batch])
        tokens = torch.tensor([[token for job in batch for token in job.tokens]], device=self._device)
        hidden = self.model.hidden_states(tokens, view.positions, view.attention, view)
        ends, end = [], 0
        for job, length in zip(batch, lengths, strict=True):
            end += length
            if job.last:
                ends.append(end - 1)
        # Logits only where a prompt ends: over a large vocabulary the others would cost more than the layers.
        return self._next_tokens(hidden[0, ends], requests) if ends else []

    @torch.no_grad()
    def _decode(self, cache: ContiguousCache, requests: Sequence[_Request]) -> list[tuple[_Request, int]]:
        """One more token for every row."""
        view = cache.decode()
        tokens = torch.tensor([request.token_ids[-1:] for request in requests], device=self._device)
        hidden = self.model.hidden_states(tokens, view.positions, view.attention, view)
        cache.advance()
        return list(zip(requests, self._next_tokens(hidden[:, -1], requests), strict=True))

    def _next_tokens(self, hidden: Tensor, requests: Sequence[_Request]) -> list[int]:
        chosen = self._sampler(self.model.lm_head(hidden), [request.sampling for request in requests])
        tokens = self._agree(chosen.tolist())
        if BROKEN in tokens:
            raise GenerationError(
                "the model gives logits that are no finite numbers: its weights are broken or overflow"
            )
        return tokens
