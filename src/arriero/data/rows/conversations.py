"""Conversations: OpenAI's `messages` with tool calls, and ShareGPT's `conversations`.

Both become turns {"role", "content", ...} of the roles that chat templates know. The last assistant turn is the answer.
Assistant turns of `weight` 0 (OpenAI) or `train` false (axolotl) are marked `UNLEARNED`. A `system` beside the turns goes
before them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from arriero.data.assistant_turns import UNLEARNED, unmarked
from arriero.data.rows.values import Row, given_keys, kind_of, optional_text
from arriero.data.samples import Message, Sample
from arriero.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys of a turn that templates read
TURN_KEYS = ("name", "tool_call_id", "reasoning_content")
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}


def messages_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`messages`, with `system` and `tools` beside it where given."""
    turns = with_system(turns_of(row["messages"], "messages", where), row, where)
    return conversation(turns, row.get("tools"), where, needs_target)


def sharegpt_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`conversations` of {"from", "value"} (or `role` and `content`), with `system` and `tools` beside it where given."""
    items = row["conversations"]
    if not isinstance(items, list) or not items:
        raise DataError(f"{where}: 'conversations' must be a list of turns")
    turns = with_system(any_turns(items, "conversations", where), row, where)
    return conversation(turns, row.get("tools"), where, needs_target)


def with_system(turns: list[Message], row: Row, where: str) -> list[Message]:
    """Turns, after the row's `system` where it has one and they do not begin with it.

    Raises:
        DataError: both say something, and not the same.
    """
    system = optional_text(row, "system", where)
    own = [turn["content"].strip() for turn in turns if turn["role"] == "system"]
    if own and system.strip() and system.strip() != own[0]:
        raise DataError(f"{where}: 'system' and the system turn differ: leave one of them out")
    return turns if own or not system.strip() else [{"role": "system", "content": system}, *turns]


def any_turns(items: list[Any], key: str, where: str) -> list[Message]:
    """Checked turns of a list in OpenAI's or ShareGPT's form, as the first of them is.

    Raises:
        DataError: naming the turn.
    """
    if not items or not isinstance(items[0], dict) or not {"from", "value"} & given_keys(items[0]):
        return turns_of(items, key, where)
    turns: list[Message] = []
    for i, item in enumerate(items):
        place = f"{where}: {key}[{i}]"
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("from"), str)
            or not isinstance(item.get("value"), str)
        ):
            raise DataError(f"{place} needs the strings 'from' and 'value'")
        role = SHAREGPT_ROLES.get(item["from"])
        if role is None:
            raise DataError(f"{place}: unknown role {item['from']!r}: one of {', '.join(SHAREGPT_ROLES)}")
        if item["from"] == "function_call":
            calls = _parsed(item["value"], f"{place}: 'value' of a function_call")
            calls = calls if isinstance(calls, list) else [calls]
            turns.append({"role": role, "content": "", "tool_calls": _tool_calls(calls, place)})
        else:
            turns.append({"role": role, "content": item["value"]})
        if role == "assistant":
            turns[-1] = {**turns[-1], **_mark(item, place)}
    return turns


def turns_of(messages: Any, key: str, where: str) -> list[Message]:
    """Checked turns of a list in OpenAI's form.

    Raises:
        DataError: naming the turn.
    """
    if not isinstance(messages, list) or (key == "messages" and not messages):
        raise DataError(f"{where}: '{key}' must be a list of turns")
    return [_turn(message, f"{where}: {key}[{i}]") for i, message in enumerate(messages)]


def _turn(message: Any, place: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{place} needs the strings 'role' and 'content'")
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{place}: unknown role {role!r}: one of {', '.join(ROLES)}")
    calls = message.get("tool_calls") or []
    if calls and role != "assistant":
        raise DataError(f"{place}: only the assistant makes 'tool_calls'")
    content = _content(message.get("content"), place)
    if content is None and not calls:
        raise DataError(f"{place} needs the strings 'role' and 'content'")
    extra = {name: message[name] for name in TURN_KEYS if isinstance(message.get(name), str)}
    if calls:
        extra["tool_calls"] = _tool_calls(calls, place)
    if role == "assistant":
        extra |= _mark(message, place)
    # OpenAI's newer name for the same, which few templates know; the server does so too
    return {"role": "system" if role == "developer" else role, "content": content or "", **extra}


def _mark(turn: Row, place: str) -> Message:
    """`UNLEARNED`, if the assistant's turn says so: `weight` 0, or `train` false."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{place}: 'weight' must be 0 (the turn is not learned) or 1, found {weight!r:.40}")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{place}: 'train' must be true or false, found {train!r:.40}")
    return UNLEARNED if weight == 0 or train is False else {}


def _content(content: Any, place: str) -> str | None:
    """A turn's text; OpenAI's parts of type `text` are put together."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise DataError(f"{place}: 'content' must be a string or parts of type text: the model reads text only")


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls as templates want them: the arguments an object, which OpenAI's files hold as JSON text."""
    if not isinstance(calls, list):
        raise DataError(f"{place}: 'tool_calls' must be a list")
    made = []
    for i, call in enumerate(calls):
        there = f"{place}.tool_calls[{i}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{there} needs a function with a string 'name'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{there}: 'arguments'")
        if not isinstance(arguments, dict):
            raise DataError(f"{there}: 'arguments' must be a JSON object, found {kind_of(arguments)}")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return made


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not JSON ({error})") from error


def _tools(tools: Any, where: str) -> tuple[Message, ...]:
    """The functions that may be called; ShareGPT's files hold them as JSON text."""
    if isinstance(tools, str):
        tools = _parsed(tools, f"{where}: 'tools'") if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' must be a list of objects, each the schema of a function")
    return tuple(tools)


def conversation(turns: Sequence[Message], tools: Any, where: str, needs_target: bool) -> Sample:
    """Turns as a sample whose answer is the last assistant turn. Where no answer is needed, no turn is marked `UNLEARNED`.

    Raises:
        DataError: there is no answer where one is needed, or nothing that asks for it.
    """
    turns = list(turns) if needs_target else [unmarked(turn) for turn in turns]
    answer = turns.pop() if turns and turns[-1]["role"] == "assistant" else None
    if answer is None and needs_target:
        raise DataError(f"{where}: the last turn must be the assistant's, it is what is learned")
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise DataError(f"{where}: a 'user' turn is expected before the answer")
    asked = turns.pop()
    return Sample(
        "",
        asked["content"],
        "",
        None if answer is None else answer["content"],
        chat=True,
        history=tuple(turns),
        turn={name: value for name, value in asked.items() if name != "content"},
        answer=answer if answer is not None and len(answer) > 2 else None,
        tools=_tools(tools, where),
    )
