"""The small files beside a vocabulary: names of special tokens, stop tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.errors import FormatError

SMALL_FILE_LIMIT = 16 * 2**20
VOCABULARY_FILE_LIMIT = 512 * 2**20
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Tokens that end a turn in the common chat formats: a model that emits one has nothing more to say.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|end|>")
# What decides the ids of a text.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SIDE_FILES = (*VOCABULARY_FILES, "generation_config.json", "chat_template.jinja", "chat_template.json")
# Where transformers writes the templates that have names; `tool_use` is for conversations with tools.
MORE_TEMPLATES = "additional_chat_templates"
TOOL_TEMPLATE = f"{MORE_TEMPLATES}/tool_use.jinja"


@dataclass(frozen=True)
class AddedTokenSpec:
    """A token on top of the model's vocabulary, with the matching flags of the `tokenizers` library."""

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """What the side files of a folder say.

    Attributes:
        named: bos_token, eos_token ... -> the token's text.
        additional: further special tokens, in order.
        added: id -> token, of `added_tokens_decoder` and `added_tokens.json`.
        config: the whole of tokenizer_config.json.
        generation: the whole of generation_config.json.
        model: the whole of config.json.
        chat_template, tool_template: of all conversations, and of those with tools where that is another.
        replaced: contents that stand for those of the files of these names; see `arriero.data.new_tokens`.
    """

    folder: Path
    named: dict[str, AddedTokenSpec]
    additional: list[AddedTokenSpec]
    added: dict[int, AddedTokenSpec]
    config: dict[str, Any]
    generation: dict[str, Any]
    model: dict[str, Any]
    chat_template: str | None
    tool_template: str | None = None
    replaced: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, name: str, limit: int) -> bytes:
        """The content of a file of the folder, which may not be larger than `limit` bytes.

        Raises:
            FormatError: unreadable, or too large.
        """
        return self.replaced[name] if name in self.replaced else read_bounded(self.folder / name, limit)

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object of a small file; {} when there is no such file.

        Raises:
            FormatError: broken.
        """
        return _read_json(self.folder / name, self.replaced)

    def token_ids(self, key: str) -> list[int]:
        """The ids under a key of generation_config.json, else of config.json."""
        for source in (self.generation, self.model):
            value = source.get(key)
            ids = value if isinstance(value, list) else [value]
            if value is not None and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
                return list(ids)
        return []


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file that may not be larger than `limit` bytes.

    Raises:
        FormatError: unreadable, or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > limit:
        raise FormatError(f"{path}: larger than {limit // 2**20} MiB, which no tokenizer file is; check the download")
    return data


def _read_json(path: Path, replaced: Mapping[str, bytes]) -> dict[str, Any]:
    """A JSON object; {} when there is no such file."""
    content = replaced.get(path.name)
    if content is None and not path.is_file():
        return {}
    try:
        value = json.loads((read_bounded(path, SMALL_FILE_LIMIT) if content is None else content).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: not valid JSON ({str(error).splitlines()[0]}); download or convert it again"
        ) from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def _token(value: Any, path: Path, key: str) -> AddedTokenSpec | None:
    """A token as a string or as an object with its content and flags."""
    if value is None:
        return None
    if isinstance(value, str):
        return AddedTokenSpec(_checked(value, path, key))
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        _checked(value["content"], path, key)
        flags = {flag: bool(value[flag]) for flag in ("lstrip", "rstrip", "single_word", "normalized") if flag in value}
        return AddedTokenSpec(value["content"], special=bool(value.get("special", True)), **flags)
    raise FormatError(f"{path}: {key} must be a string or an object with a string `content`")


def _checked(content: str, path: Path, key: str) -> str:
    """Refuse half a character, which JSON can write and no text can hold."""
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise FormatError(
            f"{path}: {key} holds half a character (a lone surrogate), which no token can; write it again"
        )
    return content


def _special_tokens(
    folder: Path, config: dict[str, Any], replaced: Mapping[str, bytes]
) -> tuple[dict[str, AddedTokenSpec], list[AddedTokenSpec]]:
    named: dict[str, AddedTokenSpec] = {}
    additional: dict[str, AddedTokenSpec] = {}
    map_path = folder / "special_tokens_map.json"
    for path, source in ((map_path, _read_json(map_path, replaced)), (folder / "tokenizer_config.json", config)):
        for key in NAMED_TOKENS:
            token = _token(source.get(key), path, key)
            if token is not None and token.content:
                named[key] = token
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = source.get(key) or []
            if not isinstance(tokens, list | dict):
                raise FormatError(f"{path}: {key} must be a list of tokens")
            for value in tokens.values() if isinstance(tokens, dict) else tokens:
                token = _token(value, path, key)
                if token is not None and token.content:
                    additional[token.content] = token
    return named, list(additional.values())


def _added_tokens(folder: Path, config: dict[str, Any], replaced: Mapping[str, bytes]) -> dict[int, AddedTokenSpec]:
    added: dict[int, AddedTokenSpec] = {}
    path = folder / "added_tokens.json"
    for content, token_id in _read_json(path, replaced).items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise FormatError(f"{path}: {content!r} has no valid id")
        added[token_id] = AddedTokenSpec(_checked(content, path, "a token"), special=False)
    path = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise FormatError(f"{path}: added_tokens_decoder must be an object of id -> token")
    for key, value in decoder.items():
        token = _token(value, path, f"added_tokens_decoder[{key}]")
        if not key.isdecimal() or len(key) > 10 or token is None:
            raise FormatError(f"{path}: added_tokens_decoder[{key[:40]}] must be a token under a whole number")
        added[int(key)] = token
    return dict(sorted(added.items()))


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """`default` and `tool_use`, where they are: of .jinja files, else of tokenizer_config.json (one, or a list of named
    ones), else of chat_template.json."""
    files = {"default": folder / "chat_template.jinja", "tool_use": folder / TOOL_TEMPLATE}
    found = {name: _text(path) for name, path in files.items() if path.is_file()}
    if "default" in found:
        return found
    path = folder / "tokenizer_config.json"
    template = config.get("chat_template")
    if template is None:
        path = folder / "chat_template.json"
        template = _read_json(path, {}).get("chat_template")
    named: dict[Any, Any] = {"default": template}
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if named.get("default") is None:
            raise FormatError(f"{path}: chat_template is a list without one named `default`")
    given: dict[str, Any] = {name: named[name] for name in files if named.get(name) is not None}
    if not all(isinstance(text, str) for text in given.values()):
        raise FormatError(f"{path}: chat_template must be a string")
    return given | found


def _text(path: Path) -> str:
    try:
        return read_bounded(path, SMALL_FILE_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason})") from error


def read_tokenizer_files(folder: Path, replaced: Mapping[str, bytes] | None = None) -> TokenizerFiles:
    """Read the side files of a folder; every one of them may be missing.

    Args:
        replaced: contents of vocabulary files, which stand for those in the folder.

    Raises:
        FormatError: one of them is broken; the message names the file and the key.
    """
    replaced = replaced or {}
    config = _read_json(folder / "tokenizer_config.json", replaced)
    named, additional = _special_tokens(folder, config, replaced)
    templates = _chat_templates(folder, config)
    return TokenizerFiles(
        folder=folder,
        named=named,
        additional=additional,
        added=_added_tokens(folder, config, replaced),
        config=config,
        generation=_read_json(folder / "generation_config.json", {}),
        model=_read_json(folder / "config.json", {}),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
        replaced=replaced,
    )
