"""The documents of a unit, and how a text is cleaned and cut into sentences."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from arriero.data.rows.values import kind_of

_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]»]*(?=\s)|[。！？]+[”’」』）]*|\n")
_NO_UTF8 = "is no UTF-8 text; mend it, or give --errors replace"


@dataclass(frozen=True)
class Refusal:
    """A document that cannot be used.

    Attributes:
        line: its line within the unit (or row), from 0.
        reason: what is wrong and what to do.
    """

    line: int
    reason: str


class RefusedDocument(Exception):
    """Carries a `Refusal` out of the loops that find it."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.refusal = Refusal(line, reason)


def documents_of(kind: str, payload: bytes | list[str], json_key: str, replace: bool) -> tuple[list[str], list[bool]]:
    """The texts of a unit, and for each whether bytes that are no UTF-8 were replaced by U+FFFD.

    Args:
        kind: as `arriero.data.corpus.units.Unit.kind`.
        replace: whether such bytes are replaced; else they are refused.

    Raises:
        RefusedDocument: a line of JSON that is no object with a text under `json_key`, or bytes that are no UTF-8.
    """
    if not isinstance(payload, bytes):
        return payload, [False] * len(payload)
    if kind == "jsonl":
        return _from_json_lines(payload, json_key, replace)
    if b"\r" in payload:
        payload = payload.replace(b"\r\n", b"\n")
    texts: list[str] = []
    replaced: list[bool] = []
    for line, content in [(0, payload)] if kind == "file" else _between_blank_lines(payload):
        text, changed = _decode(content, line, replace)
        texts.append(text)
        replaced.append(changed)
    return texts, replaced


def _from_json_lines(payload: bytes, json_key: str, replace: bool) -> tuple[list[str], list[bool]]:
    texts: list[str] = []
    replaced: list[bool] = []
    for number, line in enumerate(payload.split(b"\n")):
        if not line.strip():
            continue
        source, changed = _decode(line, number, replace)
        try:
            row = json.loads(source, parse_int=float)  # which takes any number of digits; texts alone are wanted
        except (ValueError, RecursionError) as error:
            raise RefusedDocument(number, f"is not JSON ({str(error).splitlines()[0][:200]})") from error
        if not isinstance(row, dict):
            raise RefusedDocument(number, f"is no JSON object but {kind_of(row)}")
        if json_key not in row:
            keys = ", ".join(sorted(row))[:200] or "none"
            raise RefusedDocument(number, f"has no field {json_key!r}; its fields: {keys}; name one by --json_key")
        text = row[json_key]
        if not isinstance(text, str):
            raise RefusedDocument(number, f"has {kind_of(text)} and no text under {json_key!r}; see --json_key")
        texts.append(text)
        replaced.append(changed)
    return texts, replaced


def _decode(content: bytes, line: int, replace: bool) -> tuple[str, bool]:
    try:
        return content.decode("utf-8"), False
    except UnicodeDecodeError as error:
        if replace:
            return content.decode("utf-8", "replace"), True
        before = content[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise RefusedDocument(line + before.count(b"\n"), f"byte {column} of it {_NO_UTF8}") from error


def _between_blank_lines(payload: bytes) -> list[tuple[int, bytes]]:
    """(its first line, content) of every stretch of lines that hold more than white space."""
    found: list[tuple[int, bytes]] = []
    start = 0
    stretch: list[bytes] = []
    for number, line in enumerate(payload.split(b"\n")):
        if line.strip():
            if not stretch:
                start = number
            stretch.append(line)
        elif stretch:
            found.append((start, b"\n".join(stretch)))
            stretch = []
    if stretch:
        found.append((start, b"\n".join(stretch)))
    return found


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, without the white space around them.

    A sentence ends at a line's end, after `.`, `!`, `?` or `…` (with closing quotes and brackets) before white space, and
    after `。`, `！` or `？`. Abbreviations are not known: "Mr. Smith" is cut in two.
    """
    sentences: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


class RunShortener:
    """Cuts runs of one character to a length; a page of dashes teaches nothing.

    Args:
        length: the longest run that stays as it is, in characters.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        # A run that is too long covers two neighbours among every `stride`-th character, whatever it starts at: almost
        # every text is passed by looking at these only, where the pattern would try each character.
        self._stride = (length + 1) // 2
        self._pattern = re.compile(rf"(.)\1{{{length},}}", re.DOTALL)

    def shorten(self, text: str) -> str:
        """The text with its long runs cut."""
        if not self._may_have_long_run(text):
            return text
        return self._pattern.sub(lambda match: match[1] * self._length, text)

    def _may_have_long_run(self, text: str) -> bool:
        stride = self._stride
        sample = text[::stride]
        for index in range(len(sample) - 1):
            if sample[index] == sample[index + 1]:
                start = index * stride
                if text[start : start + stride] == sample[index] * stride:
                    return True
        return False
