"""An engine over a loaded model, whole or held by several processes, and answers to many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from arriero.data.tokenizer import Tokenizer
from arriero.engine.answer import Generation
from arriero.engine.drafts import Speculation
from arriero.engine.engine import Engine
from arriero.engine.ranks import LeaderRunner, follow
from arriero.engine.runner import Runner, TorchRunner, cache_block_size
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import GenerationError
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.generation import for_generation
from arriero.parallel.parallelize import Parallel
from arriero.parallel.processes import Processes

# What other processes hear of an answer.
_TOLD = ("token_ids", "text", "finish_reason", "prompt_tokens", "cached_tokens")


@contextmanager
def engine_of(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    *,
    max_running: int = 32,
    useful_tokens: int | None = None,
    speculation: Speculation | None = None,
    kv_cache_dtype: str = "auto",
    compile: bool = False,
) -> Iterator[Engine]:
    """An engine over a model of this process, as long as its weights stay what they are: it keeps copies and what they made.

    The model is in evaluation mode meanwhile, and as it was afterwards. Making an engine costs little: the memory of its keys
    and values is not touched before it is used.

    Args:
        useful_tokens: keys and values of more tokens than these would never be used.
        kv_cache_dtype: how keys and values are held, see `KVFormat.of`.
        compile: see `TorchRunner`.
    """
    with _runner_of(model, useful_tokens, kv_cache_dtype, compile) as runner:
        yield Engine(runner, tokenizer, max_running=max_running, speculation=speculation)


@contextmanager
def _runner_of(
    model: LlamaForCausalLM, useful_tokens: int | None, kv_cache_dtype: str, compile: bool, *, apart: bool = False
) -> Iterator[TorchRunner]:
    """See `engine_of`; for each of the processes that hold the model.

    Args:
        apart: each has a whole copy and runs prompts of its own.
    """
    was_training = model.training
    model.eval()
    try:
        shared = for_generation(model, apart=apart)
        copies = False if was_training else None  # they would last for these prompts only
        yield TorchRunner(
            shared,
            useful_tokens=useful_tokens,
            kv_cache_dtype=kv_cache_dtype,
            weight_copies=copies,
            compile=compile,
        )
    finally:
        model.train(was_training)


def generate_shared(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    max_running: int = 32,
    speculation: Speculation | None = None,
    kv_cache_dtype: str = "auto",
    compile: bool = False,
    on_done: Callable[[int], object] | None = None,
) -> list[Generation]:
    """The answers in the order of the prompts, the same in every process.

    Where each process has all weights, they share the prompts out by runs of like beginnings, so that those still meet. Where
    they need each other for a forward pass, rank 0 has all prompts and the others follow it.

    Args:
        params: one for each prompt.
        max_running: prompts answered at once in a process.
        speculation: of this process's prompts; of those that only follow it is not asked.
        kv_cache_dtype: how keys and values are held, see `KVFormat.of`.
        compile: see `TorchRunner`.
        on_done: called with a number of answers as they are finished, those of other processes at the end.

    Raises:
        GenerationError: as `Engine.generate`, of a prompt of this process.
        PeerError: of another's.
    """
    parallel: Parallel | None = getattr(model, "parallel", None)
    processes = parallel.processes if parallel is not None else Processes()
    apart = not processes.alone and processes.layout.dp_replicate == processes.size
    told_in_full = all(p.candidates == 1 and p.logprobs is None and p.prompt_logprobs is None for p in params)
    if not processes.alone and not told_in_full:
        raise GenerationError(
            "several processes give one answer to a prompt, without log-probabilities: run one process"
        )

    def generate(runner: Runner, own: Sequence[int]) -> list[Generation]:
        engine = Engine(runner, tokenizer, max_running=max_running, speculation=speculation)
        return engine.generate([prompts[i] for i in own], [params[i] for i in own], on_done=done, numbers=own)

    def work(own: Sequence[int]) -> list[Generation]:
        more = model.model.prefix_length + cache_block_size(for_generation(model, apart=apart))
        useful = sum(params[i].candidates * (len(prompts[i]) + params[i].max_new_tokens + more) for i in own)
        with _runner_of(model, useful, kv_cache_dtype, compile, apart=apart) as runner:
            if apart or processes.alone:
                return generate(runner, own)
            if not processes.first:
                follow(runner, processes)
                return []
            with LeaderRunner(runner, processes) as leader:
                return generate(leader, own)

    def done(_: int, __: Generation) -> None:
        if on_done is not None:
            on_done(1)

    if processes.alone:
        return work(range(len(prompts)))
    order = list(range(len(prompts)))
    begin, end = 0, len(order)
    if apart:
        order.sort(key=lambda index: list(prompts[index]))
        begin, end = (len(order) * rank // processes.size for rank in (processes.rank, processes.rank + 1))
    with processes.together():
        made = work(order[begin:end])
    told = processes.exchange([{name: getattr(answer, name) for name in _TOLD} for answer in made])
    answers = [Generation(**fields) for part in told for fields in part]
    if on_done is not None:
        on_done(len(order) - len(made))
    return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]
