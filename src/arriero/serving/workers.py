"""Threads for what would hold the event loop up: JSON, templates, tokenizing, compiling structures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 8
SLOW_THREADS = 16  # each of which may wait seconds for a structure: requests without one must not wait behind it


class Workers:
    """Two pools of threads."""

    def __init__(self) -> None:
        self._quick = ThreadPoolExecutor(THREADS, thread_name_prefix="serving")
        self._slow = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="structures")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on a thread and wait for it without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._quick, lambda: function(*args, **kwargs))

    async def run_slow(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for what can take seconds."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Let the threads go."""
        self._quick.shutdown(wait=False, cancel_futures=True)
        self._slow.shutdown(wait=False, cancel_futures=True)
