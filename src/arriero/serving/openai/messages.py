"""The conversation of a chat request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from arriero.serving.body import Closed, only
from arriero.serving.openai.fields import ShortText, Text
from arriero.serving.strict_json import parse_value

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOOLS = 128
MAX_CALLS = 128

FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]


class TextPart(Closed):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Said(Closed):
    """What a model has said before, perhaps on another server: fields that mean nothing here are left out."""

    model_config = ConfigDict(extra="ignore")


class SaidPart(Said):
    """A part of what a model has said; a refusal is its text too."""

    type: Literal["text", "refusal"]
    text: Text = ""
    refusal: Text = ""


def _text_only(*kinds: str) -> BeforeValidator:
    """Say clearly that pictures and the like are not taken; their addresses are never fetched."""

    def checked(content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in kinds:
                raise PydanticCustomError("text_only", "this model takes text only, no parts of other types")
        return content

    return BeforeValidator(checked)


Content = Annotated[Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)], _text_only("text")]
SaidContent = Annotated[
    Text | Annotated[list[SaidPart], Field(max_length=MAX_PARTS, fail_fast=True)], _text_only("text", "refusal")
]


class CalledFunction(Said):
    """A function with its arguments, as JSON text."""

    name: FunctionName
    arguments: Text


class ToolCall(Said):
    """A call that the assistant made."""

    id: ShortText
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(Closed):
    """What the operator says."""

    role: Literal["system", "developer"]
    content: Content
    name: ShortText | None = None


class UserMessage(Closed):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: ShortText | None = None


class AssistantMessage(Said):
    """What the model said. What would change its meaning is refused: audio, calls in the form before `tool_calls`.

    `reasoning_content` is for templates that know it; some servers call it `reasoning`.
    """

    role: Literal["assistant"]
    content: SaidContent | None = None
    name: ShortText | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Any = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    audio: Annotated[None, only(None, "this model takes text only: leave it out")] = None
    function_call: Annotated[None, only(None, "it is out of use: send tool_calls")] = None


class ToolMessage(Closed):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: ShortText
    name: ShortText | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class FunctionSpec(Closed):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


OnlyFunctions = Annotated[
    Literal["function"],
    only("function", "tools are functions here, that you call yourself: there are none of other types"),
]


class Tool(Closed):
    """A tool; there are no others than functions."""

    type: OnlyFunctions
    function: FunctionSpec


class NamedFunction(Closed):
    """A function's name."""

    name: FunctionName


class NamedTool(Closed):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Closed):
    """Which of the tools may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedChoice(Closed):
    """`tool_choice` that leaves some of the tools: the model hears of all, so that its prompt stays the same."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def unasked_result(turns: Iterable[tuple[Iterable[str], str | None]]) -> tuple[int, str] | None:
    """The first result of a tool that answers no earlier call: its place, and the call's id.

    Args:
        turns: of each the ids of the calls that it makes, and of the one that it answers.
    """
    called: set[str] = set()
    for place, (calls, answered) in enumerate(turns):
        called.update(calls)
        if answered is not None and answered not in called:
            return place, answered
    return None


def text_of(content: str | Sequence[TextPart | SaidPart] | None) -> str:
    """A message's content as one text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.refusal if part.type == "refusal" else part.text for part in content)


def for_template(message: SystemMessage | UserMessage | AssistantMessage | ToolMessage) -> dict[str, Any]:
    """A message as chat templates expect it: arguments of calls as objects."""
    given: dict[str, Any] = {"role": message.role, "content": text_of(message.content)}
    if message.role == "developer":
        given["role"] = "system"
    if message.name is not None:
        given["name"] = message.name
    if isinstance(message, ToolMessage):
        given["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        given["content"] = given["content"] or message.refusal or ""
        thought = message.reasoning if message.reasoning_content is None else message.reasoning_content
        if isinstance(thought, str):
            given["reasoning_content"] = thought
    if isinstance(message, AssistantMessage) and message.tool_calls:
        given["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return given


def _arguments(text: str) -> Any:
    """Of a call: an object, or the text that a model wrote which is none."""
    value = parse_value(text)
    return value if isinstance(value, dict) else text
