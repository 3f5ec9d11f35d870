"""One small interface over the two tokenizer libraries: `tokenizers` (tokenizer.json) and `sentencepiece` (*.model)."""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from arriero.data.chat_template import ChatTemplate, Message
from arriero.data.stream_decoder import StreamDecoder
from arriero.errors import FormatError, TemplateError

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
MAX_JSON_BYTES = 256 << 20
# what ends a turn in the usual templates; a model may stop at any of them
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>")


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids, added tokens included.
        special_tokens: control tokens by their text.
        stop_token_ids: ids that end an answer.
    """

    vocab_size: int
    special_tokens: dict[str, int]

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self._template: ChatTemplate | None = None

    def _finish(self) -> None:
        """Look up the named special tokens, once the vocabulary is there."""
        self.bos_token_id = self._named("bos_token")
        self.eos_token_id = self._named("eos_token")
        self.pad_token_id = self._named("pad_token")
        self.add_bos_token = bool(self.settings.get("add_bos_token", False))
        self.add_eos_token = bool(self.settings.get("add_eos_token", False))
        stops = [self.eos_token_id, *_as_list(self.settings.get("generation_eos"))]
        template = self.settings.get("chat_template") or ""
        stops += [self.special_tokens[end] for end in TURN_ENDS if end in self.special_tokens and end in template]
        self.stop_token_ids = sorted({stop for stop in stops if isinstance(stop, int)})
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def _named(self, key: str) -> int | None:
        value = self.settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            return None
        identifier = self.token_to_id(str(text))
        if identifier is None and key != "pad_token":
            raise FormatError(f"{self.folder}: {key} {text!r} is not in the vocabulary of the tokenizer")
        return identifier

    @abstractmethod
    def _encode_plain(self, text: str, *, specials: bool) -> list[int]:
        """Ids of `text` alone; `specials` says whether control tokens are recognised in it."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of ordinary text, and the (start, end) character span of each."""

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None: ...

    @abstractmethod
    def id_to_token(self, identifier: int) -> str | None: ...

    def encode(self, text: str, *, add_special_tokens: bool = False, allow_special: bool = False) -> list[int]:
        """Ids of `text`.

        Args:
            add_special_tokens: put the begin (and end) token around, as the tokenizer's settings say.
            allow_special: turn the text of a control token into that token. Only for text that is trusted.
        """
        ids = self._encode_plain(text, specials=allow_special)
        if add_special_tokens:
            if self.add_bos_token and self.bos_token_id is not None:
                ids = [self.bos_token_id, *ids]
            if self.add_eos_token and self.eos_token_id is not None:
                ids = [*ids, self.eos_token_id]
        return ids

    def encode_batch(self, texts: Iterable[str], *, add_special_tokens: bool = False, allow_special: bool = False) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text, add_special_tokens=add_special_tokens, allow_special=allow_special) for text in texts]

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for one sequence that is still growing."""
        return StreamDecoder(lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens))

    def has_chat_template(self) -> bool:
        return bool(self.settings.get("chat_template"))

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, by the model's own template.

        Raises:
            TemplateError: there is no template, or it fails.
        """
        if self._template is None:
            if not self.has_chat_template():
                raise TemplateError(f"{self.folder}: the model has no chat template, so it cannot take a conversation")
            special = {}
            for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
                value = self.settings.get(key)
                text = value.get("content") if isinstance(value, dict) else value
                if text is not None:
                    special[key] = str(text)
            self._template = ChatTemplate(self.settings["chat_template"], special)
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The conversation as ids.

        Control tokens written by the template become control tokens; the same text inside a message stays text.
        """
        pattern = self._special_pattern
        if pattern is None or not any(pattern.search(str(message.get("content", ""))) for message in messages):
            text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
            return self.encode(text, allow_special=True)
        # a control token's text inside a message is rendered as private-use characters and put back as ordinary text
        marked = [{**message, "content": _mask(pattern, str(message.get("content", "")))} for message in messages]
        text = self.render_chat(marked, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        for i, piece in enumerate(re.split(f"{_OPEN}(.*?){_CLOSE}", text, flags=re.S)):
            ids += self.encode(piece, allow_special=True) if i % 2 == 0 else self.encode(_unmask(piece))
        return ids

    def save(self, folder: Path) -> None:
        """Copy the files this tokenizer was read from."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file() and (self.folder / name).resolve() != (folder / name).resolve():
                shutil.copyfile(self.folder / name, folder / name)


# Unicode noncharacters U+FDD0..: valid in a string, never in interchanged text; hexadecimal between them survives any
# trimming or case change a template may do
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def _mask(pattern: re.Pattern[str], content: str) -> str:
    content = content.replace(_OPEN, "").replace(_CLOSE, "")
    return pattern.sub(lambda match: _OPEN + match[0].encode().hex() + _CLOSE, content)


def _unmask(piece: str) -> str:
    return bytes.fromhex(piece).decode()


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class FastTokenizer(Tokenizer):
    """A `tokenizer.json`, through the `tokenizers` library."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings)
        import tokenizers

        path = folder / "tokenizer.json"
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{path}: {path.stat().st_size} bytes, at most {MAX_JSON_BYTES} are read")
        try:
            self._trusting = tokenizers.Tokenizer.from_file(str(path))
            self._plain = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every malformed file
            raise FormatError(f"{path}: not a tokenizer file ({' '.join(str(error).split())[:200]})") from error
        for tokenizer in (self._trusting, self._plain):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._plain.encode_special_tokens = True
        self.vocab_size = self._trusting.get_vocab_size(with_added_tokens=True)
        added = self._trusting.get_added_tokens_decoder()
        self.special_tokens = {token.content: identifier for identifier, token in added.items() if token.special}
        self._adds_specials = self._trusting.num_special_tokens_to_add(is_pair=False) > 0
        self._finish()

    def _encode_plain(self, text: str, *, specials: bool) -> list[int]:
        tokenizer = self._trusting if specials else self._plain
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, text: str, *, add_special_tokens: bool = False, allow_special: bool = False) -> list[int]:
        if add_special_tokens and self._adds_specials:  # the file's own post-processor knows best
            tokenizer = self._trusting if allow_special else self._plain
            ids: list[int] = tokenizer.encode(text, add_special_tokens=True).ids
            return ids
        return super().encode(text, add_special_tokens=add_special_tokens, allow_special=allow_special)

    def encode_batch(self, texts: Iterable[str], *, add_special_tokens: bool = False, allow_special: bool = False) -> list[list[int]]:
        if add_special_tokens:
            return super().encode_batch(texts, add_special_tokens=True, allow_special=allow_special)
        tokenizer = self._trusting if allow_special else self._plain
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._plain.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._trusting.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        identifier: int | None = self._trusting.token_to_id(token)
        return identifier

    def id_to_token(self, identifier: int) -> str | None:
        token: str | None = self._trusting.id_to_token(identifier)
        return token


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model` or `sentencepiece.bpe.model`, through the `sentencepiece` library, as LLaMA 1 and 2 ship it."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        super().__init__(path.parent, settings)
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # the library raises RuntimeError or OSError by the kind of damage
            raise FormatError(f"{path}: not a sentencepiece model ({' '.join(str(error).split())[:200]})") from error
        size = self._processor.get_piece_size()
        self.special_tokens = {
            self._processor.id_to_piece(i): i for i in range(size) if self._processor.is_control(i) or self._processor.is_unknown(i)
        }
        self._added: dict[str, int] = {}
        for identifier, entry in settings.get("added_tokens_decoder", {}).items():
            text = entry["content"] if isinstance(entry, dict) else str(entry)
            if int(identifier) >= size:
                self._added[text] = int(identifier)
            if not isinstance(entry, dict) or entry.get("special", True):
                self.special_tokens[text] = int(identifier)
        self._added_text = {identifier: text for text, identifier in self._added.items()}
        self.vocab_size = max([size - 1, *self._added.values()]) + 1
        for key, name in (("bos_token", "bos_id"), ("eos_token", "eos_id"), ("unk_token", "unk_id")):
            identifier = getattr(self._processor, name)()
            if key not in settings and identifier >= 0:
                settings[key] = self._processor.id_to_piece(identifier)
        settings.setdefault("add_bos_token", True)
        self._finish()

    def _encode_plain(self, text: str, *, specials: bool) -> list[int]:
        if not specials or self._special_pattern is None:
            return list(self._processor.encode(text))
        ids: list[int] = []
        position = 0
        for match in self._special_pattern.finditer(text):
            ids += self._processor.encode(text[position : match.start()]) if match.start() > position else []
            ids.append(self.special_tokens[match[0]])
            position = match.end()
        return ids + (self._processor.encode(text[position:]) if position < len(text) else [])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._processor.encode(text, out_type="immutable_proto")
        return [piece.id for piece in encoded.pieces], [(piece.begin, piece.end) for piece in encoded.pieces]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        controls = set(self.special_tokens.values())
        pieces: list[str] = []
        run: list[int] = []
        for identifier in ids:
            if identifier in controls or identifier in self._added_text:
                pieces.append(self._processor.decode(run) if run else "")
                run = []
                if not (skip_special_tokens and identifier in controls):
                    pieces.append(self.id_to_token(identifier) or "")
            else:
                run.append(identifier)
        return "".join([*pieces, self._processor.decode(run) if run else ""])

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        identifier = int(self._processor.piece_to_id(token))
        return identifier if self._processor.id_to_piece(identifier) == token else None

    def id_to_token(self, identifier: int) -> str | None:
        if identifier in self._added_text:
            return self._added_text[identifier]
        return str(self._processor.id_to_piece(identifier)) if 0 <= identifier < self._processor.get_piece_size() else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{path}: {path.stat().st_size} bytes, at most {MAX_JSON_BYTES} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: a JSON object is expected")
    return value


def read_settings(folder: Path) -> dict[str, Any]:
    """The tokenizer's settings from all the files that hold some; tokenizer_config.json wins over special_tokens_map.json."""
    settings = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    settings["generation_eos"] = _read_json(folder / "generation_config.json").get("eos_token_id")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates: the one called "default"
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        settings["chat_template"] = named.get("default")
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return settings


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        FormatError: if there is none, or a file of it is broken.
    """
    settings = read_settings(folder)
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(folder, settings)
    for name in ("tokenizer.model", "sentencepiece.bpe.model"):
        if (folder / name).is_file():
            return SentencePieceTokenizer(folder / name, settings)
    raise FormatError(f"{folder}: no tokenizer.json, tokenizer.model or sentencepiece.bpe.model")
