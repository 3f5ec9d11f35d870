"""A tokenizer out of tokenizer.model, by the `sentencepiece` library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from arriero.data.stream_decoder import REPLACEMENT, ByteDecoding, TokenBytes, byte_of_piece
from arriero.data.tokenizer_files import VOCABULARY_FILE_LIMIT, AddedTokenSpec, TokenizerFiles, read_bounded
from arriero.errors import FormatError

# A protobuf message followed by another is their merge. This one is a ModelProto that holds only
# normalizer_spec (field 3) {add_dummy_prefix (field 3): false}; sentencepiece has no other switch for it.
WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """The vocabulary, and how text becomes ids. Made once and then only read, so that threads may share it."""

    def __init__(self, files: TokenizerFiles, path: Path) -> None:
        data = read_bounded(path, VOCABULARY_FILE_LIMIT)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._plain_model = sentencepiece.SentencePieceProcessor(model_proto=data + WITHOUT_DUMMY_PREFIX)
            pieces: int = self._model.get_piece_size()
        except (RuntimeError, TypeError, ValueError) as error:
            raise FormatError(
                f"{path}: not a SentencePiece model (for a tiktoken file, as Meta ships for Llama 3, put the "
                "tokenizer.json of the same model beside it)"
            ) from error
        if pieces == 0:
            raise FormatError(f"{path}: a SentencePiece model without pieces; download or convert it again")
        # `remove_extra_whitespaces` of the model, the default of SentencePiece's training: leading blanks go before the
        # prefix comes. The library tells it by what it does only.
        self._strips_blanks = self._plain_model.encode(" a") == self._plain_model.encode("a")
        # The old way puts the leading blank also after every control token.
        self._always_prefix = bool(files.config.get("legacy", False))
        self._path = path
        self.unknown_id: int | None = self._model.unk_id() if self._model.unk_id() >= 0 else None
        self._added: dict[int, AddedTokenSpec] = {}
        self.special: dict[str, int] = {
            self._model.id_to_piece(i): i
            for i in range(pieces)
            if self._model.is_control(i) or self._model.is_unknown(i)
        }
        self._ids: dict[str, int] = {self._model.id_to_piece(i): i for i in range(pieces)}
        self.size = pieces
        self._add_tokens(files)
        self.special = dict(sorted(self.special.items(), key=lambda item: item[1]))
        self._matched = {t.content: t for t in self._added.values()} | {s: AddedTokenSpec(s) for s in self.special}
        longest_first = sorted(self._matched, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(token) for token in longest_first) or "(?!)")
        plain = [token for token in longest_first if token not in self.special]
        self._plain_pattern = re.compile("|".join(re.escape(token) for token in plain) or "(?!)")
        self.decoding = ByteDecoding(
            TokenBytes(self._bytes),
            frozenset(self.special.values()),
            strip_leading_space=self._model.encode("a") != self._plain_model.encode("a"),
        )

    def _add_tokens(self, files: TokenizerFiles) -> None:
        by_id = dict(files.added)
        for token_id, spec in by_id.items():
            if token_id >= self.size and spec.content not in self._ids:
                self._added[token_id] = spec
                self._ids[spec.content] = token_id
            elif spec.special and self._ids.get(spec.content) == token_id:
                self.special[spec.content] = token_id
        self.size = max([self.size, *(token_id + 1 for token_id in self._added)])
        for token_id, spec in self._added.items():
            if spec.special:
                self.special[spec.content] = token_id
        for spec in [*files.named.values(), *files.additional]:
            if spec.content not in self._ids:
                self._ids[spec.content] = self.size
                self._added[self.size] = spec
                self.size += 1
            self.special[spec.content] = self._ids[spec.content]

    @property
    def bos_id(self) -> int | None:
        """The model's own beginning of sequence."""
        return self._model.bos_id() if self._model.bos_id() >= 0 else None

    @property
    def eos_id(self) -> int | None:
        """The model's own end of sequence."""
        return self._model.eos_id() if self._model.eos_id() >= 0 else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text."""
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The text of an id as the vocabulary writes it."""
        if token_id in self._added:
            return self._added[token_id].content
        piece: str | None = self._model.id_to_piece(token_id) if 0 <= token_id < self._model.get_piece_size() else None
        return piece

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it recognised; nothing added."""
        return self._encode(text, self._pattern)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each."""
        return [self.encode(text) for text in texts]

    def encode_literal(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it not recognised."""
        return self._encode(text, self._plain_pattern)

    def offsets(self, text: str, *, after_token: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_literal`, with the (start, end) of each token in characters of the text.

        Args:
            after_token: the text follows a control token, rather than beginning a sequence.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for start, part, token_id in self._split(text, self._plain_pattern):
            if token_id is not None:
                ids.append(token_id)
                spans.append((start, start + len(part)))
                continue
            mapping = self._model_for(part, at_start=not (ids or after_token)).encode_as_offset_mapping(part)
            ids += mapping["ids"]
            spans += [(start + begin, start + end) for begin, end in mapping["offsets"]]
        return ids, spans

    def framing(self) -> tuple[list[int], list[int]]:
        """LLaMA's custom: a beginning of sequence before a text, nothing after it."""
        return ([self.bos_id] if self.bos_id is not None else []), []

    def swallows_blanks(self, token: str) -> tuple[bool, bool]:
        """Whether a special token takes in the blanks before and after it."""
        spec = self._matched[token]
        return spec.lstrip, spec.rstrip

    def _encode(self, text: str, pattern: re.Pattern[str]) -> list[int]:
        ids: list[int] = []
        at_start = True
        for _, part, token_id in self._split(text, pattern):
            if token_id is not None:
                ids.append(token_id)
            else:
                ids += self._model_for(part, at_start).encode(part)
            at_start = False
        return ids

    def _model_for(self, text: str, at_start: bool) -> sentencepiece.SentencePieceProcessor:
        """The model with or without a leading blank, as transformers 5 decides: a text that has one gets no second one.

        SentencePiece itself would add a second one; but a model that strips blanks takes a text's own away first.
        """
        if self._strips_blanks and text.startswith(" "):
            return self._model
        prefix = (at_start or self._always_prefix) and not text.startswith((" ", REPLACEMENT))
        return self._model if prefix else self._plain_model

    def _split(self, text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, str, int | None]]:
        """(start, text, None) of ordinary stretches, (start, text, id) of matched tokens."""
        position = 0
        for match in pattern.finditer(text):
            spec = self._matched[match.group()]
            start, end = match.span()
            if start < position:
                continue  # its blanks went to the token before
            before = text[position:start].rstrip() if spec.lstrip else text[position:start]
            if before:
                yield position, before, None
            yield start, match.group(), self._ids[match.group()]
            position = end + (len(text[end:]) - len(text[end:].lstrip()) if spec.rstrip else 0)
        if position < len(text):
            yield position, text[position:], None

    def _bytes(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id) or ""
        byte = byte_of_piece(token) if token_id not in self._added else None
        return bytes([byte]) if byte is not None else token.replace(REPLACEMENT, " ").encode()
