"""Text out of token ids, all at once or one id at a time, by way of bytes.

A token of a LLaMA-family vocabulary stands for bytes, and a character may be spread over several tokens. Text is
therefore built from the bytes of all tokens, decoded as UTF-8; a sequence that is not complete yet is held back. Bytes
that are no UTF-8 become U+FFFD, as the Unicode standard advises (one for each maximal part of an ill-formed sequence).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from dataclasses import dataclass

REPLACEMENT = "▁"  # SentencePiece's stand-in for a space


def byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable character -> the byte it stands for (encoder.py of https://github.com/openai/gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update((chr(256 + i), byte) for i, byte in enumerate(others))
    return alphabet


def byte_of_piece(piece: str) -> int | None:
    """The byte that a byte-fallback piece such as `<0x0A>` stands for; None for any other piece."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


class TokenBytes(dict[int, bytes]):
    """The bytes of each token id, worked out when first asked for."""

    def __init__(self, compute: Callable[[int], bytes]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, token_id: int) -> bytes:
        value = self[token_id] = self._compute(token_id)
        return value


@dataclass(frozen=True)
class ByteDecoding:
    """How ids become text.

    Attributes:
        token_bytes: id -> bytes; b"" for an id that no token has.
        special_ids: ids that `skip_special_tokens` leaves out.
        strip_leading_space: whether the first character of the text, if a space, is one that encoding put there.
        separator: bytes between two tokens.
    """

    token_bytes: TokenBytes
    special_ids: frozenset[int]
    strip_leading_space: bool = False
    separator: bytes = b""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        if skip_special_tokens:
            special = self.special_ids
            ids = [token_id for token_id in ids if token_id not in special]
        text = self.separator.join(map(self.token_bytes.__getitem__, ids)).decode("utf-8", "replace")
        return text[1:] if self.strip_leading_space and text.startswith(" ") else text


class StreamDecoder:
    """The same text in pieces: every `push` and then `flush`, joined, equal `ByteDecoding.decode` of all ids."""

    def __init__(self, decoding: ByteDecoding, skip_special_tokens: bool = True) -> None:
        self._decoding = decoding
        self._skipped = decoding.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = decoding.strip_leading_space
        self._separator = b""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is still incomplete."""
        if token_id in self._skipped:
            return ""
        data = self._separator + self._decoding.token_bytes[token_id]
        self._separator = self._decoding.separator
        return self._stripped(self._utf8.decode(data))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character never became complete."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
