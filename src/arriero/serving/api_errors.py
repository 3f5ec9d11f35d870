"""What a client is told when something is wrong, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from arriero.engine.ticket import EngineClosedError, RefusedError
from arriero.errors import ArrieroError, GenerationError, TemplateError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: one line for the client. It must hold nothing that the client may not know.
        param: the part of the request that is wrong, as "messages[0].content".
        code: a word for programs.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Those that go with it."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def shutting_down() -> ApiError:
    """What is said once the server has been asked to end."""
    return ApiError(
        503, "the server is shutting down: ask another one, or try again", code="shutting_down", retry_after=5
    )


def timed_out(seconds: float) -> ApiError:
    """What is said of a request that took too long."""
    return ApiError(504, f"the request was given up after {seconds:g} s", code="timeout")


def api_error(error: ArrieroError) -> ApiError:
    """What the client is told of an error of the engine or a template."""
    message = " ".join(str(error).split())
    if isinstance(error, EngineClosedError):
        return shutting_down()
    if isinstance(error, RefusedError):
        signs = ("max_position_embeddings", "bundle's context", "blocks of", "of answer are more than")
        too_long = any(sign in message for sign in signs)
        param = "logit_bias" if message.startswith("logit_bias ") else None
        return ApiError(400, message, param=param, code="context_length_exceeded" if too_long else None)
    if isinstance(error, TemplateError):
        # It begins with the model's folder, which is none of the client's business.
        return ApiError(
            400, message[message.find("the chat template") :] if "the chat template" in message else message
        )
    if isinstance(error, GenerationError):
        return ApiError(500, "the answer could not be computed; the server's log says why", code="engine_error")
    return ApiError(500, "something went wrong in the server; its log says what")
