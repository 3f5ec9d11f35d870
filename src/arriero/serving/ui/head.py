"""What stands first in the page's head: what Gradio is given for it comes only when it has chosen the language."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Head:
    """ASGI middleware that puts a text at the beginning of each document's head."""

    def __init__(self, app: ASGIApp, text: str) -> None:
        self._app, self._text = app, b"<head>" + text.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None
        body = bytearray()

        async def with_head(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("content-type", "").startswith("text/html"):
                    start = message
                    return
            if start is None:
                await send(message)
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            document = bytes(body).replace(b"<head>", self._text, 1)
            headers = MutableHeaders(scope=start)
            if "content-length" in headers:  # not where only the head is asked for
                headers["content-length"] = str(len(document) if body else int(headers["content-length"]))
            await send(start)
            await send({**message, "body": document})

        await self._app(scope, receive, with_head)
