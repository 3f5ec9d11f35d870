"""Threads for what would hold the event loop up: JSON, templates, tokenizing, compiling structures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 8
LONG_THREADS = 2  # whose turns may take seconds of a processor: requests with short texts must not wait behind them
SLOW_THREADS = 16  # each of which may wait seconds for a structure: requests without one must not wait behind it


class Workers:
    """Three pools of threads."""

    def __init__(self) -> None:
        self._quick = ThreadPoolExecutor(THREADS, thread_name_prefix="serving")
        self._long = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="long-texts")
        self._slow = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="structures")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on a thread and wait for it without blocking the event loop. Who stops waiting before its turn came
        has it called no more."""
        return await asyncio.get_running_loop().run_in_executor(self._quick, lambda: function(*args, **kwargs))

    async def run_long(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for what works on long texts."""
        return await asyncio.get_running_loop().run_in_executor(self._long, lambda: function(*args, **kwargs))

    async def run_slow(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for what can wait seconds for others."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Let the threads go."""
        for pool in (self._quick, self._long, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)
