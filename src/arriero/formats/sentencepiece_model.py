"""A SentencePiece BPE model rebuilt from its pieces and scores."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum


class PieceType(IntEnum):
    """The kinds of a piece: the numbers of `sentencepiece_model.proto`, which GGUF uses too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


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
    # The sentencepiece package's own message classes need protobuf, a further dependency, so the few fields are encoded
    # here. https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    pieces = b"".join(
        _field(1, _field(1, token.encode("utf-8")) + _float_field(2, score) + _integer_field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    by_type = {kind: index for index, kind in reversed(list(enumerate(types)))}
    byte_fallback = PieceType.BYTE in by_type
    names = {token: index for index, token in enumerate(tokens)}
    trainer = _integer_field(3, 2) + _integer_field(4, len(tokens))  # model_type BPE, vocab_size
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
