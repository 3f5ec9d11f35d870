"""How far a corpus is: a bar on a terminal, lines elsewhere, and the totals at the end."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from arriero.data.corpus.admission import CorpusTotals

# A line for every hundred documents would be many a second.
SECONDS_BETWEEN_LINES = 1.0


class Progress:
    """Tells documents, MB of text a second and tokens a second, on stderr.

    Args:
        total_bytes: size of the input files; `done_bytes`: of what an earlier run has finished of them.
        log_interval: documents between lines where stderr is no terminal.
        totals: of the units that were there before; they do not count for the speed.
    """

    def __init__(self, total_bytes: int, done_bytes: int, log_interval: int, totals: CorpusTotals) -> None:
        self._log_interval = log_interval
        self._started = self._told = time.monotonic()
        self._tokens, self._bytes = totals.tokens, totals.text_bytes
        self._next = totals.read + log_interval
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, leave=False, file=sys.stderr
            )

    def update(self, consumed: int, totals: CorpusTotals) -> None:
        """Go on by a unit that took `consumed` bytes of the input files."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self.speed(totals), refresh=False)
            self._bar.update(consumed)
        elif totals.read >= self._next and now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            self._next = totals.read + self._log_interval
            print(
                f"{totals.read:,} documents | {totals.tokens:,} tokens | {self.speed(totals)}",
                file=sys.stderr,
                flush=True,
            )

    def speed(self, totals: CorpusTotals) -> str:
        """The speed since the start of this run."""
        seconds = max(1e-9, time.monotonic() - self._started)
        megabytes = (totals.text_bytes - self._bytes) / 1e6 / seconds
        return f"{megabytes:.2f} MB/s | {(totals.tokens - self._tokens) / seconds:,.0f} tokens/s"

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def format_totals(totals: CorpusTotals) -> list[str]:
    """The totals as lines."""
    documents, sentences = max(1, totals.documents), max(1, totals.sentences)
    lines = [
        f"{totals.documents:,} documents, {totals.sentences:,} sentences, {totals.tokens:,} tokens "
        f"out of {totals.text_bytes / 1e6:,.2f} MB of text",
        f"on average {totals.tokens / documents:,.1f} tokens a document, {totals.tokens / sentences:,.1f} a sentence, "
        f"{totals.sentences / documents:,.1f} sentences a document",
    ]
    left_out = {
        "empty": totals.empty,
        "below --min_doc_length": totals.too_short,
        "above --max_doc_length": totals.too_long,
        "duplicates": totals.duplicates,
    }
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
    if reasons:
        lines.append(f"left out of {totals.read:,} documents read: {reasons}")
    if totals.shortened:
        lines.append(f"{totals.shortened:,} documents had runs of one character cut to --max_repeated_len")
    if totals.replaced:
        lines.append(f"{totals.replaced:,} documents had bytes that are no UTF-8 replaced by U+FFFD")
    return lines
