"""Incremental decoding: whatever the ids, the pieces add up to the whole and no piece shows half a character."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.data.stream_decoder import (
    ByteDecoding,
    StreamDecoder,
    TokenBytes,
    byte_level_alphabet,
    byte_of_piece,
)

# 256 single bytes, then whole and broken pieces of characters, then two special tokens.
PIECES = [bytes([byte]) for byte in range(256)]
PIECES += [b"a", b" ", b" word", "é".encode(), "你好".encode(), "🙂".encode()]
PIECES += ["🙂".encode()[:2], "🙂".encode()[2:], "你".encode()[:1], "你".encode()[1:] + b"x", "\ufffd".encode(), b""]
SPECIAL = {len(PIECES), len(PIECES) + 1}
PIECES += [b"<s>", b"</s>"]
ids = st.lists(st.integers(0, len(PIECES) - 1), max_size=40)


def decoding(strip: bool = False, separator: bytes = b"") -> ByteDecoding:
    return ByteDecoding(TokenBytes(PIECES.__getitem__), frozenset(SPECIAL), strip, separator)


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("separator", [b"", b" "])
@pytest.mark.parametrize("skip", [True, False])
@given(ids=ids)
def test_pieces_add_up(strip: bool, separator: bytes, skip: bool, ids: list[int]) -> None:
    rule = decoding(strip, separator)
    stream = StreamDecoder(rule, skip)
    assert "".join(map(stream.push, ids)) + stream.flush() == rule.decode(ids, skip)


@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 200), max_size=20))
def test_valid_text_never_shows_a_replacement_character(text: str, cuts: list[int]) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [data[start:end] for start, end in pairwise(edges)]
    stream = StreamDecoder(ByteDecoding(TokenBytes(parts.__getitem__), frozenset()))
    shown = ""
    for token_id in range(len(parts)):
        piece = stream.push(token_id)
        shown += piece
        # Never ahead of the text, and "\ufffd" only where the text has it.
        assert text.startswith(shown)
        # Nothing is held back longer than its character is incomplete.
        assert len(data[: edges[token_id + 1]]) - len(shown.encode()) < 4
    assert shown + stream.flush() == text
    assert stream.flush() == ""


def test_an_incomplete_end_is_one_replacement_character() -> None:
    stream = StreamDecoder(decoding())
    assert [stream.push(byte) for byte in "🙂".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_a_leading_space_goes_only_once() -> None:
    stream = StreamDecoder(decoding(strip=True))
    word = PIECES.index(b" word")
    assert [stream.push(i) for i in (min(SPECIAL), word, word)] == ["", "word", " word"]


def test_byte_level_alphabet_is_that_of_the_tokenizers_library() -> None:
    from tokenizers import decoders, pre_tokenizers

    alphabet = byte_level_alphabet()
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    for character, byte in alphabet.items():
        if byte < 128:
            assert decoders.ByteLevel().decode([character]) == chr(byte)


def test_byte_pieces() -> None:
    assert byte_of_piece("<0x0A>") == 10
    assert byte_of_piece("<0xFF>") == 255
    for piece in ("<0xZZ>", "<0x0A", "0x0A", "<0x>", "a", ""):
        assert byte_of_piece(piece) is None
