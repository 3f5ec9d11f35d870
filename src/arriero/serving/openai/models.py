"""/v1/models, and the ways from text to tokens and back."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from arriero.errors import ArrieroError
from arriero.serving.api_errors import ApiError, api_error
from arriero.serving.body import read_body
from arriero.serving.json_response import json_response
from arriero.serving.openai.chat import chat_prompt
from arriero.serving.openai.messages import text_of
from arriero.serving.openai.requests import DetokenizeRequest, TokenizeRequest
from arriero.serving.service import ServedModel, Service

MAX_TOKENIZED = 2**20  # bytes of a text; one without blanks takes seconds


def card_of(service: Service, model: ServedModel) -> dict[str, Any]:
    """How /v1/models shows a model."""
    card: dict[str, Any] = {"id": model.name, "object": "model", "created": service.created, "owned_by": "arriero"}
    card["max_model_len"] = service.limits.context
    if model.adapter is not None:
        card["parent"] = service.base.name
    return card


async def list_models(request: Request, service: Service) -> Response:
    """The base model and its adapters."""
    return json_response({"object": "list", "data": [card_of(service, model) for model in service.models.values()]})


async def show_model(request: Request, service: Service) -> Response:
    """One of them; all where the address ends before a name."""
    if not request.path_params["model"]:
        return await list_models(request, service)
    return json_response(card_of(service, service.find(request.path_params["model"])))


async def tokenize(request: Request, service: Service) -> Response:
    """Token ids of a text or a conversation."""
    body = await read_body(request, TokenizeRequest, service.workers)
    service.find(body.model)
    ids = await service.work(request, _token_ids, service, body)
    return json_response({"count": len(ids), "max_model_len": service.limits.context, "tokens": ids})


def _token_ids(service: Service, body: TokenizeRequest) -> list[int]:
    said = [text_of(message.content) for message in body.messages or ()]
    size = sum(len(text.encode()) for text in (body.prompt or "", *said))
    if size > MAX_TOKENIZED:
        param = "messages" if body.prompt is None else "prompt"
        told = f"it has {size} bytes: at most {MAX_TOKENIZED} are taken at once"
        raise ApiError(400, f"Invalid '{param}': {told}", param=param, code="invalid_value")
    if body.prompt is None:
        return chat_prompt(service.tokenizer, body)[0]
    try:
        return service.tokenizer.encode(
            body.prompt, add_special_tokens=body.add_special_tokens, allow_special=body.parse_special
        )
    except ArrieroError as error:
        raise api_error(error) from error


async def detokenize(request: Request, service: Service) -> Response:
    """The text of token ids."""
    body = await read_body(request, DetokenizeRequest, service.workers)
    service.find(body.model)
    size = service.background.engine.runner.vocab_size
    strange = next((token for token in body.tokens if token >= size), None)
    if strange is not None:
        raise ApiError(400, f"token id {strange}: the model has ids 0 to {size - 1}", param="tokens")
    text = await service.work(
        request, service.tokenizer.decode, body.tokens, skip_special_tokens=body.skip_special_tokens
    )
    return json_response({"prompt": text})
