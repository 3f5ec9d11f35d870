"""The routes, and what stands before them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from arriero import __version__
from arriero.serving.access import Keys, RateLimit
from arriero.serving.api_errors import ApiError
from arriero.serving.body import components
from arriero.serving.doors import BODY_SECONDS, RATE_HEADERS, Doors
from arriero.serving.event_stream import ClientLeft
from arriero.serving.exchange import Exchange
from arriero.serving.json_response import error_response, json_response
from arriero.serving.metrics import CONTENT_TYPE
from arriero.serving.openai import answers
from arriero.serving.openai.adapters import LoadAdapterRequest, UnloadAdapterRequest, load_adapter, unload_adapter
from arriero.serving.openai.chat import chat_completions
from arriero.serving.openai.completions import completions
from arriero.serving.openai.embeddings import embeddings
from arriero.serving.openai.models import detokenize, list_models, show_model, tokenize
from arriero.serving.openai.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from arriero.serving.openai.response_request import ResponseRequest
from arriero.serving.openai.responses import responses
from arriero.serving.route import Route
from arriero.serving.seed_chat import SeedChatRequest, seed_chat
from arriero.serving.service import Service
from arriero.serving.tracing import Tracing

EVENTS, LINES = "text/event-stream", "application/x-ndjson"
SEED_ERRORS = (400, 404, 408, 413, 415, 429, 500, 503, 504)  # which have the seed's form


async def live(request: Request, service: Service) -> Response:
    """Whether the process works at all; if not, it should be started anew."""
    works = service.background.failure is None
    return json_response({"status": "ok" if works else "failed"}, 200 if works else 503)


async def ready(request: Request, service: Service) -> Response:
    """Whether requests are taken."""
    return json_response({"status": "ready" if service.ready else "draining"}, 200 if service.ready else 503)


async def version(request: Request, service: Service) -> Response:
    """Of this package."""
    return json_response({"version": __version__})


async def metrics(request: Request, service: Service) -> Response:
    """The numbers for Prometheus."""
    return Response(await service.workers.run(service.metrics.text), media_type=CONTENT_TYPE)


ROUTES = (
    Route(
        "/v1/chat/completions", chat_completions, "Answer a conversation.", ChatRequest, answers.ChatCompletion, EVENTS
    ),
    Route("/v1/completions", completions, "Go on with texts.", CompletionRequest, answers.Completion, EVENTS),
    Route("/v1/models", list_models, "The models of this server.", None, answers.ModelList),
    Route("/v1/models/{model:path}", show_model, "One of them.", None, answers.ModelCard),
    Route("/v1/responses", responses, "Answer a conversation.", ResponseRequest, answers.ResponseObject, EVENTS),
    Route("/v1/embeddings", embeddings, "Vectors of texts.", EmbeddingRequest, answers.EmbeddingList),
    Route("/api/chat", seed_chat, "The seed's chat.", SeedChatRequest, answers.SeedAnswer, LINES, statuses=SEED_ERRORS),
    Route("/tokenize", tokenize, "Token ids of a text.", TokenizeRequest, answers.TokenList),
    Route("/detokenize", detokenize, "The text of token ids.", DetokenizeRequest, answers.DetokenizedText),
    Route("/health/live", live, "Whether the process works.", None, answers.Health, statuses=(503,)),
    Route("/health/ready", ready, "Whether requests are taken.", None, answers.Health, statuses=(503,)),
    Route("/health", ready, "The same, under vLLM's name.", None, answers.Health, statuses=(503,)),
    Route("/ping", ready, "The same, under SageMaker's name.", None, answers.Health, statuses=(503,)),
    Route("/version", version, "The version of arriero.", None, answers.Version),
)
ADAPTER_ROUTES = (
    Route("/v1/load_lora_adapter", load_adapter, "Add an adapter.", LoadAdapterRequest, answers.ModelCard),
    Route("/v1/unload_lora_adapter", unload_adapter, "Remove it.", UnloadAdapterRequest, answers.DeletedModel),
)
METRICS = Route("/metrics", metrics, "Numbers for Prometheus.")


def make_app(
    service: Service,
    *,
    keys: Keys,
    requests_per_minute: int = 0,
    max_body_bytes: int = 2_000_000,
    hosts: Container[str] | None = None,
    cors_origins: Sequence[str] = (),
    max_connections: int | None = None,
    with_metrics: bool = True,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The server's application.

    Args:
        hosts, max_connections: see `Doors`.
        cors_origins: of web pages whose scripts may use it.
    """
    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="arriero", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    routes: list[Route] = [*ROUTES]
    if service.adapter_folder is not None:
        routes += ADAPTER_ROUTES
    if with_metrics:
        routes.append(METRICS)
    for route in routes:
        route.add_to(app, service)
    known = {route.path for route in routes} | {"/openapi.json"}

    def counted(path: str) -> str:
        if path in known:
            return path
        return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"

    description: dict[str, Any] = {}

    async def openapi(request: Request) -> Response:
        if not description:
            description.update(_description(app, routes))
        return json_response(description)

    app.add_api_route("/openapi.json", openapi, include_in_schema=False)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(ClientLeft, _left)
    app.add_middleware(
        Doors,
        keys=keys,
        rate=RateLimit(requests_per_minute),
        max_body_bytes=max_body_bytes,
        hosts=hosts,
        origins=cors_origins,
        body_seconds=min(BODY_SECONDS, service.limits.seconds),
        max_connections=max_connections,
    )
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # clients send headers of their own, such as x-stainless-*
            expose_headers=["x-request-id", "retry-after", *RATE_HEADERS],
        )
    app.add_middleware(Exchange, log=service.log, metrics=service.metrics, routes=counted, tracing=tracing)
    return app


async def _told(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return error_response(error)
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this address", 405: "this address does not take that method"}
    told = ApiError(error.status_code, words.get(error.status_code, "the request cannot be answered"))
    return error_response(told, error.headers)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads


def _description(app: FastAPI, routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI description, with the bodies that FastAPI does not know of."""
    described = get_openapi(title=app.title, version=app.version, routes=app.routes)
    bodies = [route.body for route in routes if route.body is not None]
    described.setdefault("components", {})["schemas"] = components([*bodies, *answers.schemas()])
    described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    described["security"] = [{"key": []}]
    return described
