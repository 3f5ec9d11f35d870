"""A request on its way through the engine: the tickets of its prompts, from its place in the queue to its last token."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from starlette.requests import Request

from arriero.engine.answer import Generation
from arriero.engine.ticket import Piece, Ticket
from arriero.errors import ArrieroError
from arriero.serving.admission import Place
from arriero.serving.api_errors import ApiError, shutting_down, timed_out

if TYPE_CHECKING:
    from arriero.serving.service import ServedModel, Service

SETTLE_SECONDS = 5.0  # for the engine to tell what it has come to with a cancelled request

T = TypeVar("T")


class ThoughtCounter(Protocol):
    """Tells tokens of thoughts from others."""

    def count(self, answer: Sequence[int]) -> int:
        """How many of an answer's tokens are its thought."""
        ...


class Job:
    """Made by `Service.start`; `close` gives back what it has taken.

    Attributes:
        tickets: one a prompt.
        prompt_only: whether no answer is wanted: the token that the engine gives all the same is not counted.
        thoughts: how tokens of thoughts are told from others; None: there are none.
    """

    def __init__(self, service: Service, request: Request, model: ServedModel, place: Place) -> None:
        self.tickets: list[Ticket] = []
        self.prompt_only = False
        self.thoughts: ThoughtCounter | None = None
        self._service, self._request, self._model, self._place = service, request, model, place
        self._began: float = request.state.began
        self._first: float | None = None
        self._last: dict[tuple[int, int], float] = {}
        self._tokens = self._prompt_tokens = self._cached_tokens = self._thought_tokens = 0
        self._ended: list[str] = []
        self._texts: list[str] = []
        self._arrived: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()
        self._read = self._closed = False

    @property
    def usage(self) -> dict[str, object]:
        """OpenAI's count of tokens, of the answers that have ended."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self._thought_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What comes of each prompt, with the prompt's number.

        Raises:
            ApiError: something went wrong with an answer, or the server ends.
        """
        try:
            async for number, piece in self._merged():
                self._note(number, piece)
                if piece.result is not None and piece.result.finish_reason == "cancelled":
                    raise shutting_down()
                yield number, piece
            self._read = True
        except ArrieroError as error:
            raise self._service.told(error, self._request) from error

    async def results(self) -> list[list[Generation]]:
        """Of each prompt its answers, when all have come.

        Raises:
            ApiError: as `pieces`; 504 after the service's time.
        """
        found: list[dict[int, Generation]] = [{} for _ in self.tickets]
        seconds = self._service.limits.seconds
        try:
            async with asyncio.timeout(self.seconds_left()):
                async for number, piece in self.pieces():
                    if piece.result is not None:
                        found[number][piece.index] = piece.result
        except TimeoutError as error:
            raise timed_out(seconds) from error
        return [[answer for _, answer in sorted(answers.items())] for answers in found]

    async def make(self, make: Callable[[list[list[Generation]]], T], found: list[list[Generation]]) -> T:
        """Call something off the event loop."""
        return await self._service.workers.run(make, found)

    def seconds_left(self) -> float:
        """Until the request is given up."""
        return max(0.0, self._service.limits.seconds - (time.perf_counter() - self._began))

    def timed_out(self) -> ApiError:
        """What is said then."""
        return timed_out(self._service.limits.seconds)

    async def close(self) -> None:
        """Cancel what is not finished, give the place back, note what came of it: also of answers that nobody reads."""
        if self._closed:
            return
        self._closed = True
        for ticket in self.tickets:
            ticket.cancel()
        self._place.leave()
        if not self._read:
            with contextlib.suppress(TimeoutError, ArrieroError):
                async with asyncio.timeout(SETTLE_SECONDS):
                    await self._settle()
        metrics, name = self._service.metrics, self._model.name
        label = name if name in self._service.models else "unloaded"
        metrics.prompt_tokens.labels(label).inc(self._prompt_tokens)
        metrics.generated_tokens.labels(label).inc(self._tokens)
        metrics.cached_tokens.inc(self._cached_tokens)
        facts = self._request.state.facts
        facts["model"], facts["prompt_tokens"], facts["completion_tokens"] = name, self._prompt_tokens, self._tokens
        facts["finish"] = ",".join(dict.fromkeys(self._ended)) or "cancelled"
        if self._service.log_prompts:
            facts["answers"] = self._texts
        if self._first is not None:
            facts["first_token_seconds"] = round(self._first - self._began, 4)

    async def _merged(self) -> AsyncIterator[tuple[int, Piece]]:
        if len(self.tickets) == 1:
            async for piece in self.tickets[0]:
                yield 0, piece
            return
        arrived = self._arrived

        async def read(number: int, ticket: Ticket) -> None:
            try:
                async for piece in ticket:
                    arrived.put_nowait((number, piece))
                arrived.put_nowait(None)
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(read(number, ticket)) for number, ticket in enumerate(self.tickets)]
        try:
            left = len(tasks)
            while left:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def _settle(self) -> None:
        """Read what the engine has come to with cancelled answers, which it tells after its step."""
        while not self._arrived.empty():
            item = self._arrived.get_nowait()
            if isinstance(item, tuple):
                self._note(*item)
        async for number, piece in self._merged():
            self._note(number, piece)

    def _note(self, number: int, piece: Piece) -> None:
        now, answer = time.perf_counter(), (number, piece.index)
        metrics, count = self._service.metrics, len(piece.token_ids)
        if count and self._first is None:
            self._first = now
            metrics.first_token_seconds.observe(now - self._began)
        if count and answer in self._last:
            for _ in range(count):
                metrics.between_tokens_seconds.observe((now - self._last[answer]) / count)
        if count:
            self._last[answer] = now
        if not self.prompt_only:
            self._tokens += count + (piece.result.unchosen_tokens if piece.result is not None else 0)
        if piece.result is not None:
            computed = any(one == number for one, _ in self._last)  # a prompt whose turn never came is none
            if piece.index == 0 and (computed or piece.result.finish_reason != "cancelled"):
                self._prompt_tokens += piece.result.prompt_tokens
                self._cached_tokens += piece.result.cached_tokens
            if self.thoughts is not None:
                self._thought_tokens += self.thoughts.count(piece.result.token_ids)
            self._ended.append(piece.result.finish_reason)
            if self._service.log_prompts:
                self._texts.append(piece.result.text)
            metrics.finished.labels(piece.result.finish_reason).inc()
