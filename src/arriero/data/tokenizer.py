"""Text to token ids and back, for every LLaMA-family tokenizer folder.

Ids equal those of transformers' AutoTokenizer on the same folder. Text is data: unless `allow_special` is given, a
special token's name inside a text is encoded as the letters it is made of and never becomes the control token.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from arriero.data.assistant_turns import ANSWER, QUESTION, TurnFrame, find_turns
from arriero.data.chat_template import ChatTemplate, MarkedChat
from arriero.data.json_tokenizer import JsonTokenizer
from arriero.data.sentencepiece_tokenizer import SentencePieceTokenizer
from arriero.data.stream_decoder import ByteDecoding, StreamDecoder
from arriero.data.surrogates import all_without_surrogates, without_surrogates
from arriero.data.tokenizer_files import END_OF_TURN, MORE_TEMPLATES, SIDE_FILES, TokenizerFiles, read_tokenizer_files
from arriero.errors import FormatError, TemplateError
from arriero.output_file import replace_file

# A tool and a call of another, whose names are in a rendered text if the template writes them
TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {"name": "set_clock", "description": "Set it.", "parameters": {"type": "object", "properties": {}}},
}
CALL: Mapping[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "read_clock", "arguments": {}}}],
}
SENTENCEPIECE_NAMES = ("tokenizer.model", "sentencepiece.bpe.model")


class Vocabulary(Protocol):
    """What a tokenizer library gives: see `JsonTokenizer`, `SentencePieceTokenizer`."""

    size: int
    special: dict[str, int]
    unknown_id: int | None
    decoding: ByteDecoding

    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_literal(self, text: str) -> list[int]: ...
    def offsets(self, text: str, *, after_token: bool = ...) -> tuple[list[int], list[tuple[int, int]]]: ...
    def framing(self) -> tuple[list[int], list[int]]: ...
    def swallows_blanks(self, token: str) -> tuple[bool, bool]: ...


class Tokenizer:
    """A vocabulary with its special tokens and chat template. Threads may share it.

    Attributes:
        vocab_size: one more than the greatest id, added tokens included.
        bos_token_id, eos_token_id, pad_token_id: None where the model has none.
        stop_token_ids: ids that end an answer: end of text, those of generation_config.json, end of turn.
        special_tokens: control tokens' text -> id.
        folder: where the files are.
        replaced_files: contents that stand for those of files there; see `arriero.data.new_tokens`.
    """

    def __init__(self, vocabulary: Vocabulary, files: TokenizerFiles) -> None:
        self._vocabulary = vocabulary
        self._files = files
        self.folder, self.replaced_files = files.folder, files.replaced
        self.vocab_size = vocabulary.size
        self.special_tokens = dict(vocabulary.special)
        self.bos_token_id = self._named_id("bos_token", "bos_token_id")
        self.eos_token_id = self._named_id("eos_token", "eos_token_id")
        self.pad_token_id = self._named_id("pad_token", "pad_token_id")
        self._special_ids = frozenset(self.special_tokens.values())
        self.stop_token_ids = self._stop_ids()
        self._prefix, self._suffix = self._framing()
        self._template = ChatTemplate(files.chat_template, str(files.folder)) if files.chat_template else None
        self._written: dict[tuple[str, bool], bool] = {}
        self._tool_template = ChatTemplate(files.tool_template, str(files.folder)) if files.tool_template else None

    def _named_id(self, key: str, id_key: str) -> int | None:
        named = self._files.named.get(key)
        if named is not None:
            return self._vocabulary.token_to_id(named.content)
        own = (
            getattr(self._vocabulary, "bos_id" if key == "bos_token" else "eos_id", None)
            if key != "pad_token"
            else None
        )
        if isinstance(own, int):
            return own
        ids = [i for i in self._files.token_ids(id_key) if i < self.vocab_size]
        return ids[0] if ids else None

    def _stop_ids(self) -> list[int]:
        ids = [] if self.eos_token_id is None else [self.eos_token_id]
        ids += self._files.token_ids("eos_token_id")
        ids += [self.special_tokens[token] for token in END_OF_TURN if token in self.special_tokens]
        return list(dict.fromkeys(ids))

    def _framing(self) -> tuple[list[int], list[int]]:
        config = self._files.config
        if "add_bos_token" not in config and "add_eos_token" not in config:
            return self._vocabulary.framing()
        bos, eos = self.bos_token_id, self.eos_token_id
        return (
            [bos] if config.get("add_bos_token", False) and bos is not None else [],
            [eos] if config.get("add_eos_token", False) and eos is not None else [],
        )

    def encode(self, text: str, *, add_special_tokens: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: begin and end as the model's tokenizer does, with bos for instance.
            allow_special: special tokens' names inside the text become those tokens; only for text you wrote yourself.
        """
        text = without_surrogates(text)
        return self._finish(text, self._vocabulary.encode(text), add_special_tokens, allow_special)

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = False, allow_special: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        texts = [without_surrogates(text) for text in texts]
        return [
            self._finish(text, ids, add_special_tokens, allow_special)
            for text, ids in zip(texts, self._vocabulary.encode_batch(texts), strict=True)
        ]

    def _finish(self, text: str, ids: list[int], add_special_tokens: bool, allow_special: bool) -> list[int]:
        if not allow_special and not self._special_ids.isdisjoint(ids):
            ids = self._encode_literal(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _encode_literal(self, text: str) -> list[int]:
        ids = self._vocabulary.encode_literal(text)
        self._check_ordinary(ids)
        return ids

    def _check_ordinary(self, ids: list[int]) -> None:
        # An unknown character gives the unknown token without anyone having typed its name.
        strange = self._special_ids.intersection(ids) - {self._vocabulary.unknown_id}
        if strange:
            token = self.id_to_token(min(strange))
            raise FormatError(f"{self.folder}: its vocabulary makes the control token {token!r} of ordinary text")

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that goes on after another: without the blank that some vocabularies put before a text."""
        ids, _ = self._vocabulary.offsets(without_surrogates(text), after_token=True)
        self._check_ordinary(ids)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode(text)`, with the (start, end) of each token in characters of the text."""
        return self._vocabulary.offsets(without_surrogates(text))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._vocabulary.decoding.decode(ids, skip_special_tokens)

    @property
    def decoding(self) -> ByteDecoding:
        """What each id is as text, and how texts of ids are put together."""
        return self._vocabulary.decoding

    def byte_lengths(self) -> list[int]:
        """UTF-8 bytes of text that each id stands for, for ids 0 to vocab_size - 1; 0 for special tokens."""
        decoding = self._vocabulary.decoding
        return [
            0 if token_id in decoding.special_ids else len(decoding.token_bytes[token_id])
            for token_id in range(self.vocab_size)
        ]

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Decodes id by id; never shows half a character, and adds up to `decode` of all ids."""
        return StreamDecoder(self._vocabulary.decoding, skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text, None if there is no such token."""
        return self._vocabulary.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The text of an id as the vocabulary writes it, None if there is no such id."""
        return self._vocabulary.id_to_token(token_id)

    def save(self, folder: Path) -> None:
        """Copy the files that this tokenizer was read from into a folder, with the tokens that were added since; each whole.

        Raises:
            FormatError: one cannot be read or written, a full disk say.
        """
        folder.mkdir(parents=True, exist_ok=True)
        more = [path.relative_to(self.folder).as_posix() for path in self.folder.glob(f"{MORE_TEMPLATES}/*.jinja")]
        for name in (*SIDE_FILES, *sorted(more)):
            source, target = self.folder / name, folder / name
            try:
                if name in self.replaced_files:
                    replace_file(target, self.replaced_files[name])
                elif source.is_file() and not (target.exists() and source.samefile(target)):
                    target.parent.mkdir(exist_ok=True)
                    replace_file(target, source.read_bytes())
            except OSError as error:
                full = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
                raise FormatError(f"{target}: cannot be written from {source} ({full})") from error

    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return self._template is not None

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template."""
        return self._template.source if self._template is not None else None

    @property
    def tool_template(self) -> str | None:
        """The source of the template for conversations with tools: that named `tool_use`, else the chat template."""
        return self._tool_template.source if self._tool_template is not None else self.chat_template

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the one text that the model was trained on.

        Raises:
            TemplateError: no template, or one that fails on these messages.
        """
        return self._render(messages, add_generation_prompt).text

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a conversation; special tokens come from the template only, never from a message.

        Args:
            messages: {"role", "content"} each.
            add_generation_prompt: end where the assistant's answer begins.
            tools: JSON schemas of the functions that the assistant may call; the template `tool_use` is taken for them, if
                there is one.
            variables: others that the template reads, such as `enable_thinking`.
            continue_final_message: end within the last message, so that the answer goes on with it.

        Raises:
            TemplateError: no template, or one that fails on these messages.
        """
        chat = self._render(
            messages, add_generation_prompt, tools, variables=variables, continue_final_message=continue_final_message
        )
        if not chat.marked:
            return self._vocabulary.encode(chat.text)
        return [token_id for ids, _, _ in self._pieces(chat) for token_id in ids]

    @property
    def marks_generation(self) -> bool:
        """Whether the chat template (that for tools too) says itself what of a conversation is the assistant's."""
        templates = [template for template in (self._template, self._tool_template) if template is not None]
        return self._template is not None and all(template.marks_generation for template in templates)

    def chat_with_generation(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[bool]]:
        """`chat` of a whole conversation, and of each token whether it is of the assistant's turns.

        These are what the template's `{% generation %}` blocks write; a token that is partly inside a block counts as inside,
        as in transformers' `return_assistant_tokens_mask`. Of a template without such blocks see `assistant_turns`.
        """
        if self.marks_generation:
            chat, spans = self._render(messages, False, tools, mark_generation=True).without_generation_marks()
        else:
            chat, spans = self._render(messages, False, tools), []
            marked, contents = self._render(messages, False, tools, mark_answers=True).without_generation_marks()
            if marked.text == chat.text:  # a template can look at what the marks hide
                spans = find_turns(marked, contents, messages, self.turn_frame, self.special_tokens)
        ids: list[int] = []
        mask: list[bool] = []
        span = 0
        for piece, offsets, start in self._pieces(chat):
            ids += piece
            for begin, end in offsets:
                while span < len(spans) and spans[span][1] <= start + begin:
                    span += 1
                mask.append(span < len(spans) and start + end > spans[span][0] and end > begin)
        return ids, mask

    @cached_property
    def turn_frame(self) -> TurnFrame:
        """What the template writes around what the assistant says; of one that fails on a plain exchange its end alone."""
        try:
            opened, closed = (self._render([QUESTION], way).text for way in (True, False))
            answered = self._render([QUESTION, ANSWER], False, mark_answers=True)
        except TemplateError:
            return TurnFrame("", "" if self.eos_token_id is None else self.id_to_token(self.eos_token_id) or "")
        return TurnFrame.of(opened, closed, answered, self.special_tokens)

    def writes_tools(self) -> bool:
        """Whether the template tells the model what tools it may call; one that fails on a plain tool may do so."""
        return self._writes([QUESTION], [TOOL], "set_clock")

    def writes_calls(self, *, with_tools: bool) -> bool:
        """Whether the template (that for tools, if some are given) writes the assistant's calls; see `writes_tools`."""
        return self._writes([QUESTION, CALL], [TOOL] if with_tools else None, "read_clock")

    def _writes(self, messages: list[Mapping[str, Any]], tools: list[Mapping[str, Any]] | None, name: str) -> bool:
        key = (name, tools is not None)
        if key not in self._written:
            try:
                self._written[key] = name in self._render(messages, False, tools).text
            except TemplateError:
                self._written[key] = True
        return self._written[key]

    def _pieces(self, chat: MarkedChat) -> Iterator[tuple[list[int], list[tuple[int, int]], int]]:
        """A conversation's control tokens and the texts between them: ids, (start, end) of each within the piece in
        characters, and where the piece starts in the text."""
        parts = chat.split(self.special_tokens)
        position = 0
        for i, (text, is_control) in enumerate(parts):
            start = position
            position += len(text)
            if is_control:
                yield [self.special_tokens[text]], [(0, len(text))], start
                continue
            if i + 1 < len(parts) and self._vocabulary.swallows_blanks(parts[i + 1][0])[0]:
                text = text.rstrip()
            if i > 0 and self._vocabulary.swallows_blanks(parts[i - 1][0])[1]:
                start += len(text) - len(text.lstrip())
                text = text.lstrip()
            ids, offsets = self._vocabulary.offsets(text, after_token=i > 0)
            self._check_ordinary(ids)
            yield ids, offsets, start

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> MarkedChat:
        """
        Args:
            options: of `ChatTemplate.render_marked`.
        """
        template = self._tool_template if tools and self._tool_template is not None else self._template
        if template is None:
            raise TemplateError(
                f"{self.folder}: this model has no chat template; use an instruct model, or a plain prompt"
            )
        named = {key: token.content for key, token in self._files.named.items()}
        for key, own in (("bos_token", self.bos_token_id), ("eos_token", self.eos_token_id)):
            token = self.id_to_token(own) if own is not None else None
            if token is not None:
                named.setdefault(key, token)
        return template.render_marked(
            all_without_surrogates(list(messages)),
            special_tokens=self.special_tokens,
            named=named,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **options,
        )


def load_tokenizer(folder: Path | str, replaced: Mapping[str, bytes] | None = None) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, else a SentencePiece model.

    Args:
        replaced: contents of vocabulary files, by name, which stand for those in the folder.

    Raises:
        FormatError: no tokenizer there, or a broken file; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder; give a model folder, or a name that `arriero download` knows")
    files = read_tokenizer_files(folder, replaced)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(JsonTokenizer(files), files)
    for name in SENTENCEPIECE_NAMES:
        if (folder / name).is_file():
            return Tokenizer(SentencePieceTokenizer(files, folder / name), files)
    raise FormatError(
        f"{folder}: no tokenizer.json and no tokenizer.model; copy the tokenizer files of the model there"
    )
