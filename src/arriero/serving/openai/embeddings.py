"""/v1/embeddings: what a text is to the model, as a vector of length 1."""

from __future__ import annotations

import array
import asyncio
import base64
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from arriero.engine.engine import Engine
from arriero.engine.ticket import EngineClosedError
from arriero.errors import ArrieroError
from arriero.serving.api_errors import ApiError, shutting_down, timed_out
from arriero.serving.body import read_body
from arriero.serving.event_stream import ClientLeft, while_connected
from arriero.serving.json_response import dump
from arriero.serving.openai.requests import MAX_INPUT_TOKENS, EmbeddingRequest, Input
from arriero.serving.service import Service

if TYPE_CHECKING:
    from arriero.models.llama import LlamaForCausalLM

Pooling = Literal["mean", "last"]


def embed(model: LlamaForCausalLM, pooling: Pooling, ids: Sequence[int], _: Engine) -> array.array[float]:
    """The hidden states after the final norm, their mean or the last one, divided by its length.

    Args:
        ids: token ids of one text.

    Returns:
        hidden_size numbers.
    """
    import torch

    device = model.model.embed_tokens.weight.device
    with torch.inference_mode():
        hidden = model.hidden_states(torch.tensor([list(ids)], device=device))[0].float()
        vector = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
        return array.array("f", torch.nn.functional.normalize(vector, dim=0).tolist())


def _model(engine: Engine) -> LlamaForCausalLM:
    """
    Raises:
        ApiError: 400: a bundle, or a model that gives no hidden states of its own.
    """
    whole = None
    if engine.runner.library == "torch":
        from arriero.models.llama import LlamaForCausalLM

        model = getattr(engine.runner, "model", None)
        whole = model if isinstance(model, LlamaForCausalLM) else None
    if whole is None or engine.runner.prefix_length:
        raise ApiError(
            400, "this server gives no embeddings: they need a checkpoint in one process, without a learned prefix"
        )
    return whole


def _texts(service: Service, given: Input, longest: int) -> list[list[int]]:
    """The texts of a request as token ids. Not for the event loop.

    Args:
        longest: tokens of one of them.

    Raises:
        ApiError: 400: one is empty, too long or holds ids that the model does not have; too many tokens in all.
    """
    one = isinstance(given, str) or isinstance(given[0], int)
    items: Sequence[Any] = [given] if one else given
    tokenizer, size = service.tokenizer, service.background.engine.runner.vocab_size
    found: list[list[int]] = []
    for index, item in enumerate(items):
        name = "input" if one else f"input[{index}]"
        least = service.text_bound.tokens(item) if isinstance(item, str) else 0
        if least > longest:
            raise _too_long(name, f"at least {least}", longest)
        ids = tokenizer.encode(item, add_special_tokens=True) if isinstance(item, str) else list(item)
        if not ids:
            raise ApiError(400, f"{name} is empty: give at least one token", param="input")
        if max(ids) >= size:
            told = f"{name} holds token id {max(ids)}, and the model has ids 0 to {size - 1}"
            raise ApiError(400, told, param="input")
        if len(ids) > longest:
            raise _too_long(name, str(len(ids)), longest)
        found.append(ids)
    tokens = sum(map(len, found))
    if tokens > MAX_INPUT_TOKENS:
        told = f"input has {tokens} tokens in {len(found)} texts: at most {MAX_INPUT_TOKENS} are taken in one request"
        raise ApiError(400, told, param="input", code="too_many")
    return found


def _too_long(name: str, tokens: str, longest: int) -> ApiError:
    told = f"{name} has {tokens} tokens: at most {longest} are taken in one text"
    return ApiError(400, told, param="input", code="context_length_exceeded")


async def embeddings(request: Request, service: Service) -> Response:
    """Vectors of texts. Each text is a turn of the engine's, so that answers under way go on, and ends with its request."""
    body = await read_body(request, EmbeddingRequest, service.workers)
    if service.find(body.model) is not service.base:
        raise ApiError(400, "embeddings are those of the base model: name it", param="model")
    if service.background.failure is not None:
        raise shutting_down()
    engine = service.background.engine
    model = _model(engine)
    if body.dimensions is not None and body.dimensions != model.config.hidden_size:
        raise ApiError(400, f"embeddings have {model.config.hidden_size} dimensions", param="dimensions")
    longest = min(service.limits.src_length, engine.scheduler.max_step_tokens)
    texts = await service.work(request, _texts, service, body.input, longest)
    place = service.admission.enter_texts(len(texts))
    vectors: list[array.array[float]] = []
    try:
        if not await while_connected(
            request.receive, _compute(request, service, partial(embed, model, body.pooling or "mean"), texts, vectors)
        ):
            raise ClientLeft
        content = await service.workers.run(_content, service.base.name, vectors, texts, body.encoding_format)
    finally:
        place.leave()
        tokens = sum(map(len, texts[: len(vectors)]))
        service.metrics.prompt_tokens.labels(service.base.name).inc(tokens)
        request.state.facts.update(model=service.base.name, prompt_tokens=tokens)
    return Response(content, media_type="application/json")


async def _compute(
    request: Request,
    service: Service,
    embedding: Callable[[Sequence[int], Engine], array.array[float]],
    texts: Sequence[Sequence[int]],
    vectors: list[array.array[float]],
) -> bool:
    """Append the vectors, one after the other; True at the end.

    Raises:
        ApiError: 504 after the service's time; 503 where the server ends first; 500: a text could not be computed.
    """
    seconds = service.limits.seconds
    try:
        async with asyncio.timeout(max(0.0, seconds - (time.perf_counter() - request.state.began))):
            for ids in texts:
                turn = service.background.take_turn(partial(embedding, ids))
                vectors.append(await asyncio.wrap_future(turn))
    except TimeoutError as error:
        raise timed_out(seconds) from error
    except EngineClosedError as error:
        raise shutting_down() from error
    except ArrieroError as error:
        raise service.told(error, request) from error
    return True


def _content(
    model: str, vectors: Sequence[array.array[float]], texts: Sequence[Sequence[int]], form: str | None
) -> bytes:
    """The answer as JSON. Vector by vector: the interpreter's lock is held as long as one call of `json` takes."""
    tokens = sum(map(len, texts))
    data = [
        dump({"object": "embedding", "index": index, "embedding": _encoded(vector, form)})
        for index, vector in enumerate(vectors)
    ]
    rest = dump({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return b'{"object":"list","data":[' + b",".join(data) + b"]," + rest[1:]


def _encoded(numbers: array.array[float], form: str | None) -> list[float] | str:
    if form != "base64":
        return numbers.tolist()
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
