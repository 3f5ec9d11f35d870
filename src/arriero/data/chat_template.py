"""Chat templates: a conversation as the one text that a model was trained on.

Templates are Jinja programs that come with a model's files and are not trusted: they are rendered in a sandbox, in a
process apart that has limits of time, memory and output (see `template_process`). Nor is the conversation trusted: the
names of special tokens in it are marked before rendering, so that they can be told from those the template writes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.data.template_process import WORKER
from arriero.errors import TemplateError

SOURCE_LIMIT = 512 * 2**10
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")


@dataclass(frozen=True)
class MarkedChat:
    """A rendered conversation in which special tokens' names that came from a message stand between two marks.

    Attributes:
        generation_marks: the two characters around what the template says is the assistant's, if that was asked for.
    """

    rendered: str
    marks: tuple[str, str] | None
    generation_marks: tuple[str, str] | None = None

    @property
    def marked(self) -> bool:
        """Whether any message held the name of a special token."""
        return self.marks is not None

    @property
    def text(self) -> str:
        """The conversation without marks."""
        return self._unmarked(self.rendered)

    def without_generation_marks(self) -> tuple[MarkedChat, list[tuple[int, int]]]:
        """The conversation, and what of it the assistant says: (start, end) in characters of `text`."""
        opening, closing = self.generation_marks or ("", "")
        quotes = self.marks or ()
        spans: list[tuple[int, int]] = []
        starts: list[int] = []
        position = 0
        for character in self.rendered if self.generation_marks else "":
            if character == opening:
                starts.append(position)
            elif character == closing:
                start = starts.pop() if starts else position
                if not starts:  # a block inside another is part of it
                    spans.append((start, position))
            elif character not in quotes:
                position += 1
        rendered = self.rendered
        for mark in self.generation_marks or ():
            rendered = rendered.replace(mark, "")
        return MarkedChat(rendered, self.marks), spans

    def split(self, special_tokens: Collection[str]) -> list[tuple[str, bool]]:
        """(text, whether it is a control token that the template wrote), in order; no empty texts."""
        opening, closing = self.marks or ("", "")
        names = "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True)) or "(?!)"
        quoted = f"{opening}(?:{names}){closing}" if self.marks else "(?!)"
        parts: list[tuple[str, bool]] = []
        position = 0
        for match in re.finditer(f"{quoted}|({names})", self.rendered):
            if match.group(1) is not None:
                parts.append((self._unmarked(self.rendered[position : match.start()]), False))
                parts.append((match.group(1), True))
                position = match.end()
        parts.append((self._unmarked(self.rendered[position:]), False))
        return [part for part in parts if part[0]]

    def _unmarked(self, text: str) -> str:
        for mark in (*(self.marks or ()), *(self.generation_marks or ())):
            text = text.replace(mark, "")
        return text


class ChatTemplate:
    """A template's source; nothing is parsed before it is first rendered."""

    def __init__(self, source: str, name: str = "chat template") -> None:
        """
        Args:
            source: the Jinja program.
            name: where it is from, for messages.

        Raises:
            TemplateError: an oversized source.
        """
        if len(source) > SOURCE_LIMIT:
            raise TemplateError(f"{name}: the chat template is longer than {SOURCE_LIMIT:,} characters")
        self.source = source
        self.name = name

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself what is the assistant's, by `{% generation %}` blocks."""
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        named: Mapping[str, str] | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_marks: tuple[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text.

        Args:
            messages: {"role", "content"} each; keys whose value is None count as absent. What was thought is given to the
                template by all of its names, as in transformers.
            named: bos_token, eos_token ..., which templates write.
            tools: JSON schemas of the functions that the assistant may call.
            generation_marks: what is written before and after each `{% generation %}` block.
            variables: others that this template reads; they replace none of those above.

        Raises:
            TemplateError: in one line, what the template refused or why it was stopped.
        """
        if not messages:
            raise TemplateError("a conversation needs at least one message")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise TemplateError("every message must be an object with a string `role` and a `content`")
        given = {
            **(variables or {}),
            **(named or {}),
            "messages": [
                _with_thoughts({key: value for key, value in m.items() if value is not None}) for m in messages
            ],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return WORKER.render(self.source, given, generation_marks=generation_marks)
        except TemplateError as error:
            raise TemplateError(f"{self.name}: the chat template failed: {error}") from error

    def render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        special_tokens: Collection[str],
        named: Mapping[str, str] | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        mark_generation: bool = False,
        mark_answers: bool = False,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> MarkedChat:
        """`render`, with special tokens' names in the messages, tools and variables marked as text.

        Args:
            mark_generation: mark `{% generation %}` blocks too.
            mark_answers: mark the assistant's contents in the same way, without the blanks around them.
            continue_final_message: end within the last message, so that the answer goes on with it.

        Raises:
            TemplateError: as `render`; a last message that the template does not write.
        """
        for message in messages:
            self._check_role(message, special_tokens)
        given = [*messages, *(tools or ()), variables or {}]
        held = any(_holds(item, special_tokens) for item in given)
        marking = mark_generation or mark_answers
        marks = _unused_marks(given, self.source, 5) if held or marking or continue_final_message else ()
        generation = (marks[2], marks[3]) if marking else None
        quotes = None
        if held:
            quotes = (marks[0], marks[1])
            names = re.compile("|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True)))
            replacement = f"{marks[0]}\\g<0>{marks[1]}"
            messages = [_marked(message, names, replacement) for message in messages]
            tools = [_marked(tool, names, replacement) for tool in tools or ()]
            variables = _marked(variables, names, replacement)
        if mark_answers:
            messages = [_around_content(message, marks[2], marks[3]) for message in messages]
        if continue_final_message and messages:
            messages = [*messages[:-1], {**messages[-1], "content": f"{messages[-1].get('content') or ''}{marks[4]} "}]
        rendered = self.render(
            messages,
            named=named,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            generation_marks=generation if mark_generation else None,
            variables=variables,
        )
        if continue_final_message:
            rendered = self._up_to(marks[4], rendered)
        return MarkedChat(rendered, quotes, generation)

    def _up_to(self, mark: str, rendered: str) -> str:
        """A conversation up to a mark, which has a blank behind it: where the template trims that, blanks before it are no
        part of the text either, as in transformers."""
        before, found, after = rendered.rpartition(mark)
        if not found:
            raise TemplateError(
                f"{self.name}: the chat template failed: it does not write the last message, which is to be continued"
            )
        return before if after.startswith(" ") else before.rstrip()

    def _check_role(self, message: Mapping[str, Any], special_tokens: Collection[str]) -> None:
        # Some templates write '<|' + role + '|>': a role may complete no token but those of the known roles.
        role = message.get("role") if isinstance(message, Mapping) else None
        if isinstance(role, str) and role not in KNOWN_ROLES and any(role in token for token in special_tokens):
            raise TemplateError(f"{self.name}: unknown role {role!r}; the roles are {', '.join(KNOWN_ROLES)}")


def _with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose thought templates find as `reasoning_content` and as `thinking` (transformers'
    `_alias_reasoning_fields`)."""
    names = ("reasoning_content", "thinking", "reasoning")
    thought = next((message[name] for name in names if name in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return []


def _holds(message: Mapping[str, Any], special_tokens: Collection[str]) -> bool:
    return any(token in text for text in _strings(message) for token in special_tokens)


def _marked(value: Any, names: re.Pattern[str], replacement: str) -> Any:
    if isinstance(value, str):
        return names.sub(replacement, value)
    if isinstance(value, Mapping):
        return {key: _marked(item, names, replacement) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, names, replacement) for item in value]
    return value


def _around_content(message: Mapping[str, Any], opening: str, closing: str) -> Mapping[str, Any]:
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str) or not content.strip():
        return message
    begin = len(content) - len(content.lstrip())
    core = content.strip()
    marked = f"{content[:begin]}{opening}{core}{closing}{content[begin + len(core) :]}"
    return {**message, "content": marked}


def _unused_marks(messages: Sequence[Mapping[str, Any]], source: str, count: int) -> tuple[str, ...]:
    """Private-use characters that occur nowhere, so that no message can forge a mark."""
    used = set(source).union(*(set(text) for message in messages for text in _strings(message)))
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    marks = tuple(itertools.islice(free, count))
    if len(marks) < count:
        raise TemplateError("the messages use every private-use character there is")
    return marks
