"""Answers that come piece by piece: server-sent events, or JSON lines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from arriero.serving.api_errors import ApiError
from arriero.serving.job import Job
from arriero.serving.json_response import dump

PING_SECONDS = 15.0  # of silence, after which a comment keeps proxies from giving the connection up

T = TypeVar("T")


class EventStream(Response):
    """Sends objects as they come. When the client leaves, the job ends; an error on the way is the last object.

    Attributes:
        media_type: of server-sent events, or of JSON lines.
    """

    def __init__(
        self,
        job: Job,
        objects: AsyncIterator[Any],
        *,
        lines: bool = False,
        named: bool = False,
        done: bool = True,
        error: Callable[[ApiError], Any] = lambda error: error.body,
    ) -> None:
        """
        Args:
            objects: JSON values; where `named`, each has its event's name as "type".
            lines: a JSON line each instead of events.
            done: end with `[DONE]`.
            error: the object that an error becomes.
        """
        media = "application/x-ndjson" if lines else "text/event-stream"
        super().__init__(None, 200, {"x-accel-buffering": "no", "cache-control": "no-store"}, media)
        del self.headers["content-length"]
        self._job, self._objects, self._error = job, objects, error
        self._lines, self._named, self._done = lines, named, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it."""
        try:
            await while_connected(receive, self._send(send))
        finally:
            await self._job.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pings = None if self._lines else asyncio.create_task(self._ping(send))
        self._spoke = True
        try:
            async with asyncio.timeout(self._job.seconds_left()):
                async for value in self._objects:
                    self._spoke = True
                    await self._part(send, self._frame(value))
        except TimeoutError:
            await self._part(send, self._frame(self._error(self._job.timed_out())))
        except ApiError as error:
            await self._part(send, self._frame(self._error(error)))
        else:
            if self._done and not self._lines:
                await self._part(send, b"data: [DONE]\n\n")
        finally:
            if pings is not None:
                pings.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _frame(self, value: Any) -> bytes:
        if self._lines:
            return dump(value) + b"\n"
        name = b"event: " + str(value["type"]).encode() + b"\n" if self._named and "type" in value else b""
        return name + b"data: " + dump(value) + b"\n\n"

    async def _ping(self, send: Send) -> None:
        while True:
            self._spoke = False
            await asyncio.sleep(PING_SECONDS)
            if not self._spoke:
                await self._part(send, b": ping\n\n")

    @staticmethod
    async def _part(send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})


class ClientLeft(Exception):
    """The client closed the connection before its answer came."""


async def while_connected(receive: Receive, work: Awaitable[T]) -> T | None:
    """Do something for a client whose whole request has been read; stop when it leaves.

    Returns:
        None if it left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return None
        return working.result()
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def results(job: Job, request: Request, make: Callable[[Any], T]) -> T:
    """The answer of a job that is sent as a whole; the job is closed.

    Args:
        make: what becomes of the `Job.results`; called off the event loop, since it may be large.

    Raises:
        ApiError: as `Job.results`.
        ClientLeft: nobody waits for it any more.
    """
    try:
        found = await while_connected(request.receive, job.results())
        if found is None:
            raise ClientLeft
        return await job.make(make, found)
    finally:
        await job.close()
