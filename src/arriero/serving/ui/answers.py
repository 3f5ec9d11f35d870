"""The answers that pages wait for, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from arriero.serving.ui.client import Progress


class Answers:
    """One answer at most for each open page."""

    def __init__(self) -> None:
        self._ends: dict[str, asyncio.Event] = {}

    def end(self, page: str) -> None:
        """End the page's answer, if there is one: what has come of it is all."""
        if page in self._ends:
            self._ends[page].set()

    async def until_ended(self, page: str, pieces: AsyncGenerator[Progress]) -> AsyncIterator[Progress]:
        """The pieces of an answer as they come, until it is complete or `end` is called."""
        self.end(page)
        ended = self._ends[page] = asyncio.Event()
        end = asyncio.ensure_future(ended.wait())
        try:
            while True:
                piece = asyncio.ensure_future(anext(pieces, None))
                try:
                    await asyncio.wait({piece, end}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not piece.done():
                        piece.cancel()
                    await asyncio.gather(piece, return_exceptions=True)
                progress = None if ended.is_set() else piece.result()
                if progress is None:
                    return
                yield progress
        finally:
            end.cancel()
            await pieces.aclose()
            if self._ends.get(page) is ended:
                del self._ends[page]
