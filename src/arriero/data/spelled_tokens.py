"""Control tokens that bare texts spell out: they are read as letters, which who wrote them into a file may not expect."""

from __future__ import annotations

import re
from collections.abc import Collection

from arriero.data.samples import Sample


class SpelledTokens:
    """Counts the rows of bare text in which special tokens are spelled out."""

    def __init__(self, special_tokens: Collection[str]) -> None:
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._rows, self._first = 0, ""

    def add(self, sample: Sample) -> None:
        """A turn of a chat is no such row: the template writes its control tokens."""
        found = None if sample.chat else self._names.search(f"{sample.prompt}\n{sample.target or ''}")
        if found is None:
            return
        self._rows += 1
        self._first = self._first or f"such as {found[0]!r} ({sample.name})"

    def __str__(self) -> str:
        """The warning, "" where there is nothing to say."""
        if not self._rows:
            return ""
        return (
            f"{self._rows:,} rows spell out special tokens, {self._first}, which are read as text: give conversations "
            "as 'messages', which the chat template writes"
        )
