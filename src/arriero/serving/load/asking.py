"""One request of the load, timed."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import h11

from arriero.errors import ArrieroError
from arriero.serving.load.exchange import Endpoint, events
from arriero.serving.load.prompts import Conversation

MAX_ERROR_BYTES, MAX_ERROR_TEXT = 65536, 160
MAX_TOKENS = 2**31  # that an answer may be said to have


class LoadError(ArrieroError):
    """A server that cannot be measured."""


@dataclass(frozen=True)
class Question:
    """What each request asks for besides its prompt.

    Attributes:
        api: `chat` or `completions`.
        seconds: after which a request is given up.
    """

    api: str
    model: str
    max_tokens: int
    temperature: float
    ignore_eos: bool
    seconds: float

    @property
    def path(self) -> str:
        return "/chat/completions" if self.api == "chat" else "/completions"

    def body(self, conversation: Conversation) -> bytes:
        """The request for one prompt."""
        asked: dict[str, Any] = {"model": self.model}
        if self.api == "chat":
            asked["messages"] = list(conversation)
        else:
            asked["prompt"] = "\n\n".join(str(turn["content"]) for turn in conversation)
        asked |= {"max_tokens": self.max_tokens, "temperature": self.temperature, "stream": True}
        asked["stream_options"] = {"include_usage": True}  # tokens are what the server counts, not the parts that come
        if self.ignore_eos:
            asked["ignore_eos"] = True
        return json.dumps(asked, ensure_ascii=False).encode()


@dataclass
class Outcome:
    """What became of a request. Times are seconds of `time.perf_counter`.

    Attributes:
        lag: seconds that it was sent after it should have been: this program's own fault.
        began: when it was sent: before the connection is made.
        texts: when parts of the answer came.
        ended: when all of it had come.
        prompt_tokens, output_tokens: what the server says; None if it does not, or says what cannot be.
        error: why there is no whole answer; "" if there is one.
    """

    lag: float = 0.0
    began: float = 0.0
    texts: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str = ""

    @property
    def first_token(self) -> float | None:
        """Seconds to the first text (TTFT); None for an answer without any."""
        return self.texts[0] - self.began if self.texts else None

    @property
    def per_token(self) -> float | None:
        """Mean seconds of each token after the first (TPOT); None where there is none."""
        if not self.texts or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.texts[-1] - self.texts[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring parts of the text (ITL)."""
        return [late - early for early, late in zip(self.texts, self.texts[1:], strict=False)]

    @property
    def whole(self) -> float:
        """Seconds of all of it (E2EL)."""
        return self.ended - self.began


async def ask(endpoint: Endpoint, question: Question, conversation: Conversation, lag: float = 0.0) -> Outcome:
    """Send a request and read its answer; whatever goes wrong is in the outcome."""
    outcome, body = Outcome(lag=lag), question.body(conversation)
    outcome.began = time.perf_counter()
    try:
        async with (
            asyncio.timeout(question.seconds),
            endpoint.send("POST", question.path, body) as (status, parts),
        ):
            if status == 200:
                await _read(parts, outcome)
            else:
                outcome.error = f"HTTP {status}{await _reason(parts)}"
    except TimeoutError:
        outcome.error = f"no whole answer within {question.seconds:g} s"
    except (OSError, h11.RemoteProtocolError) as error:
        outcome.error = _words(error)
    outcome.ended = time.perf_counter()
    return outcome


async def _read(parts: AsyncIterator[bytes], outcome: Outcome) -> None:
    async for data in events(parts):
        now = time.perf_counter()
        if data == b"[DONE]":
            if outcome.ended == 0.0:
                outcome.ended = now
            return
        try:
            piece = json.loads(data)
            if piece.get("error"):
                outcome.error = f"error in the stream: {_told(piece)}"
                return
            if isinstance(usage := piece.get("usage"), dict):
                outcome.prompt_tokens, outcome.output_tokens = map(
                    _count, (usage.get("prompt_tokens"), usage.get("completion_tokens"))
                )
            if any(_says(choice) for choice in piece.get("choices") or []):
                outcome.texts.append(now)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            outcome.error = "an event of the stream is not OpenAI's"
            return
    outcome.error = "the stream ended without [DONE]"


def _count(value: object) -> int | None:
    """A number of tokens; None where that is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value <= MAX_TOKENS else None


def _says(choice: dict[str, Any]) -> bool:
    """Whether a part of an answer holds text, and not only a role or the reason of its end."""
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls", "refusal"))


async def _reason(parts: AsyncIterator[bytes]) -> str:
    body = b""
    async for part in parts:
        body += part
        if len(body) > MAX_ERROR_BYTES:
            break
    try:
        return f" {_told(json.loads(body))}"
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ""


def _told(value: Any) -> str:
    """The code of an error, or else its words: of those that differ in words alone there would be too many."""
    error = value["error"] if isinstance(value, dict) and "error" in value else value
    if isinstance(error, dict):
        error = error.get("code") or error.get("message") or error.get("type") or ""
    return " ".join(str(error).split())[:MAX_ERROR_TEXT]


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno and error.errno > 0 and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno).lower()
    return " ".join(str(error).split())[:MAX_ERROR_TEXT] or type(error).__name__


async def first_model(endpoint: Endpoint) -> str:
    """The first of a server's models.

    Raises:
        LoadError: there is no server, it wants another key, or names no model.
    """
    where = f"{endpoint.base_url}/models"
    try:
        async with asyncio.timeout(30), endpoint.send("GET", "/models") as (status, parts):
            body = b"".join([part async for part in parts])
    except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
        raise LoadError(f"--base_url: no answer from {where} ({_words(error)}): is the server running?") from error
    try:
        found = json.loads(body)
        if status != 200:
            raise LoadError(f"{where} answers with HTTP {status} {_told(found)}: check --base_url and the key")
        return str(found["data"][0]["id"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(f"{where} lists no model (HTTP {status}): check --base_url, or name one by --model") from error
