"""Which blocks of the key-value cache hold which tokens. Integers only: nothing here knows of tensors."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_USED, _OPEN, _RESERVED, _CACHED = 0, 1, 2, 3


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Names what a full block holds: its own tokens and, by the digest of the block before, all that come before them.

    BLAKE2b of 16 bytes: that two different beginnings meet is out of the question (birthday bound 2^64), so equal digests are
    taken for equal tokens.
    """
    return hashlib.blake2b(array("q", tokens).tobytes(), key=parent[:64], digest_size=16).digest()


@dataclass
class CacheCounters:
    """What a cache has done since it was made.

    Attributes:
        asked: full blocks of prompts that were looked up.
        found: those of them that were held already.
        evicted: blocks whose content was given up for another one's.
    """

    asked: int = 0
    found: int = 0
    evicted: int = 0


class BlockManager:
    """Blocks of `block_size` tokens, counted by who uses them.

    A block that nobody uses any more keeps what it holds, under its digest, until it is needed: the one that was let go
    first goes first. Neighbours are preferred, so that a sequence lies in few runs.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, prefix_cache: bool = True, take_turns: bool = False
    ) -> None:
        """
        Args:
            prefix_cache: let full blocks be shared.
            take_turns: give out all blocks before one comes again, for a runner that finds a use for what they hold.

        Raises:
            ValueError: a number below 1.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens: both must be at least 1")
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self.counters = CacheCounters()
        self._users = [0] * num_blocks
        self._state = bytearray([_OPEN]) * num_blocks
        self._digest: dict[int, bytes] = {}  # block -> what it holds
        self._block: dict[bytes, int] = {}  # what is held -> block
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached blocks without a user, the first to go first
        self._empty = num_blocks  # blocks that hold nothing: open and reserved ones
        self._take_turns, self._last = take_turns, -1

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return self._empty + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody uses."""
        return self.num_blocks - self.available

    def blocks_for(self, tokens: int) -> int:
        """How many blocks so many tokens fill."""
        return -(-tokens // self.block_size)

    def digests(self, tokens: Sequence[int], salt: bytes, known: Sequence[bytes] = ()) -> Iterator[bytes]:
        """Of each full block of a sequence, from the first that is not in `known`.

        Args:
            salt: sequences with different ones share nothing.
            known: digests of its first blocks.
        """
        parent = known[-1] if known else hashlib.blake2b(salt, digest_size=16).digest()
        for start in range(len(known) * self.block_size, len(tokens) - self.block_size + 1, self.block_size):
            parent = block_digest(parent, tokens[start : start + self.block_size])
            yield parent

    def held(self, digests: Sequence[bytes]) -> int:
        """How many of a sequence's first blocks the cache holds."""
        for count, digest in enumerate(digests):
            if digest not in self._block:
                return count
        return len(digests)

    def share(self, digests: Sequence[bytes]) -> list[int]:
        """Use the blocks that the cache holds for a sequence's beginning, as many as there are, and say which."""
        found = [self._block[digest] for digest in digests[: self.held(digests)]]
        self.counters.asked += len(digests)
        self.counters.found += len(found)
        for block in found:
            if self._users[block] == 0:
                del self._idle[block]
                self._state[block] = _USED
            self._users[block] += 1
        return found

    def idle_among(self, digests: Sequence[bytes]) -> int:
        """How many of a sequence's held first blocks have no user, and so count as available."""
        return sum(self._users[self._block[digest]] == 0 for digest in digests[: self.held(digests)])

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Use `count` blocks that hold nothing of worth.

        Args:
            after: the block that they follow in their sequence.

        Raises:
            ValueError: there are not so many: ask `available` first.
        """
        if count > self.available:
            raise ValueError(f"{count} blocks are wanted, {self.available} of {self.num_blocks} are available")
        taken: list[int] = []
        for _ in range(count):
            after = self._next(after)
            taken.append(after)
        return taken

    def _next(self, after: int | None) -> int:
        block = -1
        if after is not None and after + 1 < self.num_blocks and self._state[after + 1] in (_OPEN, _RESERVED):
            block = after + 1
        if block < 0 and self._take_turns:
            block = self._state.find(_OPEN, self._last + 1)
        if block < 0:
            block = self._state.find(_OPEN)
        if block < 0:
            block = self._state.find(_RESERVED)
        if block < 0:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            self.counters.evicted += 1
        else:
            self._empty -= 1
        self._state[block], self._users[block] = _USED, 1
        self._last = block
        return block

    def reserve(self, count: int) -> range:
        """A run of open blocks that others leave alone as long as they can; empty where there is no such run.

        The blocks stay available: this only keeps neighbours together.
        """
        start = self._state.find(bytes([_OPEN]) * count) if count else -1
        if start < 0:
            return range(0)
        self._state[start : start + count] = bytes([_RESERVED]) * count
        return range(start, start + count)

    def release_reserved(self, run: range) -> None:
        """Give up what is left of a reservation."""
        for block in run:
            if self._state[block] == _RESERVED:
                self._state[block] = _OPEN

    def seal(self, block: int, digest: bytes) -> None:
        """Say what a full block holds, so that other sequences can share it."""
        if self.prefix_cache and digest not in self._block and block not in self._digest:
            self._block[digest], self._digest[block] = block, digest

    def release(self, blocks: Sequence[int]) -> None:
        """Stop using a sequence's blocks. The last ones go first when room is needed, since the first are likelier to be
        shared.

        Raises:
            ValueError: one that nobody uses.
        """
        for block in reversed(blocks):
            if self._users[block] < 1:
                raise ValueError(f"block {block} is released, and nobody uses it")
            self._users[block] -= 1
            if self._users[block] > 0:
                continue
            if block in self._digest:
                self._idle[block] = None
                self._state[block] = _CACHED
            else:
                self._state[block] = _OPEN
                self._empty += 1

    def drop_cache(self) -> None:
        """Forget what blocks without a user hold."""
        for block in self._idle:
            self._forget(block)
            self._state[block] = _OPEN
            self._empty += 1
        self._idle.clear()

    def _forget(self, block: int) -> None:
        del self._block[self._digest.pop(block)]

    def check(self, sequences: Sequence[Sequence[int]]) -> None:
        """Compare the counts with the block tables of all sequences.

        Raises:
            AssertionError: something leaked, or is used twice without being shared.
        """
        users = [0] * self.num_blocks
        for blocks in sequences:
            assert len(set(blocks)) == len(blocks), "a sequence holds a block twice"
            for block in blocks:
                users[block] += 1
        assert users == self._users, "the counts differ from the block tables"
        assert sum(state in (_OPEN, _RESERVED) for state in self._state) == self._empty, "empty blocks are miscounted"
        idle = {block for block in range(self.num_blocks) if self._state[block] == _CACHED}
        assert idle == set(self._idle), "idle blocks are miscounted"
        assert all(users[block] == 0 for block in idle), "an idle block has a user"
        assert all(users[block] > 0 for block in range(self.num_blocks) if self._state[block] == _USED), "a leak"
        assert {block: digest for digest, block in self._block.items()} == self._digest, "digests are inconsistent"
