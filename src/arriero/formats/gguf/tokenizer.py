"""The tokenizer inside a GGUF file, as the files of an HF folder.

Two kinds exist among LLaMA-family models. `tokenizer.ggml.model` = "gpt2" is a byte-level BPE whose pre-tokenizer is
only named (`tokenizer.ggml.pre`, see `pre_tokenizers`). "llama" is a SentencePiece BPE: pieces with scores, from which
both tokenizer.json and tokenizer.model are rebuilt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arriero.errors import FormatError
from arriero.formats.gguf.pre_tokenizers import DIGIT, GPT2, PRE_TOKENIZERS
from arriero.formats.sentencepiece_model import PieceType, merges_from_scores, write_sentencepiece_model
from arriero.formats.tokenizer_json import added_token, bpe_model, byte_level, tokenizer_body

MAX_PIECE_CHARACTERS = 1024
_PADDING_PIECE = re.compile(r"\[PAD\d+\]")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    scores: list[float]


def tokenizer_files(metadata: Mapping[str, Any], embedding_rows: int, source: str) -> dict[str, bytes]:
    """The tokenizer files of an HF folder, by name.

    Args:
        metadata: of a GGUF file.
        embedding_rows: of the model; the vocabulary may be smaller, never larger.
        source: the file's name, for messages.

    Raises:
        FormatError: for a missing or contradictory key, an unsupported tokenizer, or a vocabulary larger than the
            embedding.
    """
    vocabulary = _read_vocabulary(metadata, embedding_rows, source)
    kind = metadata.get("tokenizer.ggml.model")
    special = _special_ids(metadata, len(vocabulary.tokens), source)
    files: dict[str, bytes] = {}
    if kind == "gpt2":
        add_bos, body = _byte_level(metadata, vocabulary, special, source)
    elif kind == "llama":
        add_bos, body = _sentencepiece(metadata, vocabulary, special, source)
        files["tokenizer.model"] = write_sentencepiece_model(
            vocabulary.tokens,
            vocabulary.scores,
            vocabulary.types,
            add_dummy_prefix=_boolean(metadata, "tokenizer.ggml.add_space_prefix", True, source),
        )
    else:
        raise FormatError(f"{source}: tokenizer.ggml.model {str(kind)[:40]!r} is not supported; 'gpt2' and 'llama' are")
    add_bos = _boolean(metadata, "tokenizer.ggml.add_bos_token", add_bos, source) and "bos" in special
    add_eos = _boolean(metadata, "tokenizer.ggml.add_eos_token", False, source) and "eos" in special
    body["post_processor"] = _post_processor(vocabulary, special, add_bos, add_eos)
    files["tokenizer.json"] = _json(body)
    names = {f"{role}_token": vocabulary.tokens[index] for role, index in special.items() if role in _ROLES}
    files["special_tokens_map.json"] = _json(names)
    files["tokenizer_config.json"] = _json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",  # read tokenizer.json as it is, in transformers 4 and 5 alike
            "add_bos_token": add_bos,
            "add_eos_token": add_eos,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in body["added_tokens"]
            },
            **({"unk_token": None} if "unk" not in special else {}),
            **names,
            **_context(metadata),
            **_chat_template(metadata, source),
        }
    )
    return files


_ROLES = ("bos", "eos", "unk", "pad")
_ROLE_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}


def _special_ids(metadata: Mapping[str, Any], size: int, source: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for role, name in _ROLE_KEYS.items():
        key = f"tokenizer.ggml.{name}_token_id"
        value = metadata.get(key)
        if value is None or value == 0xFFFFFFFF:  # llama.cpp's "no such token"
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
            raise FormatError(f"{source}: {key} is {str(value)[:40]}, the vocabulary has {size} tokens")
        found[role] = value
    return found


def _read_vocabulary(metadata: Mapping[str, Any], embedding_rows: int, source: str) -> _Vocabulary:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise FormatError(f"{source}: tokenizer.ggml.tokens is missing; the file holds no tokenizer")
    tokens = list(tokens)
    types = metadata.get("tokenizer.ggml.token_type", [int(PieceType.NORMAL)] * len(tokens))
    scores = metadata.get("tokenizer.ggml.scores", [0.0] * len(tokens))
    for key, values in (("token_type", types), ("scores", scores)):
        if not isinstance(values, list) or len(values) != len(tokens):
            raise FormatError(
                f"{source}: tokenizer.ggml.{key} does not have one value for each of {len(tokens)} tokens"
            )
    if not all(isinstance(kind, int) and 1 <= kind <= 6 for kind in types):
        raise FormatError(f"{source}: tokenizer.ggml.token_type has values outside 1 to 6")
    if not all(isinstance(score, int | float) and score == score for score in scores):
        raise FormatError(f"{source}: tokenizer.ggml.scores has values that are not numbers")
    # Converters fill the embedding's unused rows with invented [PAD…] tokens, which no HF tokenizer has.
    count = len(tokens)
    while count and types[count - 1] in (PieceType.UNUSED, PieceType.USER_DEFINED):
        if not _PADDING_PIECE.fullmatch(tokens[count - 1]):
            break
        count -= 1
    if count > embedding_rows:
        raise FormatError(
            f"{source}: the tokenizer has {count} tokens but token_embd.weight only {embedding_rows} rows; "
            "the file is inconsistent, fetch another"
        )
    if count == 0 or max(map(len, tokens[:count])) > MAX_PIECE_CHARACTERS:
        raise FormatError(f"{source}: tokenizer.ggml.tokens is empty or has one over {MAX_PIECE_CHARACTERS} characters")
    if len(set(tokens[:count])) != count:
        seen: set[str] = set()
        double = next(token for token in tokens[:count] if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise FormatError(f"{source}: tokenizer.ggml.tokens has {double!r} twice")
    return _Vocabulary(
        tokens[:count], [int(kind) for kind in types[:count]], [float(score) for score in scores[:count]]
    )


def _added_tokens(vocabulary: _Vocabulary, special: Mapping[str, int]) -> list[dict[str, Any]]:
    """The tokens that are matched whole in the text: control ones (special) and user-defined ones (ordinary text)."""
    always = {special[role] for role in ("bos", "eos", "eot", "eom") if role in special}
    added = []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        control = kind in (PieceType.CONTROL, PieceType.UNKNOWN) or index in always
        if token and (control or kind == PieceType.USER_DEFINED):
            added.append(added_token(index, token, special=control))
    return added


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, special: Mapping[str, int], source: str
) -> tuple[bool, dict[str, Any]]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    family = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if family is None:
        raise FormatError(
            f"{source}: tokenizer.ggml.pre {str(name)[:40]!r} is not supported; "
            f"supported are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    added = _added_tokens(vocabulary, special)
    # As in the models' own files, added tokens at the end of the vocabulary stand in added_tokens only: there no merge
    # and no whole-word match can reach them. Inside the vocabulary they must stay, to hold their ids.
    tail = len(vocabulary.tokens)
    added_ids = {token["id"] for token in added}
    while tail and tail - 1 in added_ids:
        tail -= 1
    vocab = {token: index for index, token in enumerate(vocabulary.tokens[:tail])}
    prefix = _boolean(metadata, "tokenizer.ggml.add_space_prefix", False, source)
    steps: list[dict[str, Any]]
    if family.splits == (GPT2,):
        steps = [byte_level(prefix, use_regex=True)]
    elif family.splits == (DIGIT, GPT2):
        steps = [{"type": "Digits", "individual_digits": True}, byte_level(prefix, use_regex=True)]
    else:
        steps = [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
            for split in family.splits
        ]
        steps.append(byte_level(prefix, use_regex=False))
    return family.add_bos, tokenizer_body(
        bpe_model(vocab, _read_merges(metadata, vocab, source), ignore_merges=family.ignore_merges),
        added,
        normalizer={"type": "NFC"} if family.nfc else None,
        pre_tokenizer=steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        post_processor=None,
        decoder=byte_level(True, use_regex=True),
    )


def _read_merges(metadata: Mapping[str, Any], vocab: Mapping[str, int], source: str) -> list[list[str]]:
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise FormatError(f"{source}: tokenizer.ggml.merges is missing; a byte-level tokenizer needs it")
    merges = []
    for number, line in enumerate(lines):
        # From the second character on, so that a first part that is a space itself survives (as llama.cpp does).
        at = line.find(" ", 1) if isinstance(line, str) else -1
        left, right = (line[:at], line[at + 1 :]) if at > 0 else ("", "")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise FormatError(
                f"{source}: tokenizer.ggml.merges[{number}] {str(line)[:80]!r} names tokens that are not there"
            )
        merges.append([left, right])
    return merges


def _sentencepiece(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, special: Mapping[str, int], source: str
) -> tuple[bool, dict[str, Any]]:
    if "tokenizer.ggml.scores" not in metadata:
        raise FormatError(f"{source}: tokenizer.ggml.scores is missing; a SentencePiece tokenizer needs it")
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    prefix = _boolean(metadata, "tokenizer.ggml.add_space_prefix", True, source)
    byte_fallback = sum(1 for token in vocabulary.tokens if _BYTE_PIECE.fullmatch(token)) == 256
    unknown = special.get("unk")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = bpe_model(
        vocab,
        merges_from_scores(vocabulary.tokens, vocabulary.scores, vocabulary.types),
        unknown=vocabulary.tokens[unknown] if unknown is not None else None,
        fuse_unknown=True,
        byte_fallback=byte_fallback,
    )
    return True, tokenizer_body(
        model,
        _added_tokens(vocabulary, special),
        normalizer=(
            {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]} if prefix else replace
        ),
        pre_tokenizer=None,
        post_processor=None,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _post_processor(
    vocabulary: _Vocabulary, special: Mapping[str, int], add_bos: bool, add_eos: bool
) -> dict[str, Any] | None:
    if not add_bos and not add_eos:
        return None
    used = [role for role, wanted in (("bos", add_bos), ("eos", add_eos)) if wanted]
    names = {role: vocabulary.tokens[special[role]] for role in used}

    def side(letter: str, type_id: int) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = [{"Sequence": {"id": letter, "type_id": type_id}}]
        if add_bos:
            pieces.insert(0, {"SpecialToken": {"id": names["bos"], "type_id": type_id}})
        if add_eos:
            pieces.append({"SpecialToken": {"id": names["eos"], "type_id": type_id}})
        return pieces

    return {
        "type": "TemplateProcessing",
        "single": side("A", 0),
        "pair": side("A", 0) + side("B", 1),
        "special_tokens": {
            name: {"id": name, "ids": [special[role]], "tokens": [name]} for role, name in names.items()
        },
    }


def _chat_template(metadata: Mapping[str, Any], source: str) -> dict[str, Any]:
    named = {
        key.removeprefix("tokenizer.chat_template."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.chat_template.")
    }
    template = metadata.get("tokenizer.chat_template")
    for value in (*named.values(), *(() if template is None else (template,))):
        if not isinstance(value, str):
            raise FormatError(f"{source}: tokenizer.chat_template is not a text")
    if named:
        templates = ({"default": template} if template is not None else {}) | named
        return {"chat_template": [{"name": name, "template": text} for name, text in templates.items()]}
    return {} if template is None else {"chat_template": template}


def _context(metadata: Mapping[str, Any]) -> dict[str, int]:
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return {"model_max_length": length} if isinstance(length, int) else {}


def _boolean(metadata: Mapping[str, Any], key: str, default: bool, source: str) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise FormatError(f"{source}: {key} must be a boolean, got {str(value)[:40]}")
    return value


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
