"""Runs of a job, ours and other programs' in turns, so that a drift of the machine's speed hits all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from arriero.data.tokenizer import Tokenizer
from arriero.engine.benchmark.measured import Job, Run, run_job
from arriero.engine.benchmark.peer import Peer, PeerRun
from arriero.engine.benchmark.record import Comparison, Peak, Record, shared_work
from arriero.engine.benchmark.work_cost import WorkCost
from arriero.engine.runner import Runner

WARM_PROMPT, WARM_NEW = 64, 3  # tokens of what is run first and not counted


def warm_up(job: Job) -> Job:
    """A short job of the same shape: as many requests at once, with short prompts and answers."""
    kept = slice(0, job.max_running)
    return replace(
        job,
        prompts=[prompt[:WARM_PROMPT] for prompt in job.prompts[kept]],
        new_tokens=[min(count, WARM_NEW) for count in job.new_tokens[kept]],
    )


def measure(
    runner: Runner,
    tokenizer: Tokenizer,
    job: Job,
    cost: WorkCost,
    peak: Peak,
    *,
    repeats: int = 3,
    max_step_tokens: int = 2048,
    peers: Sequence[Peer] = (),
) -> Record:
    """The record of a job.

    Args:
        repeats: rounds; in each, every side does the whole job.
        peers: programs to compare with.

    Raises:
        GenerationError: the engine refuses a request, or another program fails.
    """
    short = warm_up(job)
    run_job(runner, tokenizer, short, max_step_tokens=max_step_tokens)
    for peer in peers:
        peer.run(short)
    ours: list[Run] = []
    theirs: dict[str, list[PeerRun]] = {peer.name: [] for peer in peers}
    for _ in range(repeats):
        ours.append(run_job(runner, tokenizer, job, max_step_tokens=max_step_tokens))
        for peer in peers:
            theirs[peer.name].append(peer.run(job))
    shared = None
    if job.workload == "shared_prefix":
        without = run_job(runner, tokenizer, replace(job, prefix_cache=False), max_step_tokens=max_step_tokens)
        shared = shared_work(job, ours[-1], without)
    against = {name: Comparison.of(ours, runs) for name, runs in theirs.items()}
    return Record.of(job, ours, cost, peak, shared=shared, against=against)
