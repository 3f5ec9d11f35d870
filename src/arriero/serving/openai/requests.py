"""The bodies of requests."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from arriero.engine.sampling_params import MAX_ANSWERS
from arriero.serving.body import Closed
from arriero.serving.openai.fields import (
    MAX_TOP_LOGPROBS,
    Count,
    ModelName,
    ResponseFormat,
    SamplingFields,
    ShortText,
    Text,
    TokenId,
)
from arriero.serving.openai.messages import MAX_MESSAGES, MAX_TOOLS, Message, NamedTool, Tool

MAX_PROMPTS = 256
MAX_PROMPT_TOKENS = 2**20


class ChatRequest(SamplingFields):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    reasoning_effort: ShortText | None = None
    verbosity: ShortText | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "two tools have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise PydanticCustomError("tool_choice", "tool_choice names a function that is not among the tools")
        if self.tool_choice == "required" and not names:
            raise PydanticCustomError("tool_choice", "tool_choice is 'required' and there are no tools")
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError("max_tokens", "give max_tokens or max_completion_tokens, not both")
        return self

    @property
    def longest(self) -> int | None:
        """Tokens of an answer."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else list(self.tools or ())


Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
Prompt = (
    Text
    | Tokens
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class CompletionRequest(SamplingFields):
    """Body of /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.answers:
            raise PydanticCustomError("best_of", "best_of is less than n")
        if self.stream and self.best_of is not None and self.best_of > self.answers:
            raise PydanticCustomError("best_of", "answers of which the best are chosen cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "max_tokens is 0, which needs echo: true")
        return self


class TokenizeRequest(Closed):
    """Body of /tokenize: a text, or a conversation."""

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _agree(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give prompt or messages, one of them")
        return self


class DetokenizeRequest(Closed):
    """Body of /detokenize."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]
    skip_special_tokens: bool = False


class EmbeddingRequest(Closed):
    """Body of /v1/embeddings. `pooling` is no field of OpenAI's: mean of the tokens, or the last one."""

    model: ModelName | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: ShortText | None = None
    pooling: Literal["mean", "last"] | None = None
