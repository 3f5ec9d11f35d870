"""Answers to many prompts from a model that several processes hold: whole copies of it take a share of the prompts each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from arriero.engine.generation import Generation, Generator
from arriero.engine.loading import LoadedModel
from arriero.engine.sampling import SamplingParams
from arriero.parallel.generation import for_generation
from arriero.parallel.parallelize import Parallel
from arriero.parallel.processes import Processes


def generate_shared(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    max_batch_size: int = 32,
    on_done: Callable[[int], object] | None = None,
) -> list[Generation]:
    """The answers in the order of the prompts, the same in every process.

    Where each process has all weights, they share the prompts out by runs of like beginnings, so that those still meet. Where
    they need each other for a forward pass, all go through all prompts.

    Args:
        params: one for each prompt.
        on_done: called with a number of answers as they are finished, those of other processes at the end.

    Raises:
        GenerationError: as `Generator.generate`, of a prompt of this process.
        PeerError: of another's.
    """
    parallel: Parallel | None = getattr(loaded.model, "parallel", None)
    processes = parallel.processes if parallel is not None else Processes()
    apart = processes.layout.dp_replicate == processes.size
    generator = Generator(for_generation(loaded.model, apart=apart), loaded.tokenizer, max_batch_size=max_batch_size)

    def done(_: int, __: Generation) -> None:
        if on_done is not None:
            on_done(1)

    if not apart or processes.alone:
        return generator.generate(prompts, params, on_done=done)
    order = sorted(range(len(prompts)), key=lambda index: list(prompts[index]))
    begin, end = (len(order) * rank // processes.size for rank in (processes.rank, processes.rank + 1))
    own = order[begin:end]
    with processes.together():
        made = generator.generate([prompts[i] for i in own], [params[i] for i in own], on_done=done)
    told = processes.exchange([asdict(answer) for answer in made])
    answers = [Generation(**fields) for part in told for fields in part]
    if on_done is not None:
        on_done(len(order) - len(own))
    return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]
