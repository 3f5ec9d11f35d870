"""Who computes how many tokens in the next step. Integers only: nothing here knows of tensors."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass

from arriero.engine.block_manager import BlockManager
from arriero.engine.request import Request, Status
from arriero.errors import GenerationError


@dataclass(frozen=True)
class Share:
    """A request's part of a step.

    Attributes:
        start: the first token to compute, by its position.
        count: how many.
        samples: whether the request's last known token is among them, so that logits are wanted.
    """

    request: Request
    start: int
    count: int
    samples: bool


class Scheduler:
    """Fills each step with tokens up to a budget, the most important requests first.

    Running requests go on before others begin; a running one always gets at least a token, so that long prompts, which are
    computed in chunks, hold nobody up. Where blocks run out, the least important running request loses its own and waits; what
    the cache keeps of them spares it most of the work later. One whose adapter has no place beside those of running requests
    waits until they have ended, and nobody overtakes it.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_running: int,
        max_step_tokens: int,
        max_context: int,
        reserve: bool = True,
        max_adapters: int = 1,
        max_step_scores: int | None = None,
    ) -> None:
        """
        Args:
            max_running: requests that run at once.
            max_step_tokens: tokens of one step.
            max_context: tokens of one request, prompt and answer.
            reserve: keep neighbouring blocks for a request's answer.
            max_adapters: different adapters that requests use at once.
            max_step_scores: tokens of one step whose logits score a prompt, but for one of each running request, which may
                always go on; None: no limit.

        Raises:
            GenerationError: a limit below 1, or a step that has not one token for each running request.
        """
        if min(max_running, max_step_tokens, max_context) < 1 or max_step_tokens < max_running:
            raise GenerationError(
                f"max_running {max_running}, max_step_tokens {max_step_tokens} and max_context {max_context}: each must be at "
                "least 1, and a step must have a token for each running request"
            )
        self.blocks = blocks
        self.max_running, self.max_step_tokens, self.max_context = max_running, max_step_tokens, max_context
        self.reserve, self.max_adapters = reserve, max_adapters
        self.waiting: list[Request] = []  # by rank
        self.running: list[Request] = []  # by rank
        self.preemptions = 0
        self.max_step_scores = max_step_tokens if max_step_scores is None else max_step_scores
        self._scores_left = 0
        self._arrivals = 0
        self._coming: Counter[bytes] = Counter()  # blocks that running requests are about to fill
        self._adapters: Counter[int] = Counter()  # of running requests

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            GenerationError: one that can never be served; it names the numbers.
        """
        size, needed = self.blocks.block_size, self.blocks.blocks_for(request.longest)
        if request.longest > self.max_context:
            raise GenerationError(
                f"{request.prompt_length} tokens of prompt and {request.max_new_tokens} of answer are more than the context "
                f"of {self.max_context}: shorten one of them"
            )
        if needed > self.blocks.num_blocks:
            raise GenerationError(
                f"{request.longest} tokens of prompt and answer need {needed} blocks of {size}, "
                f"and the key-value cache has {self.blocks.num_blocks} in all: shorten the prompt, lower max_new_tokens, "
                "free memory, or let it hold more tokens with --kv_cache_dtype int8"
            )
        if request.arrival < 0:
            request.arrival = self._arrivals
            self._arrivals += 1
        bisect.insort(self.waiting, request, key=lambda r: r.rank)

    def remove(self, request: Request) -> None:
        """Take a finished or cancelled request out, wherever it is; its blocks are free."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._release(request)
        elif request.status is Status.WAITING and request in self.waiting:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def schedule(self) -> list[Share]:
        """The next step; empty only if there is no request."""
        self._make_way()
        shares: list[Share] = []
        budget, index, self._scores_left = self.max_step_tokens, 0, self.max_step_scores
        known, wanted = -1, 0
        while index < len(self.running):
            request = self.running[index]
            if len(self.running) != known:  # at first, and when some behind have lost their blocks
                known, wanted = len(self.running), sum(other.target - other.computed for other in self.running[index:])
            wanted -= request.target - request.computed
            behind = known - index - 1
            count = self._chunk(request, budget - behind, wanted - behind + self._wanted_by_waiting(0))
            if not self._grow(request, request.computed + count):
                break  # it has lost its own blocks, and was the last
            shares.append(self._share(request, count))
            budget -= count
            index += 1
        self._admit(shares, budget)
        return shares

    def advance(self, share: Share) -> None:
        """A share was computed: what of its tokens is certain counts from now on.

        Call it before the answer's new tokens are appended.
        """
        request = share.request
        request.computed = min(share.start + share.count, len(request.tokens))
        self._seal(request)

    def _chunk(self, request: Request, budget: int, others: int) -> int:
        """How many tokens a request computes now: what `others` leave of the budget, and at least half of it."""
        missing = request.target - request.computed
        count = min(missing, max(budget - others, budget // 2, 1))
        if request.scored is not None:
            count = min(count, max(self._scores_left, 1))
            self._scores_left -= count
        return count

    def _wanted_by_waiting(self, index: int) -> int:
        """Tokens that the one at this place would compute, if it may begin."""
        may = index < len(self.waiting) and len(self.running) < self.max_running
        return self.waiting[index].target if may and self._has_place(self.waiting[index]) else 0

    def _has_place(self, request: Request) -> bool:
        """Whether its adapter is one of those of running requests, or can come to them."""
        number = request.adapter
        return number == 0 or number in self._adapters or len(self._adapters) < self.max_adapters

    def _share(self, request: Request, count: int) -> Share:
        start = request.computed
        return Share(request, start, count, samples=start + count >= len(request.tokens))

    def _grow(self, request: Request, tokens: int) -> bool:
        """Give a running request blocks for so many tokens, if need be those of less important ones; False if it had to give
        up its own."""
        needed = self.blocks.blocks_for(tokens) - len(request.blocks)
        while needed > self.blocks.available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        if needed > 0:
            request.blocks += self.blocks.take(needed, request.blocks[-1] if request.blocks else self._start(request))
        return True

    def _start(self, request: Request) -> int | None:
        """The block before a run of neighbours for a whole request."""
        if not self.reserve:
            return None
        request.reserved = self.blocks.reserve(self.blocks.blocks_for(request.longest) - len(request.blocks))
        return request.reserved.start - 1 if request.reserved else None

    def _make_way(self) -> None:
        """Where one waits that is more important than one that runs, and has no room, the latter waits."""
        while self.waiting and self.running and self.waiting[0].priority < self.running[-1].priority:
            first = self.waiting[0]
            place = self._has_place(first)
            if not place and not self._can_have_place(first):
                return  # whoever lost blocks for it would have lost them for nothing
            if place and len(self.running) < self.max_running and self._missing(first) <= self.blocks.available:
                return
            self._preempt(self.running[-1])

    def _can_have_place(self, request: Request) -> bool:
        """Whether all who run with one of the adapters are less important, so that it can give way to this request's."""
        kept = {other.adapter for other in self.running if other.priority <= request.priority}
        return any(number not in kept for number in self._adapters)

    def _missing(self, request: Request) -> int:
        """Blocks that must be available for a waiting request to begin: all of its known tokens', less what is in use."""
        digests = self._usable(request)
        held = self.blocks.held(digests)
        return self.blocks.blocks_for(request.target) - held + self.blocks.idle_among(digests)

    def _usable(self, request: Request) -> list[bytes]:
        """Of the full blocks that a request can take from the cache: not those whose logits are still wanted."""
        digests = self._digests(request)
        return digests if request.scored is None else digests[: request.scored // self.blocks.block_size]

    def _digests(self, request: Request) -> list[bytes]:
        """Of its full blocks without its last token, which is always computed."""
        if not self.blocks.prefix_cache:
            return []
        full = (len(request.tokens) - 1) // self.blocks.block_size
        if len(request.digests) < full:
            request.digests += self.blocks.digests(request.tokens, request.salt, request.digests)
        return request.digests[:full]

    def _admit(self, shares: list[Share], budget: int) -> None:
        index = 0
        while budget > 0 and index < len(self.waiting) and len(self.running) < self.max_running:
            request = self.waiting[index]
            usable = self._usable(request)
            held = self.blocks.held(usable)
            if held < len(usable) and self._coming[usable[held]]:
                index += 1  # a running request is computing what comes next of it: wait and share
                continue
            if self._missing(request) > self.blocks.available or not self._has_place(request):
                return  # and nobody overtakes it, or it might wait for ever
            del self.waiting[index]
            request.blocks = self.blocks.share(usable)
            request.sealed = len(request.blocks)
            request.computed = request.sealed * self.blocks.block_size
            if request.preemptions == 0:
                request.cached = max(0, request.computed - request.prefix_length)
            request.status = Status.RUNNING
            if request.adapter:
                self._adapters[request.adapter] += 1
            bisect.insort(self.running, request, key=lambda r: r.rank)
            digests = self._digests(request)
            request.coming = len(digests)
            self._coming.update(digests[held:])
            count = self._chunk(request, budget, self._wanted_by_waiting(index))
            needed = self.blocks.blocks_for(request.computed + count) - len(request.blocks)
            if needed > 0:
                request.blocks += self.blocks.take(needed, self._start(request))
            shares.append(self._share(request, count))
            budget -= count

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks; it computes its tokens again when there is room."""
        self.running.remove(request)
        self._release(request)
        request.drafts = []
        request.computed = 0
        request.status = Status.WAITING
        request.preemptions += 1
        self.preemptions += 1
        bisect.insort(self.waiting, request, key=lambda r: r.rank)

    def _release(self, request: Request) -> None:
        self._arrived(request, request.coming)
        if request.adapter:
            self._adapters[request.adapter] -= 1
            if self._adapters[request.adapter] == 0:
                del self._adapters[request.adapter]
        self.blocks.release(request.blocks)
        self.blocks.release_reserved(request.reserved)
        request.blocks, request.reserved, request.sealed, request.coming = [], range(0), 0, 0

    def _seal(self, request: Request) -> None:
        """Let others share the blocks that have become full."""
        full = request.computed // self.blocks.block_size
        if not self.blocks.prefix_cache or full <= request.sealed:
            return
        if len(request.digests) < full:
            request.digests += self.blocks.digests(request.tokens, request.salt, request.digests)
        for index in range(request.sealed, full):
            self.blocks.seal(request.blocks[index], request.digests[index])
        self._arrived(request, full)
        request.sealed = full

    def _arrived(self, request: Request, end: int) -> None:
        """Nobody waits any longer for a request's blocks up to `end`."""
        for digest in request.digests[request.sealed : min(end, request.coming)]:
            self._coming[digest] -= 1
            if self._coming[digest] == 0:
                del self._coming[digest]
