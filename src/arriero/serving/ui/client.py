"""The page's way to the API: HTTP, with the key that the person in front of it has typed. Nothing is shared with the server."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

CONNECT_SECONDS, READ_SECONDS = 10.0, 600.0


class AnswerError(Exception):
    """What the page says when there is no answer.

    Attributes:
        word: the key of the words for it, see `words`.
        detail: what the API said.
    """

    def __init__(self, word: str, detail: str = "") -> None:
        super().__init__(detail or word)
        self.word, self.detail = word, detail


@dataclass(frozen=True)
class Progress:
    """An answer on its way.

    Attributes:
        text: all of it so far.
        thought: what was thought before, all of it so far.
        tokens: how many it has.
        tokens_per_second: since the first one.
    """

    text: str
    thought: str
    tokens: int
    tokens_per_second: float


class ApiClient:
    """Asks one API."""

    def __init__(self, url: str, certificate: str | None = None) -> None:
        """
        Args:
            url: without /v1.
            certificate: of a server of this machine: this one is trusted, whatever name it has. Default: those of the system.
        """
        self.url = url.rstrip("/")
        self._verify: ssl.SSLContext | bool = True
        if certificate is not None:
            context = ssl.create_default_context(cafile=certificate)
            context.check_hostname = False
            self._verify = context

    def _http(self, key: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key.strip()}"} if key.strip() else {}
        if not key.isascii():
            raise AnswerError("wrong_key")
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        # trust_env: no proxy of the environment may come between, nor a .netrc put a password in
        return httpx.AsyncClient(headers=headers, timeout=timeout, verify=self._verify, trust_env=False)

    async def models(self, key: str) -> list[str]:
        """The names of the models.

        Raises:
            AnswerError: there is no answer, or the key is wrong.
        """
        try:
            async with self._http(key) as http:
                answer = await http.get(f"{self.url}/v1/models")
                _check(answer.status_code, answer.content)
                return [str(model["id"]) for model in answer.json()["data"]]
        except httpx.HTTPError as error:
            raise AnswerError("unreachable") from error
        except (ValueError, KeyError, TypeError) as error:
            raise AnswerError("failed", "the list of models is not readable") from error

    async def chat(
        self, key: str, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any]
    ) -> AsyncGenerator[Progress]:
        """An answer as it comes. Leave the iteration to stop it.

        Raises:
            AnswerError: there is none, or it breaks off.
        """
        body = {**settings, "messages": list(messages), "stream": True, "stream_options": {"include_usage": True}}
        text, thought, tokens, first, ended = "", "", 0, 0.0, False
        try:
            async with (
                self._http(key) as http,
                http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer,
            ):
                if answer.status_code != 200:
                    _check(answer.status_code, await answer.aread())
                async for event in _events(answer.aiter_bytes()):
                    ended = event == "[DONE]"
                    if ended:
                        break
                    chunk = _chunk(event)
                    tokens = chunk.tokens or tokens
                    for piece, thinking in chunk.pieces:
                        first = first or time.perf_counter()
                        text, thought, tokens = text + piece, thought + thinking, tokens + 1
                    seconds = time.perf_counter() - first if first else 0.0
                    yield Progress(text, thought, tokens, (tokens - 1) / seconds if seconds > 0 and tokens > 1 else 0.0)
        except httpx.HTTPError as error:
            raise AnswerError("unreachable" if not (text or thought) else "broken_off") from error
        if not ended:
            raise AnswerError("broken_off")


async def _events(stream: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of a stream's events. Only a line feed ends a line: JSON may hold U+2028 and its like as they are."""
    rest = bytearray()
    async for data in stream:
        rest += data
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].decode("utf-8", "replace").strip(" \r")


@dataclass(frozen=True)
class _Chunk:
    pieces: list[tuple[str, str]]  # of the answer and of the thought
    tokens: int | None


def _chunk(event: str) -> _Chunk:
    """What is in one event; whatever else a server sends is passed over.

    Raises:
        AnswerError: it tells of an error, or is no JSON.
    """
    try:
        chunk = json.loads(event)
    except ValueError as error:
        raise AnswerError("failed", "the server's answer is not JSON") from error
    if not isinstance(chunk, dict):
        return _Chunk([], None)
    told = chunk.get("error")
    if told:
        raise AnswerError("failed", str(told.get("message", "") if isinstance(told, dict) else told))
    pieces = []
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if isinstance(delta, dict):
            piece, thinking = delta.get("content"), delta.get("reasoning_content")
            pieces.append((piece if isinstance(piece, str) else "", thinking if isinstance(thinking, str) else ""))
    usage = chunk.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return _Chunk([pair for pair in pieces if any(pair)], tokens if isinstance(tokens, int) else None)


def _check(status: int, body: bytes) -> None:
    if status == 200:
        return
    try:
        detail = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        detail = f"HTTP {status}"
    words = {401: "wrong_key", 429: "busy", 503: "busy"}
    raise AnswerError(words.get(status, "failed"), detail)
