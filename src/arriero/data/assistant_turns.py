"""Where the assistant's turns are in a rendered conversation, for templates that do not mark them by `{% generation %}` blocks.

A turn is what a model has to write after a generation prompt: from there to the control token that ends it, as the template
writes it in the whole conversation. Templates need not write a turn twice alike (Qwen3 and DeepSeek-R1 leave out earlier
thoughts, Phi-3 ends a conversation otherwise than a turn), so it is looked for in the whole text, its content between two
marks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.data.chat_template import MarkedChat

QUESTION: Mapping[str, Any] = {"role": "user", "content": "question"}
ANSWER: Mapping[str, Any] = {"role": "assistant", "content": "answer"}
HIDDEN = "\uffff"
UNLEARNED: Mapping[str, Any] = {"train": False}  # in an assistant turn of a row: it is context, and not learned
THOUGHT_OPENING, THOUGHT_CLOSING = "<think>", "</think>"  # around what a model thinks before it answers


@dataclass(frozen=True)
class TurnFrame:
    """What a template writes around what the assistant says.

    Attributes:
        header: the generation prompt; "" where a user's turn ends with it.
        end: the control token at the turn's end; "" where there is none.
    """

    header: str
    end: str

    @classmethod
    def of(cls, opened: str, closed: str, answered: MarkedChat, special_tokens: Collection[str]) -> TurnFrame:
        """Of a template.

        Args:
            opened, closed: `QUESTION` with and without a generation prompt.
            answered: `QUESTION` and `ANSWER`, with marks around the latter's content.
        """
        chat, contents = answered.without_generation_marks()
        after = chat.text[contents[-1][1] :] if contents else ""
        found = [(after.index(token), -len(token), token) for token in special_tokens if token and token in after]
        return cls(opened.removeprefix(closed) if opened.startswith(closed) else "", min(found)[2] if found else "")


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether an assistant turn is not marked `UNLEARNED`."""
    return message.get("train") is not False


def unmarked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn as templates get it."""
    return {key: value for key, value in message.items() if key not in UNLEARNED}


def said(message: Mapping[str, Any]) -> str:
    """A message's content without the blanks around it; "" if it has none."""
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def find_turns(
    chat: MarkedChat,
    contents: Sequence[tuple[int, int]],
    messages: Sequence[Mapping[str, Any]],
    frame: TurnFrame,
    special_tokens: Collection[str],
) -> list[tuple[int, int]]:
    """(start, end) of each of the assistant's turns that is learned, in characters of `chat.text`; without those that cannot be
    found.

    Args:
        contents: (start, end) of what the template wrote of their contents, in order; (end, end) where it left out the
            beginning.
    """
    own = [message for message in messages if message["role"] == "assistant"]
    if len(contents) != sum(bool(said(message)) for message in own):
        return []
    text = chat.text
    template, controls = _template_text(chat, special_tokens)
    spans: list[tuple[int, int]] = []
    left, at = iter(contents), 0
    for message in own:
        content = said(message)
        if content:
            start, end = next(left)
            bound = start
            if start == end:  # blanks of the header can look like the content's
                said_from = max((a for a in controls if a <= end), default=0)
                start -= _same_end(text[max(at, said_from) : end], content)
            header = template.rfind(frame.header, at, bound) if frame.header else -1
            if header >= 0:
                start = header + len(frame.header)
            elif not frame.header:
                start -= len(text[at:start]) - len(text[at:start].rstrip(" "))
        else:  # calls of tools alone
            header = template.find(frame.header, at) if frame.header else -1
            if header < 0:
                continue
            start = end = header + len(frame.header)
        stop = template.find(frame.end, end) if frame.end else -1
        at = stop + len(frame.end) if stop >= 0 else end
        if is_learned(message):
            spans.append((start, at))
    return spans


def _template_text(chat: MarkedChat, special_tokens: Collection[str]) -> tuple[str, list[int]]:
    """The text, with something else in the place of control tokens' names that a message holds; where control tokens end."""
    names = re.compile("|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True)) or "(?!)")
    text, ends = "", []
    for part, control in chat.split(special_tokens):
        text += part if control else names.sub(lambda match: HIDDEN * len(match[0]), part)
        if control:
            ends.append(len(text))
    return text, ends


def _same_end(text: str, content: str) -> int:
    """How many last characters of both are the same."""
    most = min(len(text), len(content))
    return next((n for n in range(most) if text[-1 - n] != content[-1 - n]), most)
