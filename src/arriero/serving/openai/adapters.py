"""Adapters that come and go while the server runs, as with vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from arriero.errors import ArrieroError, GenerationError
from arriero.serving.api_errors import ApiError, api_error
from arriero.serving.body import Closed, read_body
from arriero.serving.json_response import json_response
from arriero.serving.openai.fields import ModelName
from arriero.serving.openai.models import card_of
from arriero.serving.service import ServedModel, Service

MAX_ADAPTERS = 1000  # names at once, those of --adapters included


class LoadAdapterRequest(Closed):
    """Body of /v1/load_lora_adapter.

    Attributes:
        lora_path: in the server's --adapter_folder.
        load_inplace: take the place of the adapter that has this name.
    """

    lora_name: ModelName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapterRequest(Closed):
    """Body of /v1/unload_lora_adapter. `lora_int_id` is taken and has no effect."""

    lora_name: ModelName
    lora_int_id: int | None = None


async def load_adapter(request: Request, service: Service) -> Response:
    """Let requests name an adapter; running ones go on meanwhile. The answer is its card."""
    body = await read_body(request, LoadAdapterRequest, service.workers)
    name, root = body.lora_name, service.adapter_folder
    assert root is not None  # else there is no such route
    folder = _inside(root, body.lora_path)
    async with service.changing_models:
        if name in service.models and service.models[name].stays:
            raise ApiError(400, f"'{name}' is a name of the server's own: choose another", param="lora_name")
        if name in service.models and not body.load_inplace:
            raise ApiError(
                400,
                f"the adapter '{name}' is loaded already: load_inplace true puts another in its place",
                param="lora_name",
            )
        if name not in service.models and len(service.models) > MAX_ADAPTERS:
            raise ApiError(400, f"there are {MAX_ADAPTERS} adapters, the most there may be: unload one first")
        try:
            await service.workers.run_slow(service.background.load_adapter, name, folder)
        except ArrieroError as error:
            if service.background.failure is not None or not service.ready:
                raise api_error(error) from error
            # where the folder lies is none of the client's business
            text = " ".join(str(error).split()).replace(f"{root}/", "")
            param = "lora_name" if isinstance(error, GenerationError) else "lora_path"
            raise ApiError(400, text, param=param) from error
        service.models[name] = ServedModel(name, name, stays=False)
    service.log("adapter_loaded", adapter=name, folder=str(folder), request_id=request.state.request_id)
    return json_response(card_of(service, service.models[name]))


async def unload_adapter(request: Request, service: Service) -> Response:
    """Let no new request name an adapter; those that have begun end with it."""
    body = await read_body(request, UnloadAdapterRequest, service.workers)
    name = body.lora_name
    async with service.changing_models:
        model = service.find(name, "lora_name")
        if model.adapter is None or model.stays:
            raise ApiError(400, f"'{name}' is a name of the server's own, which stays", param="lora_name")
        del service.models[name]
        service.metrics.forget(name)
        try:
            await service.workers.run_slow(service.background.unload_adapter, model.adapter)
        except ArrieroError as error:
            raise api_error(error) from error
    service.log("adapter_unloaded", adapter=name, request_id=request.state.request_id)
    return json_response({"id": name, "object": "model", "deleted": True})


def _inside(root: Path, given: str) -> Path:
    """The folder that is meant.

    Raises:
        ApiError: 400: it is not one in `root`; whether it is elsewhere is not told.
    """
    try:
        folder = (root / given).resolve()
        if root in folder.parents and folder.is_dir():
            return folder
    except (OSError, ValueError, RuntimeError):  # a name that no file can have; links in a circle
        pass
    raise ApiError(
        400, "there is no such folder in the server's --adapter_folder: give its path in there", param="lora_path"
    )
