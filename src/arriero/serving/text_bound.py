"""How many tokens a text has at least, by its length alone: one that is too long is refused before it is tokenized."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from arriero.data.tokenizer import Tokenizer
from arriero.errors import ArrieroError

# What some tokenizers make shorter: runs of blanks, what has no token, capitals, other forms of letters.
PROBES = (
    "   a",
    "a   ",
    "a  b   c\t\td\n\n\n e",
    "a\U000f0000\U000f0000b\x01\x01\u200bc\ufeff",
    "aAZÀĲ",
    "a\ufb01\uff21\u2460\u210c",
)
COMPOSED = "ae\u0301o\u0323\u0302\u1112\u1161\u11ab"  # what NFC makes shorter
NFC_FACTOR = (
    3  # it makes no UTF-8 shorter than a third (https://www.unicode.org/faq/normalization, the factors of expansion)
)


@dataclass(frozen=True)
class TextBound:
    """A lower bound of a text's tokens.

    Attributes:
        bytes_a_token: of a text, at most; None: there is no bound, since the tokenizer drops something of texts.
        writes_turns: whether the chat template writes out all that the user says, but for blanks around it.
    """

    bytes_a_token: int | None
    writes_turns: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TextBound:
        """That of a tokenizer, which is tried on texts that others make shorter."""
        return cls(_bytes_a_token(tokenizer), _writes_turns(tokenizer))

    def tokens(self, text: str) -> int:
        """At least so many."""
        return 0 if self.bytes_a_token is None else len(text.encode("utf-8", "replace")) // self.bytes_a_token

    def tokens_said(self, said: Iterable[str]) -> int:
        """At least so many in a conversation, of what its user says."""
        return sum(self.tokens(text.strip()) for text in said) if self.writes_turns else 0


def _bytes_a_token(tokenizer: Tokenizer) -> int | None:
    def comes_back(text: str) -> str:
        return tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False)

    try:
        if any(comes_back(probe) != probe for probe in PROBES):
            return None
        composed = comes_back(COMPOSED)
    except ArrieroError:
        return None
    if composed not in (COMPOSED, unicodedata.normalize("NFC", COMPOSED)):
        return None
    longest = max(tokenizer.byte_lengths(), default=1)
    named = max((len(name.encode()) for name in tokenizer.special_tokens), default=1)
    return max(longest, named, 1) * (1 if composed == COMPOSED else NFC_FACTOR)


def _writes_turns(tokenizer: Tokenizer) -> bool:
    first, last = "q7w the first", "z9k the last"
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": last},
    ]
    try:
        written = tokenizer.render_chat(turns)
    except ArrieroError:
        return False
    return first in written and last in written
