"""The forms of answers, for the OpenAPI description; tests hold the answers against them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """An answer or a part of one: no other keys."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetails(Answer):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """Any error."""

    error: ErrorDetails


class PromptTokensDetails(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int
    audio_tokens: int


class CompletionTokensDetails(Answer):
    """Of the answer's tokens."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Answer):
    """How many tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(Answer):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Of an answer's tokens."""

    content: list[ContentLogprob]
    refusal: None


class FunctionCall(Answer):
    """A function with its arguments, as JSON text."""

    name: str
    arguments: str


class MessageToolCall(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Answer):
    """What the model says. `tool_calls` is there only if there are calls, `reasoning_content` only if it thought."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[MessageToolCall] = []


class ChatChoice(Answer):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Answer):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Answer):
    """Of a text's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    """One of the texts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Answer):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(Answer):
    """A model; an adapter names its base as `parent`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: str = ""


class DeletedModel(Answer):
    """Answer of /v1/unload_lora_adapter."""

    id: str
    object: Literal["model"]
    deleted: bool


class ModelList(Answer):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenList(Answer):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizedText(Answer):
    """Answer of /detokenize."""

    prompt: str


class Health(Answer):
    """Answer of /health and what is below it, and of /ping."""

    status: Literal["ok", "failed", "ready", "draining"]


class Version(Answer):
    """Answer of /version."""

    version: str


class Embedding(Answer):
    """A vector; as base64 its little-endian single-precision numbers."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """How many tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer):
    """Answer of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class SeedUtterance(Answer):
    """What the model says, in the seed's words."""

    role: Literal["bot"]
    utterance: str


class SeedResult(Answer):
    """Around it."""

    response: SeedUtterance


class SeedAnswer(Answer):
    """Answer of /api/chat; of an error `result` is null and `error_code` 1 (too long) or 1000."""

    error_code: int
    error_msg: str
    result: SeedResult | None


class ResponseObject(BaseModel):
    """Answer of /v1/responses; it repeats the request's settings."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


def schemas() -> list[type[BaseModel]]:
    """All of them that routes name."""
    found: list[Any] = [
        ErrorAnswer,
        ChatCompletion,
        Completion,
        ModelCard,
        DeletedModel,
        ModelList,
        TokenList,
        DetokenizedText,
        Health,
        Version,
        EmbeddingList,
        SeedAnswer,
        ResponseObject,
    ]
    return found
