"""/v1/embeddings: what a text is to the model, as a vector of length 1."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from arriero.engine.engine import Engine
from arriero.serving.api_errors import ApiError
from arriero.serving.body import read_body
from arriero.serving.json_response import json_response
from arriero.serving.openai.completions import prompts_of
from arriero.serving.openai.requests import EmbeddingRequest
from arriero.serving.service import Service

if TYPE_CHECKING:
    from arriero.models.llama import LlamaForCausalLM

Pooling = Literal["mean", "last"]


def embed(model: LlamaForCausalLM, ids: Sequence[int], pooling: Pooling) -> list[float]:
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
        found: list[float] = torch.nn.functional.normalize(vector, dim=0).tolist()
    return found


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


async def embeddings(request: Request, service: Service) -> Response:
    """Vectors of texts. Each is computed between two steps of the engine, so that answers under way go on."""
    body = await read_body(request, EmbeddingRequest, service.workers)
    if service.find(body.model) is not service.base:
        raise ApiError(400, "embeddings are those of the base model: name it", param="model")
    engine = service.background.engine
    model = _model(engine)
    if body.dimensions is not None and body.dimensions != model.config.hidden_size:
        raise ApiError(400, f"embeddings have {model.config.hidden_size} dimensions", param="dimensions")
    prompts = await service.workers.run(prompts_of, service, body.input)
    longest = min(service.limits.src_length, engine.scheduler.max_step_tokens)
    for prompt in prompts:
        if len(prompt.ids) > longest:
            raise ApiError(
                400,
                f"a text has {len(prompt.ids)} tokens: at most {longest} are taken",
                param="input",
                code="context_length_exceeded",
            )
    place = service.admission.enter(len(prompts))
    pooling: Pooling = body.pooling or "mean"
    data: list[dict[str, Any]] = []
    try:
        for index, prompt in enumerate(prompts):
            ids = prompt.ids

            def compute(engine: Engine, ids: Sequence[int] = ids) -> list[float]:
                return embed(model, ids, pooling)

            vector = await service.workers.run_slow(service.background.call, compute)
            data.append({"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)})
    finally:
        place.leave()
    tokens = sum(len(prompt.ids) for prompt in prompts)
    service.metrics.prompt_tokens.labels(service.base.name).inc(tokens)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "model": service.base.name, "usage": usage})


def _encoded(vector: list[float], form: str | None) -> list[float] | str:
    if form == "base64":
        numbers = array.array("f", vector)
        if sys.byteorder == "big":
            numbers.byteswap()
        return base64.b64encode(numbers.tobytes()).decode()
    return vector
