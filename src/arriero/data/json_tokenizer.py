"""A tokenizer out of tokenizer.json, by the `tokenizers` library."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from arriero.data.stream_decoder import REPLACEMENT, ByteDecoding, TokenBytes, byte_level_alphabet, byte_of_piece
from arriero.data.tokenizer_checks import PROBES, check_description, no_panic
from arriero.data.tokenizer_files import VOCABULARY_FILE_LIMIT, AddedTokenSpec, TokenizerFiles
from arriero.errors import FormatError

# Classes whose tokenizer.json transformers 5 does not take as it is: it rebuilds the SentencePiece pre-tokenizer.
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


# From so many characters on a text goes to the library as a batch: then it lets other threads of this process run meanwhile.
LONG_TEXT = 4096


class JsonTokenizer:
    """The vocabulary, and how text becomes ids. Made once and then only read, so that threads may share it."""

    def __init__(self, files: TokenizerFiles) -> None:
        path = files.folder / "tokenizer.json"
        try:
            source = files.read(path.name, VOCABULARY_FILE_LIMIT).decode("utf-8")
            description = json.loads(source)
            check_description(description, path)
            with no_panic(path):
                tokenizer = tokenizers.Tokenizer.from_str(source)
        except FormatError:
            raise
        except Exception as error:  # the library raises plain Exception for everything that it cannot read
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FormatError(f"{path}: not a tokenizer ({reason}); download or convert it again") from error
        self._path = path
        tokenizer.no_truncation()
        tokenizer.no_padding()
        kinds = _decoder_kinds(description.get("decoder"))
        if files.config.get("tokenizer_class") in LLAMA_CLASSES and "ByteLevel" not in kinds:
            _use_llama_metaspace(tokenizer, files.config)
        _add_missing_tokens(tokenizer, files)
        with no_panic(path):
            for text in PROBES:
                with contextlib.suppress(Exception):  # the text may have characters that the vocabulary lacks
                    tokenizer.encode(text, add_special_tokens=True)
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.size: int = max(vocabulary.values(), default=-1) + 1
        self.special: dict[str, int] = {t.content: i for i, t in sorted(self._added.items()) if t.special}
        unknown = files.named.get("unk_token")
        self.unknown_id: int | None = tokenizer.token_to_id(unknown.content) if unknown else None
        self.decoding = self._byte_decoding(description.get("decoder"), kinds)
        self._literal: tokenizers.Tokenizer | None = None
        self._literal_lock = threading.Lock()
        # A token that is matched although special ones are not, and that no text can hold: what follows it is encoded
        # as it would be after a control token, without the blank that some vocabularies put at the start of a text.
        self._seam = f"\U0010fffd{secrets.token_hex(16)}\U0010fffd"

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        """The text of an id as the vocabulary writes it."""
        token: str | None = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        return token

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it recognised; nothing added."""
        ids: list[int] = self._encode(self._tokenizer, text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, on all cores."""
        with no_panic(self._path):
            return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_literal(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it not recognised."""
        ids: list[int] = self._encode(self._literal_tokenizer(), text).ids
        return ids

    def offsets(self, text: str, *, after_token: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_literal`, with the (start, end) of each token in characters of the text.

        Args:
            after_token: the text follows a control token, rather than beginning a sequence.
        """
        if after_token:
            encoding = self._encode(self._literal_tokenizer(), self._seam + text)
            seam = len(self._seam)
            return encoding.ids[1:], [(max(0, start - seam), end - seam) for start, end in encoding.offsets[1:]]
        encoding = self._encode(self._tokenizer, text)
        if any(i in self.decoding.special_ids for i in encoding.ids):
            encoding = self._encode(self._literal_tokenizer(), text)
        return encoding.ids, encoding.offsets

    def framing(self) -> tuple[list[int], list[int]]:
        """The ids that tokenizer.json's post-processor puts before and after a text."""
        body = self.encode("a")
        whole: list[int] = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(body) + 1):
            if whole[start : start + len(body)] == body:
                return whole[:start], whole[start + len(body) :]
        raise FormatError(
            f"{self._path}: its post_processor does not keep a text's tokens together, which is not supported"
        )

    def swallows_blanks(self, token: str) -> tuple[bool, bool]:
        """Whether a special token takes in the blanks before and after it."""
        added = self._added[self.special[token]]
        return bool(added.lstrip), bool(added.rstrip)

    def added_tokens_with(self, specs: Sequence[AddedTokenSpec]) -> list[dict[str, Any]]:
        """The entry `added_tokens` of a tokenizer.json with more tokens; known ones keep their ids and become special where
        that is asked for."""
        grown = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        for spec in specs:
            add = grown.add_special_tokens if spec.special else grown.add_tokens
            add([_added_token(spec, spec.special)])
        special = {spec.content for spec in specs if spec.special}
        entries = []
        for token_id, token in sorted(grown.get_added_tokens_decoder().items()):
            flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
            marked = token.special or token.content in special
            entries.append({"id": token_id, "content": token.content, **flags, "special": marked})
        return entries

    def _literal_tokenizer(self) -> tokenizers.Tokenizer:
        # A second instance and not a switched one: switching would race with other threads. Few processes need it.
        with self._literal_lock:
            if self._literal is None:
                literal = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
                literal.encode_special_tokens = True
                literal.add_tokens([tokenizers.AddedToken(self._seam, normalized=False)])
                self._literal = literal
            return self._literal

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
        with no_panic(self._path):
            if len(text) < LONG_TEXT:
                return tokenizer.encode(text, add_special_tokens=False)
            return tokenizer.encode_batch([text], add_special_tokens=False)[0]

    def _byte_decoding(self, decoder: dict[str, Any] | None, kinds: list[str]) -> ByteDecoding:
        special_ids = frozenset(self.special.values())
        id_to_token = self._tokenizer.id_to_token
        if "ByteLevel" in kinds:
            alphabet = byte_level_alphabet()

            def byte_level(token_id: int) -> bytes:
                token = (id_to_token(token_id) if token_id >= 0 else None) or ""
                values = [alphabet.get(character) for character in token]
                # An added token may hold characters outside the alphabet: it then stands for itself.
                return token.encode() if None in values else bytes(value for value in values if value is not None)

            return ByteDecoding(TokenBytes(byte_level), special_ids)
        unsupported = set(kinds) - {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        if unsupported:
            raise FormatError(
                f"{self._path}: decoder {sorted(unsupported)[0]!r} is none that LLaMA-family tokenizers use"
            )
        spaces, byte_fallback = bool({"Replace", "Metaspace"} & set(kinds)), "ByteFallback" in kinds

        def piece(token_id: int) -> bytes:
            token = (id_to_token(token_id) if token_id >= 0 else None) or ""
            byte = byte_of_piece(token) if byte_fallback else None
            if byte is not None:
                return bytes([byte])
            return (token.replace(REPLACEMENT, " ") if spaces else token).encode()

        return ByteDecoding(
            TokenBytes(piece),
            special_ids,
            strip_leading_space=_strips_leading_space(decoder),
            separator=b"" if kinds else b" ",  # without a decoder the library joins tokens with a space
        )


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder["decoders"] for step in _decoder_steps(part)]
    return [decoder]


def _decoder_kinds(decoder: dict[str, Any] | None) -> list[str]:
    return [step["type"] for step in _decoder_steps(decoder)]


def _strips_leading_space(decoder: dict[str, Any] | None) -> bool:
    return any(
        (step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in _decoder_steps(decoder)
    )


def _use_llama_metaspace(tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Put the leading blank where transformers 5 puts it for its LlamaTokenizer class, whatever tokenizer.json says.

    With `legacy` false, its default, only the very beginning of a sequence gets the blank, not what follows a control
    token (https://github.com/huggingface/transformers/pull/24565).
    """
    if config.get("add_prefix_space", True) in (True, None):
        scheme = "always" if config.get("legacy", False) else "first"
    else:
        scheme = "never"
    # The library's setters take None, which its type hints do not say.
    setattr(tokenizer, "normalizer", None)  # noqa: B010
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=REPLACEMENT, prepend_scheme=scheme, split=False)


def _add_missing_tokens(tokenizer: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Tokens that only the side files name: they get the next free ids, and named ones become special."""
    present = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for spec in files.added.values():
        if spec.content not in present:
            tokenizer.add_tokens([_added_token(spec, spec.special)])
            present[spec.content] = _added_token(spec, spec.special)
    for spec in [*files.named.values(), *files.additional]:
        known = present.get(spec.content)
        if known is None:
            tokenizer.add_special_tokens([_added_token(spec, True)])
        elif not known.special:
            known.special = True
            tokenizer.add_special_tokens([known])


def _added_token(spec: AddedTokenSpec, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        spec.content,
        special=special,
        lstrip=spec.lstrip,
        rstrip=spec.rstrip,
        single_word=spec.single_word,
        normalized=spec.normalized,
    )
