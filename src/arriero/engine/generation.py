"""Answers for many prompts at once.

Prompts wait in a queue; a free row of the cache takes the next one. New prompts are prefilled packed, without padding, and
start from the longest prefix that some row already holds, so that questions on one passage compute it once. All rows then
step together, and a finished row makes room at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread

import torch
from torch import Tensor

from arriero.data.stream_decoder import StreamDecoder
from arriero.data.tokenizer import Tokenizer
from arriero.engine.sampling import SamplingParams, draw, filtered_logits
from arriero.errors import GenerationError
from arriero.models.cache import ContiguousCache
from arriero.models.llama import LlamaForCausalLM

PREFILL_TOKENS = 2048  # prompt tokens of one forward pass: bounds the memory of activations
CACHE_BYTES = 2 << 30  # bounds the number of rows
SHORTEST_SHARED_PREFIX = 16


@dataclass
class Generation:
    """One answer. `finish_reason` is "stop" (a stop token), "stop_string" or "length"."""

    token_ids: list[int]
    text: str
    finish_reason: str
    prompt_tokens: int


@dataclass
class _Row:
    """A request while it is being answered. `tokens` is prompt + answer; `held` of them are in the cache."""

    number: int
    params: SamplingParams
    tokens: list[int]
    prompt_tokens: int
    stops: tuple[int, ...]
    decoder: StreamDecoder
    generator: torch.Generator
    text: str = ""
    shown: int = 0
    finish_reason: str = ""

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens


@dataclass
class Generator:
    """Generates with one model.

    Args:
        max_batch_size: rows that step together.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    max_batch_size: int = 32

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_text: Callable[[int, str], None] | None = None,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """The answers, in the order of the prompts.

        Args:
            params: for all prompts, or one for each.
            on_text: called with (prompt number, new text) as text becomes final.
            on_done: called with (prompt number, answer) as answers end.

        Raises:
            GenerationError: an empty prompt, or one that leaves no room for `max_new_tokens` in the model's context.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        for number, (prompt, wanted) in enumerate(zip(prompts, each, strict=True)):
            self._admit(number, prompt, wanted)
        if not prompts:
            return []
        longest = max(len(prompt) + wanted.max_new_tokens for prompt, wanted in zip(prompts, each, strict=True))
        # neighbours in this order share the longest prefixes; popped from the end
        waiting = sorted(range(len(prompts)), key=lambda i: list(prompts[i]), reverse=True)
        cache = self._cache(longest, len(prompts))
        done: dict[int, Generation] = {}
        rows: list[_Row] = []
        while waiting or rows:
            free = [i for i, row in enumerate(rows) if row.finish_reason]
            taken: list[int] = []
            while waiting and (free or len(rows) < self._capacity):
                number = waiting.pop()
                row = self._row(number, prompts[number], each[number])
                if free:
                    index = free.pop(0)
                    rows[index] = row
                else:
                    index = len(rows)
                    rows.append(row)
                    cache.lengths.append(0)
                    self._held.append([])
                taken.append(index)
            if free:  # nobody waits for these rows
                keep = [i for i in range(len(rows)) if i not in set(free)]
                cache.select(keep)
                rows, self._held = [rows[i] for i in keep], [self._held[i] for i in keep]
            if taken:
                self._accept(rows, taken, self._prefill(cache, rows, taken), on_text)
            elif rows:
                view = cache.decode()
                last = torch.tensor([[row.tokens[-1]] for row in rows], device=cache.device)
                hidden = self.model.hidden_states(last, view.positions, view.attention, view)
                for held, row in zip(self._held, rows, strict=True):
                    held.append(row.tokens[-1])
                cache.advance()
                self._accept(rows, list(range(len(rows))), self.model.lm_head(hidden[:, 0]), on_text)
            for row in rows:
                if row.finish_reason and row.number not in done:
                    done[row.number] = self._finish(row, on_text)
                    if on_done:
                        on_done(row.number, done[row.number])
        return [done[number] for number in range(len(prompts))]

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[str]:
        """The pieces of one answer's text as they become final."""
        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                self.generate([prompt], params, on_text=lambda _, text: pieces.put(text))
                pieces.put(None)
            except BaseException as error:  # handed to the reader
                pieces.put(error)

        Thread(target=work, name="generation", daemon=True).start()
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def _admit(self, number: int, prompt: Sequence[int], params: SamplingParams) -> None:
        limit = self.model.config.max_position_embeddings
        if not prompt:
            raise GenerationError(f"prompt {number} is empty: at least one token is needed")
        if len(prompt) + params.max_new_tokens > limit:
            raise GenerationError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens {params.max_new_tokens} it exceeds the "
                f"model's context of {limit}: shorten it or lower max_new_tokens"
            )

    def _row(self, number: int, prompt: Sequence[int], params: SamplingParams) -> _Row:
        stops = tuple(self.tokenizer.stop_token_ids) if params.stop_token_ids is None else params.stop_token_ids
        decoder = self.tokenizer.stream_decoder()
        return _Row(number, params, list(prompt), len(prompt), stops, decoder, params.generator())

    def _cache(self, longest: int, requests: int) -> ContiguousCache:
        config, weight = self.model.config, self.model.lm_head.weight
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
        self._capacity = max(1, min(self.max_batch_size, requests, CACHE_BYTES // (token_bytes * longest)))
        cache = ContiguousCache(config, self._capacity, longest, dtype=weight.dtype, device=weight.device)
        cache.lengths.clear()
        self._held: list[list[int]] = []  # the tokens whose keys and values each row of the cache holds
        return cache

    def _prefill(self, cache: ContiguousCache, rows: list[_Row], taken: list[int]) -> Tensor:
        """Put the prompts of the rows `taken` into the cache; logits (len(taken), V) after each prompt's last token."""
        followers: dict[int, int] = {}  # row -> the row among `taken` whose prefix it will copy
        starts: dict[int, int] = {}
        busy = [i for i in range(len(rows)) if i not in set(taken)]
        for position, index in enumerate(taken):
            prompt = rows[index].tokens
            shared, source = max([(_common(prompt, self._held[i]), i) for i in [*busy, index]])
            leader = taken[position - 1] if position else None
            if leader is not None:
                leader = followers.get(leader, leader)
                if _common(prompt, rows[leader].tokens) > max(shared, SHORTEST_SHARED_PREFIX):
                    followers[index] = leader
                    continue
            if shared < SHORTEST_SHARED_PREFIX:
                shared = 0
            elif source != index:
                cache.copy_prefix(source, index, shared)
            starts[index] = shared
        logits: dict[int, Tensor] = {}
        self._prefill_from(cache, rows, starts, logits)
        for index, leader in followers.items():
            shared = _common(rows[index].tokens, rows[leader].tokens)
            cache.copy_prefix(leader, index, shared)
            starts[index] = shared
        self._prefill_from(cache, rows, {index: starts[index] for index in followers}, logits)
        return torch.stack([logits[index] for index in taken])

    def _prefill_from(self, cache: ContiguousCache, rows: list[_Row], starts: dict[int, int], logits: dict[int, Tensor]) -> None:
        """Compute what follows the prefixes, at most `PREFILL_TOKENS` at a time."""
        todo = dict(starts)
        while todo:
            pieces: list[tuple[int, int, int]] = []  # row, first token, tokens
            budget = PREFILL_TOKENS
            for index, start in todo.items():
                length = min(len(rows[index].tokens) - start, budget)
                if length:
                    pieces.append((index, start, length))
                    budget -= length
            tokens = [token for index, start, length in pieces for token in rows[index].tokens[start : start + length]]
            numbers, begins, lengths = zip(*pieces, strict=True)
            view = cache.prefill(numbers, lengths, begins)
            hidden = self.model.hidden_states(torch.tensor([tokens], device=cache.device), view.positions, view.attention, view)[0]
            ends = torch.tensor(lengths, device=cache.device).cumsum(0) - 1
            after = self.model.lm_head(hidden[ends])
            for (index, start, length), row_logits in zip(pieces, after, strict=True):
                self._held[index] = rows[index].tokens[: start + length]
                if start + length == len(rows[index].tokens):
                    logits[index] = row_logits
                    del todo[index]
                else:
                    todo[index] = start + length

    def _accept(
        self, rows: list[_Row], indices: list[int], logits: Tensor, on_text: Callable[[int, str], None] | None
    ) -> None:
        """Choose each row's next token and see whether it ends the answer."""
        greedy = logits.argmax(-1).tolist()
        for i, index in enumerate(indices):
            row = rows[index]
            token = greedy[i]
            if not row.params.plain_greedy:
                stops = () if row.params.ignore_eos else row.stops
                filtered = filtered_logits(logits[i].float(), row.params, row.tokens, row.new_tokens, stops)
                token = draw(filtered, row.generator) if row.params.do_sample else int(filtered.argmax())
            row.tokens.append(token)
            if token in row.stops and not row.params.ignore_eos:
                row.finish_reason = "stop"
                continue
            if row.params.stop_strings or on_text:
                self._read(row, row.decoder.push(token), on_text)
            if not row.finish_reason and row.new_tokens >= row.params.max_new_tokens:
                row.finish_reason = "length"

    def _read(self, row: _Row, piece: str, on_text: Callable[[int, str], None] | None) -> None:
        """Add decoded text; look for stop strings; show what can no longer become part of one."""
        row.text += piece
        stops = row.params.stop_strings
        cut = min((at for at in (row.text.find(stop) for stop in stops) if at >= 0), default=-1)
        if cut >= 0:
            row.text, row.finish_reason = row.text[:cut], "stop_string"
        safe = len(row.text) if row.finish_reason else len(row.text) - _overlap(row.text, stops)
        if on_text and safe > row.shown:
            on_text(row.number, row.text[row.shown : safe])
        row.shown = max(row.shown, safe)

    def _finish(self, row: _Row, on_text: Callable[[int, str], None] | None) -> Generation:
        answer = row.tokens[row.prompt_tokens :]
        if row.params.stop_strings or on_text:
            if row.finish_reason != "stop_string":
                reason = row.finish_reason
                self._read(row, row.decoder.flush(), on_text)
                row.finish_reason = row.finish_reason if row.finish_reason == "stop_string" else reason
            text = row.text
        else:
            text = self.tokenizer.decode(answer)
        return Generation(answer, text, row.finish_reason, row.prompt_tokens)


def _common(prompt: list[int], held: list[int]) -> int:
    """Length of the shared prefix, leaving at least one token of the prompt to compute."""
    limit = min(len(prompt) - 1, len(held))
    if prompt[:limit] == held[:limit]:
        return limit
    low, high = 0, limit  # bisection: prompt[:low] is shared, prompt[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if prompt[:middle] == held[:middle]:
            low = middle
        else:
            high = middle
    return low


def _overlap(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
