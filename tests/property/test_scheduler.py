"""Random lives of a scheduler: nothing leaks, everyone gets on, and the budget holds."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from arriero.engine.block_manager import BlockManager, block_digest
from arriero.engine.request import Request, Status
from arriero.engine.scheduler import Scheduler, Share
from arriero.errors import GenerationError

STEPS_TO_GET_ON = 400


def test_nobody_loses_blocks_for_an_adapter_that_stays_in_use() -> None:
    scheduler = Scheduler(BlockManager(16, 4), max_running=4, max_step_tokens=64, max_context=60, max_adapters=1)
    first, second, third = (
        Request([1, 2, number], 3, 8, priority=priority, adapter=adapter)
        for number, (priority, adapter) in enumerate([(0, 1), (5, 0), (1, 2)])
    )
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.add(third)
    scheduler.schedule()
    assert scheduler.preemptions == 0
    assert scheduler.running == [first, second]
    scheduler.remove(first)
    scheduler.schedule()
    assert third.status is Status.RUNNING


class Serving(RuleBasedStateMachine):
    """Requests come, are computed, guess, finish and go; `truth` is what a block must hold."""

    @initialize(
        blocks=st.integers(4, 24),
        size=st.integers(1, 5),
        running=st.integers(1, 5),
        budget=st.integers(0, 12),
        cache=st.booleans(),
        reserve=st.booleans(),
        adapters=st.integers(1, 3),
    )
    def begin(
        self, blocks: int, size: int, running: int, budget: int, cache: bool, reserve: bool, adapters: int
    ) -> None:
        self.manager = BlockManager(blocks, size, prefix_cache=cache)
        self.scheduler = Scheduler(
            self.manager,
            max_running=running,
            max_step_tokens=running + budget,
            max_context=60,
            reserve=reserve,
            max_adapters=adapters,
        )
        self.alive: list[Request] = []
        self.truth: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, place) -> the tokens up to it

    @rule(
        shared=st.integers(0, 3),
        own=st.one_of(st.just([]), st.lists(st.integers(0, 1), max_size=8)),
        new=st.integers(1, 8),
        priority=st.integers(0, 2),
        salt=st.sampled_from([b"", b"a"]),
        adapter=st.integers(0, 4),
    )
    def add(self, shared: int, own: list[int], new: int, priority: int, salt: bytes, adapter: int) -> None:
        tokens = [7] * (shared * 4) + own + [1]
        request = Request(tokens, len(tokens), new, priority=priority, salt=salt, adapter=adapter)
        fits = self.manager.blocks_for(request.longest) <= self.manager.num_blocks and request.longest <= 60
        try:
            self.scheduler.add(request)
        except GenerationError:
            assert not fits
        else:
            assert fits
            self.alive.append(request)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.one_step(lambda limit: data.draw(st.integers(0, limit)))

    def one_step(self, draw) -> None:  # type: ignore[no-untyped-def]
        shares = self.scheduler.schedule()
        assert bool(shares) == bool(self.alive), "a step is empty only if nobody is there"
        assert sum(share.count for share in shares) <= self.scheduler.max_step_tokens
        assert {id(s.request) for s in shares} == {id(r) for r in self.scheduler.running}, (
            "a running request got nothing"
        )
        for share in shares:
            self.compute(share)
        for share in shares:
            self.answer(share, draw)

    def compute(self, share: Share) -> None:
        request, size = share.request, self.manager.block_size
        sequence = request.tokens + request.drafts
        assert share.count >= 1
        assert share.start == request.computed
        assert share.start + share.count <= len(request.blocks) * size
        for at in range(share.start, share.start + share.count):
            block = request.blocks[at // size]
            assert self.manager._users[block] == 1 or self.truth[block, at % size] == self.key(request, at + 1), (
                "a shared block is written with something else"
            )
            self.truth[block, at % size] = (*request.salt, -1, *sequence[: at + 1])
        for at in range(min(share.start + share.count, len(request.tokens))):
            block = request.blocks[at // size]
            assert self.truth[block, at % size] == self.key(request, at + 1), "the cache holds another beginning"

    @staticmethod
    def key(request: Request, length: int) -> tuple[int, ...]:
        return (*request.salt, -1, *(request.tokens + request.drafts)[:length])

    def answer(self, share: Share, draw) -> None:  # type: ignore[no-untyped-def]
        request = share.request
        self.scheduler.advance(share)
        if not share.samples:
            return
        checked = share.start + share.count - len(request.tokens)
        kept = draw(min(checked, request.longest - len(request.tokens) - 1)) if checked > 0 else 0
        request.tokens += [*request.drafts[:kept], draw(2)]
        request.computed += kept
        request.drafts = []
        left = request.longest - len(request.tokens)
        if left <= 0:
            self.scheduler.remove(request)
            self.alive.remove(request)
        elif left > 1:
            request.drafts = [draw(2) for _ in range(draw(min(3, left - 1)))]

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.alive))
        self.scheduler.remove(request)
        self.scheduler.remove(request)  # twice does no harm
        self.alive.remove(request)

    @rule()
    def forget(self) -> None:
        self.manager.drop_cache()

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check([request.blocks for request in self.alive])
        assert len(self.scheduler.running) <= self.scheduler.max_running
        adapters = Counter(request.adapter for request in self.scheduler.running if request.adapter)
        assert len(adapters) <= self.scheduler.max_adapters
        assert adapters == self.scheduler._adapters
        for request in self.alive:
            assert (request.status is Status.RUNNING) == (request in self.scheduler.running)
            assert request.status is Status.RUNNING or not request.blocks

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for _ in range(STEPS_TO_GET_ON * max(1, len(self.alive))):
            if not self.alive:
                break
            self.one_step(lambda limit: 0)
        assert not self.alive, "a request never finished"
        assert self.manager.available == self.manager.num_blocks
        assert not self.scheduler._coming
        assert not self.scheduler.waiting


TestServing = Serving.TestCase
TestServing.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def scheduler(blocks: int = 64, size: int = 4, running: int = 8, budget: int = 16) -> Scheduler:
    return Scheduler(BlockManager(blocks, size), max_running=running, max_step_tokens=budget, max_context=200)


def run(serving: Scheduler, shares: list[Share]) -> None:
    for share in shares:
        serving.advance(share)
        if share.samples:
            share.request.tokens.append(99)
            if len(share.request.tokens) >= share.request.longest:
                serving.remove(share.request)


def test_a_long_prompt_holds_up_neither_running_nor_new_requests() -> None:
    serving = scheduler(budget=16)
    short = Request([1, 2], 2, 50)
    serving.add(short)
    run(serving, serving.schedule())
    long, late = Request(list(range(100)), 100, 5), Request([3, 4, 5], 3, 5)
    serving.add(long)
    serving.add(late)
    shares = serving.schedule()
    counts = {id(share.request): share.count for share in shares}
    assert counts[id(short)] == 1
    assert counts[id(late)] == 3
    assert counts[id(long)] == 12  # all that the others leave


def test_a_beginning_that_another_request_is_computing_is_waited_for_and_shared() -> None:
    serving = scheduler(budget=64)
    requests = [Request([*range(40), 100 + i], 41, 3) for i in range(4)]
    for request in requests:
        serving.add(request)
    computed = 0
    while serving.unfinished:
        shares = serving.schedule()
        computed += sum(share.count for share in shares)
        run(serving, shares)
    assert [request.cached for request in requests] == [0, 40, 40, 40]
    assert computed == 41 + 3 * 1 + 4 * 2


def test_the_last_token_of_a_prompt_is_computed_though_the_cache_holds_all_of_it() -> None:
    serving = scheduler(size=4, budget=64)
    for cached in (0, 4):
        request = Request([*range(8)], 8, 1)
        serving.add(request)
        shares = serving.schedule()
        assert [(share.start, share.count, share.samples) for share in shares] == [(cached, 8 - cached, True)]
        run(serving, shares)


def test_salts_keep_tenants_apart() -> None:
    serving = scheduler(budget=64)
    for salt in (b"a", b"b"):
        request = Request([*range(40)], 40, 1, salt=salt)
        serving.add(request)
        run(serving, serving.schedule())
        assert request.cached == 0


def test_the_more_important_request_takes_the_place_of_the_less_important_one() -> None:
    serving = scheduler(running=1)
    humble, proud = Request([1, 2], 2, 9, priority=1), Request([3], 1, 2, priority=0)
    serving.add(humble)
    run(serving, serving.schedule())
    serving.add(proud)
    assert [share.request for share in serving.schedule()] == [proud]
    assert humble.status is Status.WAITING
    assert humble.preemptions == 1


def test_what_never_fits_is_refused_with_its_numbers() -> None:
    serving = scheduler(blocks=4, size=4)
    with pytest.raises(GenerationError, match=r"17 tokens .* need 5 blocks of 4, .* 4 in all"):
        serving.add(Request([1] * 10, 10, 7))
    with pytest.raises(
        GenerationError, match=r"150 tokens of prompt and 60 of answer are more than the context of 200"
    ):
        serving.add(Request([1] * 150, 150, 60))


def test_a_digest_names_the_whole_beginning() -> None:
    manager = BlockManager(8, 2)
    one, other = list(manager.digests([1, 2, 3, 4], b"")), list(manager.digests([5, 2, 3, 4], b""))
    assert one[1] != other[1]
    assert one[1] == block_digest(one[0], [3, 4])
    assert list(manager.digests([1, 2, 3, 4, 5], b"", one[:1])) == one[1:]


def test_a_request_lies_in_one_run_of_blocks_where_there_is_room() -> None:
    serving = scheduler(blocks=64, size=4, budget=16)
    requests = [Request([i, 1, 2, 3, 4], 5, 20) for i in range(3)]
    for request in requests:
        serving.add(request)
    tables: dict[int, list[int]] = {}
    while serving.unfinished:
        shares = serving.schedule()
        tables |= {id(share.request): list(share.request.blocks) for share in shares}
        run(serving, shares)
    for blocks in tables.values():
        assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))
