"""Requests at a rate: each is sent when its time has come, whatever has been answered by then (open loop)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from arriero.serving.load.asking import LoadError, Outcome, Question, ask
from arriero.serving.load.exchange import Endpoint
from arriero.serving.load.prompts import Conversation
from arriero.serving.load.record import RateRecord


async def warm_up(endpoint: Endpoint, question: Question, conversation: Conversation) -> None:
    """One request that is not counted, so that what is made at the first one is there.

    Raises:
        LoadError: it fails, as all others would.
    """
    outcome = await ask(endpoint, question, conversation)
    if outcome.error:
        raise LoadError(f"{endpoint.base_url}{question.path}: a first request fails: {outcome.error}")


async def run_rate(
    endpoint: Endpoint,
    question: Question,
    conversations: Sequence[Conversation],
    times: Sequence[float],
    rate: float,
    objectives: Mapping[str, float],
) -> RateRecord:
    """Send all requests and wait for all answers.

    Args:
        times: when each is sent, in seconds from the beginning.
        rate, objectives: see `RateRecord.of`.
    """
    running = most = 0

    async def one(conversation: Conversation, lag: float) -> Outcome:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await ask(endpoint, question, conversation, lag)
        finally:
            running -= 1

    start, tasks = time.perf_counter(), list[asyncio.Task[Outcome]]()
    async with asyncio.TaskGroup() as group:
        for conversation, when in zip(conversations, times, strict=True):
            await asyncio.sleep(max(0.0, start + when - time.perf_counter()))
            lag = max(0.0, time.perf_counter() - start - when)
            tasks.append(group.create_task(one(conversation, lag)))
    outcomes = [task.result() for task in tasks]
    seconds = max(outcome.ended for outcome in outcomes) - start
    return RateRecord.of(rate, outcomes, seconds, most, objectives)
