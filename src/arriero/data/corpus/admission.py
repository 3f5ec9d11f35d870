"""Which documents of a unit enter the corpus, and the totals of those that did."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from arriero.data.corpus.encoding import (
    DUPLICATE,
    EMPTY,
    FATE,
    KEPT,
    REPLACED,
    SHORTENED,
    TOO_LONG,
    TOO_SHORT,
    EncodedUnit,
)
from arriero.data.corpus.seen import SeenDocuments


@dataclass
class CorpusTotals:
    """What is in a corpus and what was left out of it.

    Attributes:
        documents, sentences, tokens: in the corpus.
        read: documents read: those in the corpus and those left out.
        empty, too_short, too_long, duplicates: left out.
        shortened: kept, with long runs of a character cut; `replaced`: with bytes that were no UTF-8.
        text_bytes: of the text read.
    """

    documents: int = 0
    sentences: int = 0
    tokens: int = 0
    read: int = 0
    empty: int = 0
    too_short: int = 0
    too_long: int = 0
    duplicates: int = 0
    shortened: int = 0
    replaced: int = 0
    text_bytes: int = 0

    def add(self, unit: EncodedUnit) -> None:
        """Count a unit."""
        fates = np.bincount(unit.marks & FATE, minlength=DUPLICATE + 1)
        kept = unit.marks[(unit.marks & FATE) == KEPT]
        self.documents += len(unit.counts)
        self.sentences += len(unit.lens)
        self.tokens += len(unit.tokens)
        self.read += len(unit.marks)
        self.empty += int(fates[EMPTY])
        self.too_short += int(fates[TOO_SHORT])
        self.too_long += int(fates[TOO_LONG])
        self.duplicates += int(fates[DUPLICATE])
        self.shortened += int(np.count_nonzero(kept & SHORTENED))
        self.replaced += int(np.count_nonzero(kept & REPLACED))
        self.text_bytes += unit.text_bytes


class Admission:
    """Decides in the order of the input, so that the corpus does not depend on who encoded what when.

    Args:
        max_doc_num: documents to read; None: all.
        deduplicate: whether only the first of equal documents enters.

    Attributes:
        totals: of what was admitted.
    """

    def __init__(self, max_doc_num: int | None, deduplicate: bool) -> None:
        self._max_doc_num = max_doc_num
        self._seen = SeenDocuments() if deduplicate else None
        self._digest = hashlib.sha256()
        self.totals = CorpusTotals()

    @property
    def is_full(self) -> bool:
        """Whether no document more is to be read."""
        return self._max_doc_num is not None and self.totals.read >= self._max_doc_num

    @property
    def tokens_sha256(self) -> str:
        """Of the bytes of all ids admitted, in hexadecimal."""
        return self._digest.hexdigest()

    def admit(self, unit: EncodedUnit) -> EncodedUnit:
        """The part of a unit that enters the corpus."""
        if self._max_doc_num is not None and len(unit.marks) > self._max_doc_num - self.totals.read:
            marks = unit.marks[: self._max_doc_num - self.totals.read]
            kept = int(np.count_nonzero((marks & FATE) == KEPT))
            unit = _choose(replace(unit, marks=marks), np.arange(len(unit.counts)) < kept)
        if self._seen is not None:
            new = self._seen.add(unit.hashes)
            if not new.all():
                marks = unit.marks.copy()
                marks[np.flatnonzero((marks & FATE) == KEPT)[~new]] |= DUPLICATE
                unit = _choose(replace(unit, marks=marks), new)
        self._count(unit)
        return unit

    def replay(self, unit: EncodedUnit) -> None:
        """Take note of a unit that was admitted by an earlier run."""
        if self._seen is not None:
            self._seen.add(unit.hashes)
        self._count(unit)

    def _count(self, unit: EncodedUnit) -> None:
        self.totals.add(unit)
        self._digest.update(unit.tokens.tobytes())


def _choose(unit: EncodedUnit, chosen: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> EncodedUnit:
    """A unit with only some of its kept documents; the marks stay as they are.

    Args:
        chosen: [number of kept documents] bool.
    """
    sentences = np.repeat(chosen, unit.counts)
    return replace(
        unit,
        tokens=unit.tokens[np.repeat(sentences, unit.lens)],
        lens=unit.lens[sentences],
        counts=unit.counts[chosen],
        hashes=unit.hashes[chosen] if len(unit.hashes) else unit.hashes,
    )
