"""A model that stays in memory, under the names that clients know, and the way of a request through it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ParamSpec, TypeVar

from starlette.requests import Request

from arriero.data.tokenizer import Tokenizer
from arriero.engine.background import BackgroundEngine
from arriero.engine.grammar import StructureBusyError
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.structure import Structure, UnkeptSchemaError
from arriero.errors import ArrieroError, GenerationError
from arriero.serving.admission import Admission
from arriero.serving.api_errors import ApiError, api_error, shutting_down
from arriero.serving.event_stream import ClientLeft, while_connected
from arriero.serving.job import Job
from arriero.serving.metrics import Metrics
from arriero.serving.request_log import JsonLog
from arriero.serving.text_bound import TextBound
from arriero.serving.workers import Workers

LONG_BODY = 64 * 1024  # bytes; a shorter one's texts take little time

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ServedModel:
    """A name that clients can ask for.

    Attributes:
        adapter: what the engine calls it; None: the model itself.
        stays: it was there from the start, and no request removes it or puts another in its place.
    """

    name: str
    adapter: str | None = None
    stays: bool = True


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        context: tokens of prompt and answer together.
        src_length: tokens of a prompt.
        max_new_tokens: tokens of an answer.
        seconds: after which it is given up.
    """

    context: int
    src_length: int
    max_new_tokens: int
    seconds: float

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return min(self.src_length, self.context - 1)


class Service:
    """What all routes share. Lives on one event loop; the engine has a thread of its own.

    Attributes:
        created: when it was made, seconds since 1970.
    """

    def __init__(
        self,
        background: BackgroundEngine,
        models: Sequence[ServedModel],
        limits: Limits,
        admission: Admission,
        *,
        log: JsonLog,
        log_prompts: bool = False,
        reasoning: bool = True,
        adapter_folder: Path | None = None,
    ) -> None:
        """
        Args:
            models: the first is the base.
            log_prompts: write prompts and answers into the log.
            reasoning: tell what a model thinks before its answer apart from the answer.
            adapter_folder: a whole path; clients may load adapters from in there.
        """
        self.background, self.limits, self.admission = background, limits, admission
        self.models = {model.name: model for model in models}
        self.base = models[0]
        self.log, self.log_prompts, self.reasoning = log, log_prompts, reasoning
        self.adapter_folder, self.changing_models = adapter_folder, asyncio.Lock()
        self.metrics = Metrics(background.engine)
        self.workers = Workers()
        self.created = int(time.time())

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.background.engine.tokenizer

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.background.failure is None and not self.admission.draining

    def find(self, name: str | None, param: str = "model") -> ServedModel:
        """The model of a request; without a name, the base.

        Args:
            param: the field that says so.

        Raises:
            ApiError: 404.
        """
        if name is None:
            return self.base
        model = self.models.get(name)
        if model is None:
            raise ApiError(
                404,
                f"The model '{name[:100]}' does not exist here: GET /v1/models lists those that do",
                param=param,
                code="model_not_found",
            )
        return model

    def room(self, prompt: int, wanted: int | None, param: str = "max_tokens", source: str = "prompt") -> int:
        """How long the answer to a prompt of so many tokens may get.

        Args:
            wanted: by the request; None: as long as it may.
            param, source: the fields that say so, and what the prompt is made of.

        Raises:
            ApiError: 400: the prompt is too long, or more is wanted than there is room for.
        """
        limits = self.limits
        if prompt > limits.longest_prompt:
            raise self._too_long(str(prompt), source)
        left = min(limits.max_new_tokens, limits.context - prompt)
        if wanted is not None and wanted > left:
            raise ApiError(
                400,
                f"'{param}' is {wanted}: with a prompt of {prompt} tokens at most {left} are possible here (context "
                f"{limits.context})",
                param=param,
                code="context_length_exceeded",
            )
        return left if wanted is None else wanted

    def check_length(self, least: int, source: str = "prompt") -> None:
        """
        Args:
            least: tokens that a prompt has at least, before it is tokenized: see `TextBound`.

        Raises:
            ApiError: 400: it is too long in any case.
        """
        if least > self.limits.longest_prompt:
            raise self._too_long(f"at least {least}", source)

    def _too_long(self, tokens: str, source: str) -> ApiError:
        longest = self.limits.longest_prompt
        return ApiError(
            400,
            f"This model's longest prompt is {longest} tokens here, and yours has {tokens}: shorten it",
            param=source,
            code="context_length_exceeded",
        )

    @cached_property
    def text_bound(self) -> TextBound:
        """How many tokens a text has at least."""
        return TextBound.of(self.tokenizer)

    async def work(self, request: Request, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what works on the texts of a request whose body has been read, off the event loop. Long ones wait for each
        other, and not for longer than their client.

        Raises:
            ClientLeft: it is gone.
        """
        if request.state.body_bytes <= LONG_BODY:
            return await self.workers.run(function, *args, **kwargs)
        found = await while_connected(request.receive, self.workers.run_long(function, *args, **kwargs))
        if found is None:
            raise ClientLeft
        return found

    async def start(
        self,
        request: Request,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        form: str | None = None,
        priority: int = 0,
    ) -> Job:
        """Hand prompts in; returns as soon as the engine has taken all of them. Close the job in any case.

        Args:
            form: the field that asks for a form of the answer, for errors.
            priority: lower goes first.

        Raises:
            ApiError: there is no place, or a prompt was refused.
        """
        if self.background.failure is not None:
            raise shutting_down()
        place = self.admission.enter(len(prompts) * params.candidates)
        job = Job(self, request, model, place)
        try:
            if params.structure is not None:  # compiled here, so that `submit` does not wait for it
                compiled = await while_connected(request.receive, self._compile(params.structure, form))
                if not compiled:
                    raise ClientLeft
            salt = request.state.client.salt
            for prompt in prompts:
                options = {"adapter": model.adapter, "salt": salt, "priority": priority}
                job.tickets.append(self.background.submit(prompt, params, **options))
            for ticket in job.tickets:
                await ticket.taken()
        except ArrieroError as error:
            await job.close()
            raise self.told(error, request) from error
        except BaseException:
            await job.close()
            raise
        return job

    async def _compile(self, structure: Structure, form: str | None) -> bool:
        """Always true.

        Raises:
            ApiError: 400: the structure cannot be used. 503: it cannot be compiled now.
        """
        try:
            await self.workers.run_slow(self.background.engine.grammars.compile, structure)
        except StructureBusyError as error:
            raise ApiError(503, str(error), code="busy", retry_after=5) from error
        except GenerationError as error:
            place = error.place if isinstance(error, UnkeptSchemaError) else form
            raise ApiError(400, " ".join(str(error).split()), param=place) from error
        return True

    def told(self, error: ArrieroError, request: Request) -> ApiError:
        """What the client hears of an error; what it does not hear is logged."""
        answer = api_error(error)
        if answer.status >= 500:
            self.log("engine_error", level="error", request_id=request.state.request_id, message=str(error)[:1000])
        return answer

    def close(self) -> None:
        """Let the threads go."""
        self.workers.close()
        self.background.engine.grammars.close()
