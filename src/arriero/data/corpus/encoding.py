"""A unit of documents into token ids: what a worker does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from arriero.data.corpus.documents import Refusal, RefusedDocument, RunShortener, documents_of, sentences_of
from arriero.data.tokenizer import Tokenizer
from arriero.errors import ConfigError, DataError

# What became of a document that was read: one of these, and above them what was changed in it.
KEPT, EMPTY, TOO_SHORT, TOO_LONG, DUPLICATE = range(5)
FATE = 0x0F
SHORTENED = 0x40
REPLACED = 0x80
HASH = np.dtype("S16")
# Characters encoded at once, if they are not of one text: tokenizers take some hundred bytes a token while they work.
BATCH_CHARACTERS = 2**20


@dataclass(frozen=True)
class EncodingRules:
    """How documents become token ids; see `arriero.config.preprocessing.PreprocessOptions`."""

    json_key: str = "text"
    replace_errors: bool = False
    append_eos: bool = False
    split_sentences: bool = False
    min_doc_length: int = 0
    max_doc_length: int | None = None
    max_repeated_len: int = 0
    deduplicate: bool = False


@dataclass(frozen=True)
class EncodedUnit:
    """The token ids of a unit.

    Attributes:
        tokens: [number of tokens], all documents end to end, in the corpus' type.
        lens: [number of sentences] int32, tokens of each; a document is one sentence unless sentences are split.
        counts: [number of kept documents] int32, sentences of each.
        marks: [number of documents read] uint8: what became of each.
        hashes: [number of kept documents] of 16 bytes each, empty unless duplicates are to be found.
        text_bytes: size of the text read, in bytes.
    """

    tokens: npt.NDArray[np.integer]
    lens: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    marks: npt.NDArray[np.uint8]
    hashes: npt.NDArray[np.bytes_]
    text_bytes: int


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The type of a corpus' ids, by PaddleNLP's rule: uint16 where the vocabulary is below 65535, else int32."""
    return np.dtype("<u2") if vocab_size < 65535 else np.dtype("<i4")


def text_hash(text: str) -> bytes:
    """16 bytes that stand for a text (BLAKE2b)."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Encoder:
    """Turns units into token ids. The ids of a text are those of `Tokenizer.encode`.

    Raises:
        ConfigError: an end-of-text token is asked for and the tokenizer has none.
    """

    def __init__(self, tokenizer: Tokenizer, rules: EncodingRules) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._shortener = RunShortener(rules.max_repeated_len) if rules.max_repeated_len else None
        self._eos = tokenizer.eos_token_id if rules.append_eos else None
        if rules.append_eos and self._eos is None:
            raise ConfigError(f"--append_eos: the tokenizer in {tokenizer.folder} has no end-of-text token")

    def encode(self, kind: str, payload: bytes | list[str], text_bytes: int) -> EncodedUnit | Refusal:
        """The token ids of a unit, or the first document of it that cannot be used.

        Raises:
            DataError: the tokenizer gives ids that are not in its vocabulary.
        """
        try:
            texts, replaced = documents_of(kind, payload, self._rules.json_key, self._rules.replace_errors)
        except RefusedDocument as refused:
            return refused.refusal
        marks = np.zeros(len(texts), np.uint8)
        marks[np.array(replaced, bool)] |= REPLACED
        kept: list[str] = []
        places: list[int] = []
        for place, text in enumerate(texts):
            fate = self._fate(text)
            marks[place] |= fate
            if fate != KEPT:
                continue
            if self._shortener is not None:
                shorter = self._shortener.shorten(text)
                if len(shorter) < len(text):
                    marks[place] |= SHORTENED
                text = shorter
            kept.append(text)
            places.append(place)
        return self._encode(kept, places, marks, text_bytes)

    def _fate(self, text: str) -> int:
        if not text or text.isspace():
            return EMPTY
        if len(text) < self._rules.min_doc_length:
            return TOO_SHORT
        if self._rules.max_doc_length is not None and len(text) > self._rules.max_doc_length:
            return TOO_LONG
        return KEPT

    def _ids_of(self, texts: list[str]) -> Iterator[list[int]]:
        """The ids of each, encoded in batches of `BATCH_CHARACTERS`."""
        batch: list[str] = []
        size = 0
        for text in texts:
            if batch and size + len(text) > BATCH_CHARACTERS:
                yield from self._tokenizer.encode_batch(batch)
                batch, size = [], 0
            batch.append(text)
            size += len(text)
        yield from self._tokenizer.encode_batch(batch)

    def _encode(
        self, texts: list[str], places: list[int], marks: npt.NDArray[np.uint8], text_bytes: int
    ) -> EncodedUnit:
        if self._rules.split_sentences:
            cut = [sentences_of(text) for text in texts]
            flat = self._ids_of([sentence for sentences in cut for sentence in sentences])
            documents = [[ids for _ in sentences if (ids := next(flat))] for sentences in cut]
        else:
            documents = [[ids] if ids else [] for ids in self._ids_of(texts)]
        # A text of nothing but what the tokenizer leaves out (a null character, say) has no tokens.
        full = [number for number, sentences in enumerate(documents) if sentences]
        for number in set(range(len(documents))).difference(full):
            marks[places[number]] |= EMPTY
        if self._eos is not None:
            for number in full:
                documents[number][-1].append(self._eos)
        sentences = [ids for number in full for ids in documents[number]]
        lens = np.fromiter(map(len, sentences), np.int32, len(sentences))
        tokens = np.fromiter(chain.from_iterable(sentences), np.int64, int(lens.sum(dtype=np.int64)))
        if len(tokens) and (int(tokens.max()) >= self._tokenizer.vocab_size or int(tokens.min()) < 0):
            raise DataError(
                f"{self._tokenizer.folder}: the tokenizer gives the id {int(tokens.max())}, and its vocabulary has "
                f"{self._tokenizer.vocab_size}; its files do not belong together"
            )
        hashes = [text_hash(texts[number]) for number in full] if self._rules.deduplicate else []
        return EncodedUnit(
            tokens=tokens.astype(self._dtype),
            lens=lens,
            counts=np.fromiter((len(documents[number]) for number in full), np.int32, len(full)),
            marks=marks,
            hashes=np.frombuffer(b"".join(hashes), HASH),
            text_bytes=text_bytes,
        )
