"""The bodies of requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from arriero.engine.sampling_params import MAX_ANSWERS, MAX_INTEGER
from arriero.serving.body import Closed, disagreement, only
from arriero.serving.openai.fields import (
    MAX_TEXT,
    MAX_TOP_LOGPROBS,
    Count,
    ModelName,
    ResponseFormat,
    SamplingFields,
    ShortText,
    Text,
    TokenId,
)
from arriero.serving.openai.messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    AllowedChoice,
    AssistantMessage,
    Content,
    Message,
    NamedTool,
    Tool,
    ToolMessage,
    unasked_result,
)
from arriero.serving.openai.template_fields import TemplateFields

MAX_PROMPTS = 256
MAX_PROMPT_TOKENS = 2**20


class Prediction(Closed):
    """What the answer may be like; it would make it quicker, and has no effect here."""

    type: Literal["content"]
    content: Content


class ToolFields(TemplateFields):
    """What a request says of tools."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None = None

    @model_validator(mode="after")
    def _tools_agree(self) -> ToolFields:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise disagreement("tools", "two tools have the same name")
        if not set(self.allowed or ()) <= set(names):
            raise disagreement("tool_choice", "tool_choice names a function that is not among the tools")
        if self.tool_choice == "required" and not names:
            raise disagreement("tool_choice", "tool_choice is 'required' and there are no tools")
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model hears of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def allowed(self) -> list[str] | None:
        """The functions that `tool_choice` names; None: it leaves all of them."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedChoice):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return None

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        allowed = self.allowed
        return [tool for tool in self.offered if allowed is None or tool.function.name in allowed]

    @property
    def must_call(self) -> bool:
        """Whether it has to call one."""
        if isinstance(self.tool_choice, AllowedChoice):
            return self.tool_choice.allowed_tools.mode == "required"
        return isinstance(self.tool_choice, NamedTool) or self.tool_choice == "required"


class ChatRequest(ToolFields, SamplingFields):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    reasoning_effort: ShortText | None = None
    include_reasoning: bool | None = None
    prediction: Prediction | None = None
    echo: Annotated[Literal[False] | None, only(False, "the prompt is not repeated in a conversation")] = None
    add_special_tokens: Annotated[
        Literal[False] | None, only(False, "the chat template alone adds special tokens: leave it out")
    ] = None
    verbosity: ShortText | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        strange = unasked_result(
            (
                [call.id for call in turn.tool_calls or ()] if isinstance(turn, AssistantMessage) else [],
                turn.tool_call_id if isinstance(turn, ToolMessage) else None,
            )
            for turn in self.messages
        )
        if strange is not None:
            place, call = strange
            message = f"{call[:100]!r} is no call of an assistant's turn before it"
            raise disagreement("messages", message, place, "tool_call_id")
        if self.top_logprobs and not self.logprobs:
            raise disagreement("top_logprobs", "top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise disagreement("max_tokens", "give max_tokens or max_completion_tokens, not both")
        if self.form_field is not None and (self.offered or getattr(self.response_format, "type", "text") != "text"):
            other = "tools" if self.offered else "response_format"
            raise disagreement(self.form_field, f"give {self.form_field} or {other}, not both")
        return self

    @property
    def asks_by(self) -> str:
        """The field that asks for a form of the answer, if one does."""
        return "tools" if self.offered else self.form_field or "response_format"

    @property
    def longest(self) -> int | None:
        """Tokens of an answer."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
Prompt = (
    Text
    | Tokens
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)


class CompletionRequest(SamplingFields):
    """Body of /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: Annotated[None, only(None, "texts go on at their end only: leave it out")] = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.answers:
            raise disagreement("best_of", "best_of is less than n")
        if self.stream and self.best_of is not None and self.best_of > self.answers:
            raise disagreement("best_of", "answers of which the best are chosen cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise disagreement("max_tokens", "max_tokens is 0, which needs echo: true")
        return self


class TokenizeRequest(ToolFields):
    """Body of /tokenize: a text, or a conversation, which becomes what /v1/chat/completions makes of it."""

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool = True
    parse_special: bool = False

    @model_validator(mode="after")
    def _agree(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise disagreement("prompt", "give prompt or messages, one of them")
        return self


class DetokenizeRequest(Closed):
    """Body of /detokenize."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
    skip_special_tokens: bool = False


MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000  # of all texts together; both as in OpenAI's API
Input = (
    Text
    | Tokens
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
)


def input_fault(value: Any) -> str | None:
    """What is wrong with the texts of a request for vectors; None: nothing. A union's members would each say its own."""
    kinds = "a text, token ids, or a list of texts or of lists of token ids"
    if isinstance(value, str):
        return f"it has {len(value)} characters: at most {MAX_TEXT} are taken" if len(value) > MAX_TEXT else None
    if not isinstance(value, list):
        return f"it must be {kinds}"
    if not value:
        return f"it is empty: give {kinds}"
    kind = type(value[0])
    if kind is int:
        return _ids_fault("input", value)
    if kind not in (str, list):
        return f"input[0] is of another kind: give {kinds}"
    if len(value) > MAX_INPUTS:
        return f"it has {len(value)} texts: at most {MAX_INPUTS} are taken"
    for index, item in enumerate(value):
        name = f"input[{index}]"
        if type(item) is not kind:
            return f"{name} is of another kind than input[0]: give {kinds}"
        fault = None
        if isinstance(item, list):
            fault = _ids_fault(name, item)
        elif len(item) > MAX_TEXT:
            fault = f"{name} has {len(item)} characters: at most {MAX_TEXT} are taken"
        if fault is not None:
            return fault
    return None


def _ids_fault(name: str, ids: list[Any]) -> str | None:
    if not ids:
        return f"{name} is empty: give at least one token"
    if len(ids) > MAX_INPUT_TOKENS:
        return f"{name} has {len(ids)} tokens: at most {MAX_INPUT_TOKENS} are taken in one request"
    wrong = next((place for place, one in enumerate(ids) if type(one) is not int or not 0 <= one <= MAX_INTEGER), None)
    return None if wrong is None else f"{name}[{wrong}] is no token id, which are whole numbers from 0"


class EmbeddingRequest(Closed):
    """Body of /v1/embeddings. `pooling` is no field of OpenAI's: mean of the tokens, or the last one."""

    model: ModelName | None = None
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: ShortText | None = None
    pooling: Literal["mean", "last"] | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _has_texts(cls, value: Any) -> Any:
        fault = input_fault(value)
        if fault is not None:
            raise PydanticCustomError("input", "{fault}", {"fault": fault})
        return value
