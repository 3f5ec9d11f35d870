"""The body of /v1/responses, and the chat request that it amounts to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from arriero.serving.body import Closed, disagreement, only, validated
from arriero.serving.openai.fields import (
    MAX_TOP_LOGPROBS,
    Count,
    IgnoredFields,
    JsonObjectFormat,
    ModelName,
    ShortText,
    StreamOptions,
    Text,
    TextFormat,
    check_stream_options,
)
from arriero.serving.openai.messages import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    FunctionName,
    OnlyFunctions,
    unasked_result,
)
from arriero.serving.openai.requests import ChatRequest


class InputPart(Closed):
    """A part of a message; of the model's own earlier answers `output_text`, whose other fields mean nothing here."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalPart(Closed):
    """A part in which a model refused to answer."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """What it said."""
        return self.refusal


def _text_only(content: Any) -> Any:
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("input_text", "output_text", "text", "refusal"):
            raise PydanticCustomError("text_only", "this model takes text only, no parts of other types")
    return content


InputContent = Annotated[
    Text | Annotated[list[InputPart | RefusalPart], Field(max_length=MAX_PARTS, fail_fast=True)],
    BeforeValidator(_text_only),
]
# Of these only the first says something of answers that there are here.
LOGPROBS = "message.output_text.logprobs"
Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class InputMessage(Closed):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent
    id: ShortText | None = None
    status: ShortText | None = None


class InputCall(Closed):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: ShortText
    name: FunctionName
    arguments: Text
    id: ShortText | None = None
    status: ShortText | None = None


class InputCallOutput(Closed):
    """What a function answered."""

    type: Literal["function_call_output"]
    call_id: ShortText
    output: InputContent
    id: ShortText | None = None
    status: ShortText | None = None


class ThoughtPart(Closed):
    """A part of what a model thought."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


class InputThought(Closed):
    """What the model thought before it answered; a thought that only its maker can read says nothing here."""

    type: Literal["reasoning"]
    summary: Annotated[list[ThoughtPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    content: Annotated[list[ThoughtPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    encrypted_content: Text | None = None
    id: ShortText | None = None
    status: ShortText | None = None

    @property
    def text(self) -> str:
        """It, or what sums it up."""
        return "".join(part.text for part in self.content or self.summary or ())


class ResponseSchemaFormat(Closed):
    """JSON of a given form; flatter than in chat requests."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextSettings(Closed):
    """The form of the answer."""

    format: Annotated[TextFormat | JsonObjectFormat | ResponseSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: ShortText | None = None


class ReasoningSettings(Closed):
    """How much is thought, which here the model's template says; no effect."""

    effort: ShortText | None = None
    summary: ShortText | None = None
    generate_summary: ShortText | None = None


class ResponseTool(Closed):
    """A function that the model may call; flatter than in chat requests."""

    type: OnlyFunctions
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Closed):
    """The function that must be called."""

    type: Literal["function"]
    name: FunctionName


class ChosenFunctions(Closed):
    """Which of the functions may be called, and whether one must be; flatter than in chat requests."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


_KEPT = "nothing is kept here between requests: send the whole conversation as input"
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _known(item: Any) -> Any:
    """Say clearly which items are not taken."""
    kind = _item_type(item) if isinstance(item, dict) else _ITEMS[0]
    if kind == "item_reference":
        raise disagreement("type", _KEPT)
    if kind not in _ITEMS:
        raise disagreement("type", f"it must be {', '.join(map(repr, _ITEMS))}: others are not supported here")
    return item


def _item_type(item: Any) -> Any:
    """A message need not say that it is one."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return _ITEMS[0] if kind is None else kind


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputThought, Tag("reasoning")],
    Discriminator(_item_type),
    BeforeValidator(_known),
]


class ResponseRequest(IgnoredFields):
    """Body of /v1/responses. Nothing is kept, so `previous_response_id`, `conversation` and `background` are refused."""

    model: ModelName | None = None
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | ChosenFunctions | None = None
    parallel_tool_calls: bool | None = None
    truncation: Annotated[
        Literal["disabled"] | None, only("disabled", "no conversation is cut here: send a shorter one")
    ] = None
    include: Annotated[list[Included], Field(max_length=16, fail_fast=True)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    previous_response_id: Annotated[None, only(None, _KEPT)] = None
    conversation: Annotated[None, only(None, _KEPT)] = None
    background: Annotated[
        Literal[False] | None, only(False, "nothing is kept here between requests: wait for the answer, or stream it")
    ] = None

    @model_validator(mode="after")
    def _agree(self) -> ResponseRequest:
        check_stream_options(self.stream, self.stream_options)
        if self.top_logprobs and not self.tells_logprobs:
            raise disagreement("top_logprobs", f'top_logprobs needs include: ["{LOGPROBS}"]')
        strange = unasked_result(
            (
                [item.call_id] if isinstance(item, InputCall) else [],
                item.call_id if isinstance(item, InputCallOutput) else None,
            )
            for item in ([] if isinstance(self.input, str) else self.input)
        )
        if strange is not None:
            place, call = strange
            raise disagreement("input", f"{call[:100]!r} is no function_call before it", place, "call_id")
        return self

    @property
    def tells_logprobs(self) -> bool:
        """Whether the answer's log-probabilities are wanted."""
        return LOGPROBS in (self.include or ())

    def as_chat(self) -> ChatRequest:
        """The same as a chat request.

        Raises:
            ApiError: what cannot be, such as two tools of one name.
        """
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "parallel_tool_calls": self.parallel_tool_calls,
            "logprobs": self.tells_logprobs,
            "top_logprobs": self.top_logprobs,
        }
        form = self.text.format if self.text is not None else None
        if isinstance(form, ResponseSchemaFormat):
            schema = {"name": form.name, "schema": form.schema_, "strict": form.strict}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form is not None:
            fields["response_format"] = {"type": form.type}
        if self.tools is not None:
            fields["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in self.tools
            ]
        choice = self.tool_choice
        if isinstance(choice, ChosenFunction):
            fields["tool_choice"] = _named(choice)
        elif isinstance(choice, ChosenFunctions):
            allowed = {"mode": choice.mode, "tools": [_named(one) for one in choice.tools]}
            fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
        else:
            fields["tool_choice"] = choice
        return validated(fields, ChatRequest)

    def _messages(self) -> list[dict[str, Any]]:
        """The turns: an answer's text, its calls and what was thought before each are one."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        thought = ""
        for item in self.input:
            if isinstance(item, InputThought):
                thought = item.text
                continue
            if isinstance(item, InputMessage):
                messages.append({"role": item.role, "content": _joined(item.content)})
            elif isinstance(item, InputCallOutput):
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
            else:
                call = {
                    "id": item.call_id,
                    "type": "function",
                    "function": {"name": item.name, "arguments": item.arguments},
                }
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                messages[-1].setdefault("tool_calls", []).append(call)
            if thought and messages[-1]["role"] == "assistant":
                earlier = messages[-1].get("reasoning_content")
                messages[-1]["reasoning_content"] = f"{earlier}\n{thought}" if earlier else thought
            thought = ""
        return messages


def _named(function: ChosenFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": function.name}}


def _joined(content: str | Sequence[InputPart | RefusalPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
