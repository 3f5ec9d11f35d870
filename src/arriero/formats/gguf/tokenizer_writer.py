"""The tokenizer of an HF folder as the metadata of a GGUF file; undoes `arriero.formats.gguf.tokenizer`.

What is written is what llama.cpp's convert_hf_to_gguf.py writes (conversion/base.py `_set_vocab_gpt2`,
`_set_vocab_sentencepiece`; gguf-py `SpecialVocab`), but the way of splitting text is found by the structure of
tokenizer.json and not by a hash of some ids, so that a model with a vocabulary of its own is served too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arriero.errors import FormatError
from arriero.formats.gguf import pre_tokenizers
from arriero.formats.gguf.container import Value
from arriero.formats.json_file import parse_json_object
from arriero.formats.sentencepiece_model import (
    PieceType,
    SentencePieceModel,
    merges_from_scores,
    read_sentencepiece_model,
)
from arriero.models.config import LlamaConfig

_PREFIX = "tokenizer.ggml."
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
_END_OF_MESSAGE = "<|eom_id|>"
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_SENTENCEPIECE_FILES = ("tokenizer.model", "sentencepiece.bpe.model")


@dataclass
class _Vocabulary:
    """Tokens by id, with types and (SentencePiece only) scores; filled up to the embedding's rows."""

    tokens: list[str]
    types: list[int]
    scores: list[float]

    @classmethod
    def empty(cls, rows: int) -> _Vocabulary:
        """Of tokens that nothing produces, as the converter pads."""
        return cls([f"[PAD{index}]" for index in range(rows)], [int(PieceType.UNUSED)] * rows, [_UNUSED_SCORE] * rows)

    def put(self, index: int, token: str, kind: PieceType, score: float, source: str) -> None:
        if not 0 <= index < len(self.tokens):
            raise FormatError(
                f"{source}: has a token with the id {index}, but the model's vocab_size is {len(self.tokens)}; "
                "this tokenizer belongs to another model"
            )
        self.tokens[index], self.types[index], self.scores[index] = token, int(kind), score


def tokenizer_metadata(
    files: Mapping[str, bytes], config: LlamaConfig, source: str
) -> tuple[dict[str, Value], list[str]]:
    """The keys `tokenizer.…` of a GGUF file, and lines on what llama.cpp does otherwise.

    Args:
        files: of an HF folder, by name.
        config: of the model; its vocab_size is how many tokens the file has.
        source: for messages.

    Raises:
        FormatError: without a tokenizer, or with one that llama.cpp has no equal of; it says the way out.
    """
    settings = _object(files, "tokenizer_config.json", source)
    body = _object(files, "tokenizer.json", source)
    pieces = next((name for name in _SENTENCEPIECE_FILES if name in files), None)
    vocabulary = _Vocabulary.empty(config.vocab_size)
    lines: list[str] = []
    if body:
        where = f"{source}: tokenizer.json"
        if not isinstance(body.get("model"), dict) or body["model"].get("type") != "BPE":
            raise FormatError(f"{where} is no BPE, which is all that LLaMA-family models in GGUF files have")
        steps = pre_tokenizers.steps_of(body.get("pre_tokenizer"), "pretokenizers")
        if any(step.get("type") == "ByteLevel" for step in steps):
            keys = _byte_level(body, steps, vocabulary, where)
        else:
            keys = _from_json_pieces(body, files.get(pieces or ""), vocabulary, where)
        lines += _swallowing(body)
    elif pieces is not None:
        model = read_sentencepiece_model(files[pieces], f"{source}: {pieces}")
        keys = _from_pieces(model, vocabulary, source)
        if model.removes_blanks:
            lines.append(
                f"llama.cpp keeps leading, trailing and repeated blanks, which {pieces} takes out of a text "
                "(remove_extra_whitespaces): such texts have other tokens there"
            )
        _put_added({"added_tokens": _added_beside(files, settings, source)}, vocabulary, source)
    else:
        raise FormatError(
            f"{source}: has neither tokenizer.json nor tokenizer.model, and a GGUF file needs a tokenizer; "
            "copy that of the base model into the folder"
        )
    keys |= _special_keys(files, settings, body, vocabulary, config, source)
    return keys | _chat_template(files, settings, source), lines


def _byte_level(
    body: Mapping[str, Any], steps: list[Mapping[str, Any]], vocabulary: _Vocabulary, source: str
) -> dict[str, Value]:
    pre = pre_tokenizers.name_of(body)
    if pre is None:
        raise FormatError(
            f"{source}: splits text in a way that no `tokenizer.ggml.pre` of llama.cpp stands for; "
            f"known are {', '.join(sorted(pre_tokenizers.PRE_TOKENIZERS))}: keep this model as safetensors, or give it the "
            "tokenizer.json of its base model"
        )
    model = body["model"]
    unsupported = next(
        (
            key
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
            if model.get(key)
        ),
        None,
    )
    if unsupported is not None:
        raise FormatError(f"{source}: model.{unsupported} is set, which llama.cpp does not know; use another tokenizer")
    for token, index in _vocab(model, source).items():
        vocabulary.put(index, token, PieceType.NORMAL, 0.0, source)
    _put_added(body, vocabulary, source)
    merges = [f"{left} {right}" for left, right in _merges(model, source)]
    return {
        f"{_PREFIX}model": "gpt2",
        f"{_PREFIX}pre": pre,
        f"{_PREFIX}add_space_prefix": any(step.get("add_prefix_space") for step in steps),
        f"{_PREFIX}tokens": vocabulary.tokens,
        f"{_PREFIX}token_type": vocabulary.types,
        f"{_PREFIX}merges": merges,
    }


def _from_json_pieces(
    body: Mapping[str, Any], model_file: bytes | None, vocabulary: _Vocabulary, source: str
) -> dict[str, Value]:
    """SentencePiece's vocabulary in tokenizer.json; scores of tokenizer.model where it is there."""
    model = body["model"]
    vocab = _vocab(model, source)
    prefix = _space_prefix(body, source)
    if model_file is not None:
        pieces = read_sentencepiece_model(model_file, source)
        if pieces.tokens == sorted(vocab, key=vocab.__getitem__)[: len(pieces.tokens)]:
            _put_pieces(pieces.tokens, pieces.scores, pieces.types, vocabulary, source)
            _put_added(body, vocabulary, source)
            return _piece_keys(vocabulary, prefix)
    merges = _merges(model, source)
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    by_id = sorted(vocab, key=vocab.__getitem__)
    unknown = model.get("unk_token")
    for token in by_id:
        kind = PieceType.NORMAL
        if token == unknown:
            kind = PieceType.UNKNOWN
        elif model.get("byte_fallback") and _BYTE_PIECE.fullmatch(token):
            kind = PieceType.BYTE
        # what no merge makes comes after all that one does, as in a trained model
        vocabulary.put(vocab[token], token, kind, -float(ranks.get(token, len(ranks))), source)
    _put_added(body, vocabulary, source)
    again = merges_from_scores(vocabulary.tokens, vocabulary.scores, vocabulary.types)
    if {tuple(pair) for pair in again} != set(merges):
        raise FormatError(
            f"{source}: its merges are not those of a SentencePiece model, which llama.cpp would take it for; put the "
            "tokenizer.model of the same model beside it"
        )
    return _piece_keys(vocabulary, prefix)


def _from_pieces(pieces: SentencePieceModel, vocabulary: _Vocabulary, source: str) -> dict[str, Value]:
    _put_pieces(pieces.tokens, pieces.scores, pieces.types, vocabulary, source)
    return _piece_keys(vocabulary, pieces.add_dummy_prefix)


def _put_pieces(tokens: list[str], scores: list[float], types: list[int], vocabulary: _Vocabulary, source: str) -> None:
    for index, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        vocabulary.put(index, token, PieceType(kind), score, source)


def _piece_keys(vocabulary: _Vocabulary, prefix: bool) -> dict[str, Value]:
    return {
        f"{_PREFIX}model": "llama",
        f"{_PREFIX}pre": "default",
        f"{_PREFIX}add_space_prefix": prefix,
        f"{_PREFIX}tokens": vocabulary.tokens,
        f"{_PREFIX}scores": vocabulary.scores,
        f"{_PREFIX}token_type": vocabulary.types,
    }


def _space_prefix(body: Mapping[str, Any], source: str) -> bool:
    """Whether a blank comes before a text; refuses what is no SentencePiece tokenizer."""
    prefix = False
    for step in pre_tokenizers.steps_of(body.get("normalizer"), "normalizers"):
        blank = step.get("pattern") == {"String": " "} and step.get("content") == "▁"
        if step.get("type") == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif step.get("type") != "Replace" or not blank:
            raise FormatError(f"{source}: its normalizer {step.get('type')!r} has no equal in llama.cpp")
    for step in pre_tokenizers.steps_of(body.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") != "Metaspace" or step.get("split"):
            raise FormatError(f"{source}: its pre-tokenizer {step.get('type')!r} has no equal in llama.cpp")
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        prefix = prefix or scheme != "never"
    return prefix


def _put_added(body: Mapping[str, Any], vocabulary: _Vocabulary, source: str) -> None:
    for token in _added(body):
        index, content = token.get("id"), token.get("content")
        if not isinstance(index, int) or isinstance(index, bool) or not isinstance(content, str):
            raise FormatError(f"{source}: added_tokens has an entry without an id and a text")
        unknown = 0 <= index < len(vocabulary.types) and vocabulary.types[index] == PieceType.UNKNOWN
        kind = PieceType.CONTROL if token.get("special") else PieceType.USER_DEFINED
        score = vocabulary.scores[index] if unknown else _ADDED_SCORE
        vocabulary.put(index, content, PieceType.UNKNOWN if unknown else kind, score, source)


def _added_beside(files: Mapping[str, bytes], settings: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    """The added tokens of a folder without tokenizer.json, as they would stand in it."""
    added = [{"id": index, "content": token} for token, index in _object(files, "added_tokens.json", source).items()]
    decoder = settings.get("added_tokens_decoder")
    for index, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, Mapping) and index.isdecimal():
            added.append({**token, "id": int(index)})
    return added


def _swallowing(body: Mapping[str, Any]) -> list[str]:
    names = [
        str(token.get("content"))
        for token in _added(body)
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
    ]
    return [f"llama.cpp does not take in the blanks around {', '.join(names[:5])}"] if names else []


def _special_keys(
    files: Mapping[str, bytes],
    settings: Mapping[str, Any],
    body: Mapping[str, Any],
    vocabulary: _Vocabulary,
    config: LlamaConfig,
    source: str,
) -> dict[str, Value]:
    ids = {token: index for index, token in reversed(list(enumerate(vocabulary.tokens)))}
    named = {**_object(files, "special_tokens_map.json", source), **settings}
    found: dict[str, int] = {}
    for role in _ROLES:
        value = named.get(f"{role}_token")
        content = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(content, str) and content in ids:
            found[role] = ids[content]
    ends = list(config.eos_token_ids)
    for role, index in (("bos", config.bos_token_id), ("eos", ends[0] if ends else None), ("pad", config.pad_token_id)):
        if index is not None and 0 <= index < len(vocabulary.tokens):
            found.setdefault(role, index)
    keys: dict[str, Value] = {}
    for role, before in (("bos", True), ("eos", False)):
        keys[f"{_PREFIX}add_{role}_token"] = role in found and _is_added(
            body, settings, role, found[role], before, source
        )
    keys |= {f"{_PREFIX}{_ROLES[role]}_token_id": index for role, index in found.items()}
    generation = _object(files, "generation_config.json", source).get("eos_token_id")
    ends += [i for i in (generation if isinstance(generation, list) else [generation]) if isinstance(i, int)]
    others = [i for i in dict.fromkeys(ends) if i != found.get("eos") and 0 <= i < len(vocabulary.tokens)]
    for index in others:
        role = "eom" if vocabulary.tokens[index] == _END_OF_MESSAGE or f"{_PREFIX}eot_token_id" in keys else "eot"
        keys.setdefault(f"{_PREFIX}{role}_token_id", index)
    return keys


def _is_added(
    body: Mapping[str, Any], settings: Mapping[str, Any], role: str, index: int, first: bool, source: str
) -> bool:
    """Whether bos (eos) is put before (after) every text: by the post-processor, or by tokenizer_config.json."""
    for step in pre_tokenizers.steps_of(body.get("post_processor"), "processors"):
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            try:
                special = single[0 if first else -1].get("SpecialToken")
                tokens = step.get("special_tokens") or {}
                ids = tokens.get(special["id"], {}).get("ids") if special else None
            except (AttributeError, TypeError, KeyError, IndexError) as error:
                raise FormatError(
                    f"{source}: tokenizer.json: the template of its post_processor is broken; fetch the file again"
                ) from error
            return bool(ids == [index])
    flag = settings.get(f"add_{role}_token")
    if isinstance(flag, bool):
        return flag
    return role == "bos" and not body  # tokenizer.model alone: LLaMA's convention


def _chat_template(files: Mapping[str, bytes], settings: Mapping[str, Any], source: str) -> dict[str, Value]:
    template: Any = settings.get("chat_template")
    if "chat_template.jinja" in files:
        try:
            template = files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{source}: chat_template.jinja is not UTF-8 text ({error.reason})") from error
    elif template is None:
        template = _object(files, "chat_template.json", source).get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {
        re.sub(r"[^A-Za-z0-9]", "_", str(entry.get("name", ""))): entry.get("template")
        for entry in (template if isinstance(template, list) else [])
        if isinstance(entry, Mapping)
    }
    if not named or not all(name and isinstance(text, str) for name, text in named.items()):
        raise FormatError(f"{source}: chat_template is neither a text nor a list of named ones")
    default = named.pop("default", None)
    keys: dict[str, Value] = {f"tokenizer.chat_template.{name}": str(text) for name, text in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = sorted(named)
    return keys if default is None else {**keys, "tokenizer.chat_template": str(default)}


def _vocab(model: Mapping[str, Any], source: str) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab or not all(type(index) is int for index in vocab.values()):
        raise FormatError(f"{source}: model.vocab must give an id for each token")
    if len(set(vocab.values())) != len(vocab):
        raise FormatError(f"{source}: model.vocab gives one id to two tokens")
    return vocab


def _merges(model: Mapping[str, Any], source: str) -> list[tuple[str, str]]:
    """The merges, each two parts (a text with a blank between them in older files)."""
    merges = []
    found = model.get("merges")
    for merge in found if isinstance(found, list) else []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not all(isinstance(p, str) and " " not in p for p in parts)
        ):
            raise FormatError(f"{source}: the merge {str(merge)[:60]!r} is not two tokens without a blank in them")
        merges.append((parts[0], parts[1]))
    return merges


def _added(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    added = body.get("added_tokens")
    return [token for token in added if isinstance(token, Mapping)] if isinstance(added, list) else []


def _object(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    """A JSON object among the files; {} when it is not there."""
    return parse_json_object(files[name], f"{source}: {name}") if name in files else {}
