"""What rank 0 tells the others arrives as it was sent, or is refused; nothing in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.engine.runner import Work
from arriero.engine.step_messages import (
    HEADER,
    MAGIC,
    MAX_PAYLOAD,
    Kind,
    Limits,
    Message,
    decode,
    encode,
    header,
    read_header,
)
from arriero.errors import PeerError

LIMITS = Limits(vocab_size=50, num_blocks=20, block_size=4, positions=40, prefix_length=3)
BLOCKS = st.lists(st.integers(0, LIMITS.num_blocks - 1), min_size=10, max_size=12)


@st.composite
def works(draw: st.DrawFn) -> Work:
    start = draw(st.integers(LIMITS.prefix_length, LIMITS.positions - 1))
    tokens = draw(st.lists(st.integers(0, LIMITS.vocab_size - 1), min_size=1, max_size=LIMITS.positions - start))
    return Work(tokens, start, draw(BLOCKS), draw(st.integers(0, len(tokens))))


@st.composite
def begins(draw: st.DrawFn) -> Message:
    start = draw(st.integers(0, LIMITS.prefix_length - 1))
    end = draw(st.integers(start + 1, LIMITS.prefix_length))
    return Message(Kind.BEGIN, (), tuple(draw(BLOCKS)), start, end)


MESSAGES = st.one_of(
    st.lists(works(), min_size=1, max_size=5).map(lambda work: Message(Kind.RUN, tuple(work))),
    begins(),
    st.sampled_from([Kind.IDLE, Kind.FAILED, Kind.CLOSE]).map(Message),
)


@given(MESSAGES)
def test_what_was_sent_arrives(message: Message) -> None:
    assert decode(message.kind, encode(message), LIMITS) == message


def within(message: Message) -> bool:
    """Whether a runner of these limits can compute it; said once more, in other words."""
    if message.kind is Kind.BEGIN:
        held = len(message.blocks) * LIMITS.block_size
        return (
            set(range(message.start, message.end)) <= set(range(min(LIMITS.prefix_length, held)))
            and message.start != message.end
            and set(message.blocks) <= set(range(LIMITS.num_blocks))
            and message.adapter == 0
        )
    return all(
        item.tokens
        and set(item.tokens) <= set(range(LIMITS.vocab_size))
        and set(item.blocks) <= set(range(LIMITS.num_blocks))
        and {item.start, item.start + len(item.tokens) - 1} <= set(range(LIMITS.prefix_length, LIMITS.positions))
        and (item.start + len(item.tokens) - 1) // LIMITS.block_size < len(item.blocks)
        and item.logits in range(len(item.tokens) + 1)
        and item.adapter == 0
        for item in message.work
    )


def survives(kind: Kind, numbers: list[int]) -> None:
    """Numbers are refused, or are those of a message that can be computed."""
    try:
        message = decode(kind, numbers, LIMITS)
    except PeerError:
        return
    assert encode(message) == numbers
    assert within(message)
    assert message.work or kind is not Kind.RUN


@given(
    MESSAGES,
    st.lists(
        st.tuples(st.sampled_from(["change", "add", "remove", "cut"]), st.integers(0, 200), st.integers(-3, 60)),
        min_size=1,
    ),
)
def test_a_message_that_was_changed_is_refused_or_another_one(
    message: Message, changes: list[tuple[str, int, int]]
) -> None:
    numbers = encode(message)
    for change, place, number in changes:
        at = place % (len(numbers) + 1)
        if change == "add":
            numbers.insert(at, number)
        elif change == "cut":
            del numbers[at:]
        elif at < len(numbers):
            if change == "remove":
                del numbers[at]
            else:
                numbers[at] = number
    survives(message.kind, numbers)


@given(st.sampled_from(list(Kind)), st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 12), max_size=40))
def test_any_numbers_are_refused_or_a_message(kind: Kind, numbers: list[int]) -> None:
    survives(kind, numbers)


WORK = Work([1, 2, 3], 5, [0, 1], 1)
ALONE = encode(Message(Kind.RUN, (WORK,)))


@pytest.mark.parametrize(
    ("place", "number", "said"),
    [
        (0, 0, "no work"),
        (0, 2, "ends too early"),
        (1, 2, "positions 2 to 5"),
        (1, 38, "positions 38 to 41 of 40"),
        (2, 0, "0 tokens"),
        (2, 1 << 40, f"{1 << 40} tokens"),
        (3, -1, "-1 blocks"),
        (3, 1, "1 blocks of 4 do not hold 8 tokens"),
        (4, 4, "4 logits of 3 tokens"),
        (5, 1, "adapter 1"),
        (6, 50, "token ids 2 to 50 of 50"),
        (10, 20, "blocks 0 to 20 of 20"),
    ],
)
def test_what_is_wrong_is_said(place: int, number: int, said: str) -> None:
    numbers = [*ALONE]
    numbers[place] = number
    with pytest.raises(PeerError, match=said):
        decode(Kind.RUN, numbers, LIMITS)


def test_headers() -> None:
    for kind in Kind:
        assert read_header(header(kind, 7, 11), 7) == (kind, 11)
    good = header(Kind.RUN, 7, 11)
    assert len(good) == HEADER
    for wrong, said in {
        (MAGIC + 1, 7, 1, 11): "same version",
        (MAGIC, 8, 1, 11): "message 8 and 7 was to come",
        (MAGIC, 7, 9, 11): "kind is 9",
        (MAGIC, 7, 1, -1): "length is -1",
        (MAGIC, 7, 1, MAX_PAYLOAD + 1): f"length is {MAX_PAYLOAD + 1}",
        (MAGIC, 7, 1): "same version",
    }.items():
        with pytest.raises(PeerError, match=said):
            read_header(wrong, 7)
