"""A SentencePiece BPE model: rebuilt from its pieces and scores, and read back into them.

The sentencepiece package's own message classes need protobuf, a further dependency, so the few fields are written and read
here. https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from arriero.errors import FormatError

_UNIGRAM, _BPE = 1, 2
MAX_PIECES = 2**22


class PieceType(IntEnum):
    """The kinds of a piece: the numbers of `sentencepiece_model.proto`, which GGUF uses too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` of type BPE holds.

    Attributes:
        tokens, scores, types: of each piece, by id.
        add_dummy_prefix: whether a blank comes before every text.
        removes_blanks: whether leading, trailing and repeated blanks of a text are taken out (`remove_extra_whitespaces`).
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    add_dummy_prefix: bool
    removes_blanks: bool


def read_sentencepiece_model(content: bytes, source: str) -> SentencePieceModel:
    """Read the content of a `tokenizer.model` file.

    Args:
        source: the file's name, for messages.

    Raises:
        FormatError: when it is no SentencePiece model, none of type BPE, or one that changes a text before it splits it.
    """
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    model_type: int | float | bytes = _UNIGRAM
    prefix = removes_blanks = True  # as the library takes a file without these fields
    try:
        for number, value in _fields(content):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                text, score, kind = piece.get(1, b""), piece.get(2, 0.0), piece.get(3, int(PieceType.NORMAL))
                if not isinstance(text, bytes) or not isinstance(score, float) or not isinstance(kind, int):
                    raise ValueError("a piece without text and score")
                if len(tokens) >= MAX_PIECES:
                    raise ValueError(f"more than {MAX_PIECES} pieces")
                tokens.append(text.decode("utf-8"))
                scores.append(score)
                types.append(int(PieceType(kind)))
            elif number == 2 and isinstance(value, bytes):
                model_type = dict(_fields(value)).get(3, _UNIGRAM)
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
                prefix, removes_blanks = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
                if normalizer.get(2):
                    raise FormatError(
                        f"{source}: replaces characters of a text before it splits it; only plain text is supported"
                    )
    except (ValueError, TypeError, struct.error) as error:
        raise FormatError(f"{source}: is not a SentencePiece model ({error}); fetch it again") from error
    if not tokens:
        raise FormatError(f"{source}: is not a SentencePiece model (it has no pieces); fetch it again")
    if model_type != _BPE:
        raise FormatError(f"{source}: is a SentencePiece model of another type than BPE, which is not supported")
    return SentencePieceModel(tokens, scores, types, prefix, removes_blanks)


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[list[str]]:
    """The merge list that makes an HF BPE model choose what SentencePiece's BPE chooses.

    SentencePiece merges the adjacent pair whose union has the best score; every way to split a piece into two pieces is
    therefore a merge, ranked by the score of the piece.
    """
    normal = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == PieceType.NORMAL and token
    }
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                ranked.append((-scores[index], index, min(normal[left], normal[right]), left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]


def write_sentencepiece_model(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], *, add_dummy_prefix: bool
) -> bytes:
    """The content of a `tokenizer.model` file: a serialised `sentencepiece.ModelProto` of type BPE.

    The pieces' normalisation is the identity, as in every LLaMA tokenizer: nothing is folded, no blank removed.
    """
    pieces = b"".join(
        _field(1, _field(1, token.encode("utf-8")) + _float_field(2, score) + _integer_field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    by_type = {kind: index for index, kind in reversed(list(enumerate(types)))}
    byte_fallback = PieceType.BYTE in by_type
    names = {token: index for index, token in enumerate(tokens)}
    trainer = _integer_field(3, _BPE) + _integer_field(4, len(tokens))  # model_type, vocab_size
    trainer += _integer_field(35, int(byte_fallback))
    trainer += _integer_field(40, by_type.get(PieceType.UNKNOWN, 0))
    for field, text in ((41, "<s>"), (42, "</s>"), (43, "<pad>")):  # bos_id, eos_id, pad_id
        trainer += _integer_field(field, names.get(text, -1))
    normalizer = _field(1, b"identity") + _integer_field(3, int(add_dummy_prefix))
    normalizer += _integer_field(4, 0) + _integer_field(5, 1)  # keep blanks, write them as U+2581
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _float_field(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Number and value of every field of a protobuf message.

    Raises:
        ValueError: when it is none.
    """
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        value: int | float | bytes
        match key & 7:
            case 0:
                value, at = _read_varint(message, at)
            case 1:
                value, at = struct.unpack_from("<d", message, at)[0], at + 8
            case 5:
                value, at = struct.unpack_from("<f", message, at)[0], at + 4
            case 2:
                length, at = _read_varint(message, at)
                if length > len(message) - at:
                    raise ValueError(f"{length} bytes are announced at byte {at}, {len(message) - at} are there")
                value, at = message[at : at + length], at + length
            case kind:
                raise ValueError(f"a field of kind {kind} at byte {at}")
        yield key >> 3, value


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        value |= (message[at] & 0x7F) << shift
        at += 1
        if message[at - 1] < 0x80:
            return value, at
    raise ValueError(f"a number that does not end at byte {at}")
