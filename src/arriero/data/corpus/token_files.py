"""Token corpora on disk, opened without reading them: PaddleNLP's npy/npz pair and Megatron-LM's bin/idx pair.

    PREFIX_ids.npy   all token ids end to end, one dimension        PREFIX.bin   the same as raw little-endian numbers
    PREFIX_idx.npz   `lens`: tokens of each sentence or document    PREFIX.idx   the lengths, see `_read_megatron`
                     `docs`, if there: ends of documents, counted in sentences, from 0
    PREFIX_ids.npz   older, in place of the pair: `ids` and `lens`

Nothing is unpickled, and every count is checked against the size of its file before memory is taken for it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.data.corpus.npz_member import map_npy, read_member
from arriero.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
LAZY_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of the ids, sentences, ends of documents
# Megatron-LM's codes (megatron/core/datasets/indexed_dataset.py); 9 and 10 are PaddleNLP's. 6 and 7 are floats.
ID_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}

SUFFIXES = ("_ids.npy", "_idx.npz", "_ids.npz", ".bin", ".idx")

SAMPLED_BLOCKS = 64
BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """The token ids of many documents, end to end.

    Attributes:
        prefix: where it is, without the endings of its files.
        data_impl: "npy" or "mmap", the kind of its files.
        tokens: (T,) integer ids, mapped from the file and read-only.
        lengths: (D,) int32 tokens of each document.
        offsets: (D,) int64 place of its first token in `tokens`.
    """

    prefix: Path
    data_impl: str
    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def documents(self) -> int:
        return len(self.lengths)

    def tokens_in(self, documents: range) -> int:
        """Tokens of a range of documents."""
        return int(self.lengths[documents.start : documents.stop].sum(dtype=np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content: all lengths, and 64 blocks of ids spread over the corpus.

        It knows neither path, time nor kind of file. Ids changed in place outside those blocks are not noticed.
        """
        digest = hashlib.sha256(f"{self.tokens.dtype.kind}{self.tokens.dtype.itemsize} {len(self.tokens)} ".encode())
        digest.update(np.ascontiguousarray(self.lengths, "<i4").data)
        for start in np.unique(np.linspace(0, max(0, len(self.tokens) - BLOCK), SAMPLED_BLOCKS, dtype=np.int64)):
            block = self.tokens[start : start + BLOCK]
            digest.update(np.ascontiguousarray(block, block.dtype.newbyteorder("<")).data)
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # a data loader's process maps the files itself, it is not sent all tokens
        return open_corpus, (self.prefix, self.data_impl)


def corpus_kinds(prefix: Path) -> list[str]:
    """The kinds of corpus ("npy", "mmap") of which a file is there under this prefix."""
    there = [suffix for suffix in SUFFIXES if _file(prefix, suffix).is_file()]
    return [
        *(["npy"] if any(suffix.startswith("_") for suffix in there) else []),
        *(["mmap"] if {".bin", ".idx"} & set(there) else []),
    ]


def open_corpus(prefix: str | Path, data_impl: str = "auto") -> TokenCorpus:
    """Map a corpus.

    Args:
        prefix: its path without the endings (`data/wiki` for `data/wiki_ids.npy` and `data/wiki_idx.npz`).
        data_impl: "npy", "mmap" (Megatron's pair), or "auto": whichever is there.

    Raises:
        DataError: if a file is missing, damaged, of another kind, or its numbers disagree; or if there is no token.
    """
    prefix = Path(prefix)
    kinds = corpus_kinds(prefix)
    if data_impl == "auto":
        if len(kinds) > 1:
            raise DataError(f"{prefix}: there is an npy/npz pair and a bin/idx pair: choose by --data_impl npy or mmap")
        if not kinds:
            raise DataError(
                f"{prefix}: no corpus there: neither {prefix}_ids.npy with _idx.npz nor {prefix}.bin with .idx"
            )
        data_impl = kinds[0]
    try:
        tokens, lengths = (_read_npy if data_impl == "npy" else _read_megatron)(prefix)
    except OSError as error:
        raise DataError(f"{prefix}: the corpus cannot be read ({error.strerror or error})") from error
    if not len(tokens):
        raise DataError(f"{prefix}: the corpus is empty: it holds no token")
    ends = np.cumsum(lengths, dtype=np.int64)
    return TokenCorpus(prefix, data_impl, tokens, lengths.astype(np.int32, copy=False), ends - lengths)


def _file(prefix: Path, suffix: str) -> Path:
    return Path(f"{prefix}{suffix}")


def _pair(prefix: Path, first: str, second: str) -> tuple[Path, Path]:
    one, other = _file(prefix, first), _file(prefix, second)
    for path, partner in ((one, other), (other, one)):
        if not path.is_file():
            raise DataError(f"{path}: is missing, half of the pair with {partner.name}: a corpus needs both files")
    return one, other


def _read_npy(prefix: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    single = _file(prefix, "_ids.npz")
    if single.is_file() and not _file(prefix, "_ids.npy").is_file():
        index = ids = single
        tokens = read_member(single, "ids", None)
    else:
        ids, index = _pair(prefix, "_ids.npy", "_idx.npz")
        tokens = map_npy(ids)
    assert tokens is not None
    # empty sentences are possible but rare: this bounds what a false header can ask for
    most = 2 * len(tokens) + 1_000_000
    lengths = read_member(index, "lens", most)
    documents = read_member(index, "docs", most, optional=True)
    assert lengths is not None
    return tokens, _check_lengths(lengths, documents, len(tokens), ids, index)


def _read_megatron(prefix: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """PREFIX.idx: the header; int32 lengths of the sentences; int64 place in bytes of each in PREFIX.bin; int64 ends of the
    documents, counted in sentences, from 0; and perhaps an int8 mode of each sentence."""
    ids, index = _pair(prefix, ".bin", ".idx")
    with index.open("rb") as file:
        header = file.read(HEADER.size)
        if header[:8] == LAZY_MAGIC:
            raise DataError(f"{index}: is of the kind lazy (TNTIDX): make the corpus again with --data_impl mmap")
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"{index}: is not the index of a Megatron corpus: it does not begin with MMIDIDX")
        _, version, code, sentences, ends = HEADER.unpack(header)
        if version != 1:
            raise DataError(f"{index}: version {version} is not known: only version 1 is")
        if code not in ID_TYPES:
            raise DataError(f"{index}: its ids are of type {code}: not a kind of integer ({sorted(ID_TYPES)})")
        size, needed = index.stat().st_size, HEADER.size + 12 * sentences + 8 * ends
        if size not in (needed, needed + sentences):
            raise DataError(
                f"{index}: is {size:,} bytes where {sentences:,} sentences and {ends:,} ends of documents need {needed:,}: "
                "it is truncated or damaged; make the corpus again"
            )
        lengths = np.fromfile(file, "<i4", sentences)
        pointers = np.fromfile(file, "<i8", sentences)
        documents = np.fromfile(file, "<i8", ends)
    dtype = np.dtype(ID_TYPES[code])
    total, rest = divmod(ids.stat().st_size, dtype.itemsize)
    if rest:
        raise DataError(
            f"{ids}: {rest} bytes more than whole ids of {dtype.itemsize} bytes: it is truncated or damaged"
        )
    lengths_of_documents = _check_lengths(lengths, documents, total, ids, index)
    if not np.array_equal(pointers, (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize):
        raise DataError(f"{index}: the places of the sentences disagree with their lengths; make the corpus again")
    # an empty file cannot be mapped
    tokens = np.asarray(np.memmap(ids, dtype, "r")) if total else np.empty(0, dtype)
    return tokens, lengths_of_documents


def _check_lengths(
    lengths: NDArray[Any], documents: NDArray[Any] | None, tokens: int, ids: Path, index: Path
) -> NDArray[Any]:
    """The length of every document, its sentences joined."""
    if len(lengths) and int(lengths.min()) < 0:
        raise DataError(f"{index}: sentence {int(lengths.argmin())} has the length {int(lengths.min())}: it is damaged")
    if len(lengths) and int(lengths.max()) > np.iinfo(np.int32).max:
        raise DataError(f"{index}: a length of {int(lengths.max()):,} tokens is more than 2,147,483,647: it is damaged")
    total = int(lengths.sum(dtype=np.int64))
    if total != tokens:
        raise DataError(
            f"{index}: its lengths sum to {total:,} tokens but {ids.name} holds {tokens:,}: "
            "the two are not of one corpus, or one is truncated"
        )
    if documents is None or np.array_equal(documents, np.arange(len(lengths) + 1)):
        return lengths
    steps = np.diff(documents.astype(np.int64))
    if not len(documents) or documents[0] != 0 or documents[-1] != len(lengths) or (len(steps) and steps.min() < 0):
        raise DataError(
            f"{index}: the ends of documents do not rise from 0 to its {len(lengths):,} sentences: it is damaged"
        )
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[documents.astype(np.int64)]
    joined: NDArray[Any] = np.diff(ends)
    if len(joined) and int(joined.max()) > np.iinfo(np.int32).max:
        raise DataError(f"{index}: document {int(joined.argmax())} has more than 2,147,483,647 tokens: split it")
    return joined
