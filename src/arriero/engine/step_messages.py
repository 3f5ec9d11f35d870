"""What the rank that schedules tells the ranks that follow it, as lists of integers: typed, bounded, checked on arrival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from arriero.engine.request_adapters import NO_ADAPTER
from arriero.engine.runner import Runner, Work
from arriero.errors import GenerationError, PeerError

HEADER = 4  # integers: MAGIC, the message's number, its kind, how many integers follow
MAGIC = 0x61727269_00000001  # the last digits are the version of the layout below
MAX_PAYLOAD = 1 << 24  # integers; a step of 1,000 sequences of 128k tokens each has half as many
_ITEM = 5  # integers before a sequence's tokens and blocks


class Kind(IntEnum):
    """What a message is about."""

    RUN = 1  # compute these tokens
    BEGIN = 2  # store a learned prefix
    IDLE = 3  # nothing to do, but rank 0 is alive
    FAILED = 4  # the step before went wrong in rank 0
    CLOSE = 5  # there is nothing more to come


@dataclass(frozen=True)
class Message:
    """One thing to do.

    Attributes:
        work: of RUN.
        blocks, start, end, adapter: of BEGIN; see `Runner.begin`.
    """

    kind: Kind
    work: tuple[Work, ...] = ()
    blocks: tuple[int, ...] = ()
    start: int = 0
    end: int = 0
    adapter: int = NO_ADAPTER


@dataclass(frozen=True)
class Limits:
    """What a runner can compute.

    Attributes:
        vocab_size: ids are below it.
        num_blocks, block_size: of the cache.
        positions: of a sequence, with those of the prefix.
        prefix_length: learned keys and values before every sequence.
    """

    vocab_size: int
    num_blocks: int
    block_size: int
    positions: int
    prefix_length: int = 0

    @classmethod
    def of(cls, runner: Runner) -> Limits:
        """Those of a runner."""
        return cls(
            runner.vocab_size,
            runner.num_blocks,
            runner.block_size,
            runner.context + runner.prefix_length,
            runner.prefix_length,
        )


def encode(message: Message) -> list[int]:
    """The integers that follow the header.

    RUN: the number of sequences; of each its start, its numbers of tokens, blocks and wanted logits, its adapter, the tokens,
    the blocks. BEGIN: start, end, adapter, the blocks. Others: none. Adapters have a place, but no follower knows any yet.

    Raises:
        GenerationError: a step that is larger than a message may be.
    """
    numbers: list[int] = []
    if message.kind is Kind.RUN:
        numbers.append(len(message.work))
        for item in message.work:
            numbers += (item.start, len(item.tokens), len(item.blocks), item.logits, item.adapter)
            numbers += item.tokens
            numbers += item.blocks
    elif message.kind is Kind.BEGIN:
        numbers = [message.start, message.end, message.adapter, *message.blocks]
    if len(numbers) > MAX_PAYLOAD:
        raise GenerationError(
            f"the step's message has {len(numbers)} numbers and {MAX_PAYLOAD} are possible: run fewer or shorter requests"
        )
    return numbers


def header(kind: Kind, number: int, length: int) -> list[int]:
    """What comes before `length` integers of the message with this number."""
    return [MAGIC, number, int(kind), length]


def read_header(numbers: Sequence[int], number: int) -> tuple[Kind, int]:
    """Kind and length of the message with this number.

    Raises:
        PeerError: no header, one of another message, or a length that is not possible.
    """
    if len(numbers) != HEADER or numbers[0] != MAGIC:
        raise PeerError("rank 0 sent what is no message of the engine: do all processes run the same version?")
    if numbers[1] != number:
        raise PeerError(f"rank 0 sent message {numbers[1]} and {number} was to come: the processes are out of step")
    if numbers[2] not in list(Kind):
        raise _malformed(f"its kind is {numbers[2]}")
    if not 0 <= numbers[3] <= MAX_PAYLOAD:
        raise _malformed(f"its length is {numbers[3]}, possible are 0 to {MAX_PAYLOAD}")
    return Kind(numbers[2]), numbers[3]


def decode(kind: Kind, numbers: Sequence[int], limits: Limits) -> Message:
    """The message that was encoded.

    Raises:
        PeerError: numbers that are none, or ask for what the runner cannot compute.
    """
    if kind is Kind.RUN:
        return Message(kind, _decode_work(numbers, limits))
    if kind is Kind.BEGIN:
        if len(numbers) < 3:
            raise _malformed("it ends too early")
        start, end, adapter, *blocks = numbers
        if not 0 <= start < end <= limits.prefix_length:
            raise _malformed(f"it begins a prefix of {limits.prefix_length} with the positions {start} to {end}")
        _check_adapter(adapter)
        _check_blocks(blocks, end, limits)
        return Message(kind, (), tuple(blocks), start, end, adapter)
    if numbers:
        raise _malformed(f"{kind.name} has {len(numbers)} numbers")
    return Message(kind)


def _decode_work(numbers: Sequence[int], limits: Limits) -> tuple[Work, ...]:
    if not numbers or not 1 <= numbers[0] <= len(numbers):
        raise _malformed("it holds no work")
    work = []
    at = 1
    for _ in range(numbers[0]):
        if len(numbers) - at < _ITEM:
            raise _malformed("it ends too early")
        start, count, held, logits, adapter = numbers[at : at + _ITEM]
        at += _ITEM
        if count < 1 or held < 0 or count + held > len(numbers) - at:
            raise _malformed(f"a sequence has {count} tokens and {held} blocks, and {len(numbers) - at} numbers follow")
        if start < limits.prefix_length or start + count > limits.positions:
            raise _malformed(f"positions {start} to {start + count} of {limits.positions}")
        if not 0 <= logits <= count:
            raise _malformed(f"{logits} logits of {count} tokens")
        _check_adapter(adapter)
        tokens, blocks = numbers[at : at + count], numbers[at + count : at + count + held]
        at += count + held
        if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
            raise _malformed(f"token ids {min(tokens)} to {max(tokens)} of {limits.vocab_size}")
        _check_blocks(blocks, start + count, limits)
        work.append(Work(tokens, start, blocks, logits, adapter))
    if at != len(numbers):
        raise _malformed(f"{len(numbers) - at} numbers are left over")
    return tuple(work)


def _check_adapter(adapter: int) -> None:
    if adapter != NO_ADAPTER:
        raise _malformed(f"adapter {adapter} is not known here")


def _check_blocks(blocks: Sequence[int], end: int, limits: Limits) -> None:
    if len(blocks) * limits.block_size < end:
        raise _malformed(f"{len(blocks)} blocks of {limits.block_size} do not hold {end} tokens")
    if min(blocks) < 0 or max(blocks) >= limits.num_blocks:
        raise _malformed(f"blocks {min(blocks)} to {max(blocks)} of {limits.num_blocks}")


def _malformed(what: str) -> PeerError:
    return PeerError(f"rank 0 sent a message that cannot be ({what}): do all processes run the same version and model?")
