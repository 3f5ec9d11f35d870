"""Whether the ids of a corpus are those of the model's vocabulary."""

from __future__ import annotations

import numpy as np

from arriero.data.corpus.index_cache import Arrays, IndexCache
from arriero.data.corpus.token_files import TokenCorpus
from arriero.errors import DataError

# ids looked at once
BLOCK = 1 << 22


def check_token_ids(corpus: TokenCorpus, vocab_size: int, cache: IndexCache | None = None) -> None:
    """Make sure that every id is in 0 .. vocab_size - 1.

    The whole corpus is read for it; with a cache only the first time, for whatever vocabulary.

    Raises:
        DataError: naming the first id outside, its document and its place there.
    """
    if cache is None:
        least, greatest = id_range(corpus)
    else:
        description = {"kind": "range of the token ids", "corpus": corpus.fingerprint}
        entry = cache.get(
            description, lambda: {"range": np.array(id_range(corpus), np.int64)}, str(corpus.prefix), _check_range
        )
        least, greatest = entry["range"].tolist()
    if least < 0 or greatest >= vocab_size:
        raise foreign_id(corpus, vocab_size)


def id_range(corpus: TokenCorpus) -> tuple[int, int]:
    """The least and the greatest token id; reads the whole corpus."""
    least, greatest = [], []
    for start in range(0, len(corpus.tokens), BLOCK):
        block = corpus.tokens[start : start + BLOCK]
        least.append(int(block.min()))
        greatest.append(int(block.max()))
    return min(least), max(greatest)


def _check_range(arrays: Arrays) -> None:
    least, greatest = arrays["range"].tolist()
    if least > greatest:
        raise ValueError("its range is none")


def foreign_id(corpus: TokenCorpus, vocab_size: int) -> DataError:
    """The refusal of a corpus with ids outside the vocabulary: names the first one, its document and its place there."""
    for start in range(0, len(corpus.tokens), BLOCK):
        block = corpus.tokens[start : start + BLOCK]
        wrong = np.flatnonzero((block < 0) | (block >= vocab_size))
        if len(wrong):
            place = start + int(wrong[0])
            document = int(np.searchsorted(corpus.offsets, place, side="right")) - 1
            return DataError(
                f"{corpus.prefix}: token id {int(corpus.tokens[place])} in document {document} (its token "
                f"{place - int(corpus.offsets[document])}) is outside the vocabulary of {vocab_size:,}: "
                "the corpus was made with another tokenizer"
            )
    return DataError(f"{corpus.prefix}: its ids were other ones when they were checked; delete its index-cache")
