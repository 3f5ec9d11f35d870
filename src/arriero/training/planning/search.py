"""The fastest layouts of a number of devices that hold a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from arriero.config.layout import Layout
from arriero.errors import ConfigError
from arriero.parallel.tensor import check_heads
from arriero.training.planning.machine import GPUS_IN_NODE, Links
from arriero.training.planning.memory import Memory, training_memory
from arriero.training.planning.pipeline import distinct_shares
from arriero.training.planning.setup import ModelFacts, TrainingSetup
from arriero.training.planning.speed import Speed, training_speed
from arriero.training.planning.state import held_by

BATCHES = (1, 2, 4)  # rows of a micro-batch that are tried, beside the one asked for
LEAST_TOKENS = 1024  # of a row, for each process that shares it: with fewer the messages outweigh the work
CANDIDATES = 20_000  # most that are timed


@dataclass(frozen=True)
class Found:
    """A layout with the rows of a micro-batch and the recomputation that make it fastest."""

    setup: TrainingSetup
    speed: Speed
    memory: Memory

    @property
    def options(self) -> str:
        """What to give a run for it."""
        setup, layout = self.setup, self.setup.layout
        words = []
        if layout.tp > 1:
            words.append(f"--tensor_parallel_degree {layout.tp}")
        if layout.pp > 1:
            words.append(f"--pipeline_parallel_degree {layout.pp} --pipeline_schedule {layout.schedule}")
            if layout.virtual > 1 and layout.schedule != "zbv":
                words.append(f"--virtual_pp_degree {layout.virtual}")
        if layout.cp > 1:
            words.append(f"--context_parallel_degree {layout.cp}")
            if layout.context_method != "auto":
                words.append(f"--context_parallel_method {layout.context_method}")
        if layout.stage:
            words.append(f"--sharding stage{layout.stage} --sharding_parallel_degree {layout.dp_shard}")
        batch = setup.batch // setup.rows_each
        words.append(f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {setup.accumulation}")
        if setup.recompute != "none":
            words.append(f"--recompute --recompute_granularity {setup.recompute}")
        return " ".join(words)


def search(
    facts: ModelFacts,
    setup: TrainingSetup,
    *,
    memory: int,
    flops: float,
    utilization: float,
    links: Links,
    rows: int | None = None,
    most: int = 10,
) -> list[Found]:
    """Layouts of as many devices as the setup's that fit, for `rows` a step (by default the setup's); fastest first.

    Degrees of tensor, pipeline and context parallelism with an order of the pipeline are there once, with what makes them
    fastest. Tensor parallelism stays within a node.
    """
    sizes: dict[tuple[object, ...], bool] = {}
    timed: list[tuple[float, int, TrainingSetup, Speed]] = []
    for candidate in candidates(facts, setup, rows):
        layout = candidate.layout
        key = (layout.tp, layout.pp, layout.virtual, layout.schedule, layout.dp_shard * layout.cp, layout.stage)
        if key not in sizes:
            sizes[key] = least_memory(facts, candidate) <= memory
        if not sizes[key]:
            continue
        speed = training_speed(facts, candidate, flops, utilization, links)
        assert speed.step_seconds is not None
        timed.append((speed.step_seconds, len(timed), candidate, speed))
        if len(timed) >= CANDIDATES:
            break
    found: dict[tuple[object, ...], Found] = {}
    for _, _, candidate, speed in sorted(timed, key=lambda entry: entry[:2]):
        layout = candidate.layout
        degrees = (layout.tp, layout.pp, layout.cp, layout.schedule, layout.virtual)
        if degrees not in found:
            needed = training_memory(facts, candidate)
            if needed.peak <= memory:
                found[degrees] = Found(candidate, speed, needed)
                if len(found) == most:
                    break
    return list(found.values())


def least_memory(facts: ModelFacts, setup: TrainingSetup) -> int:
    """Bytes of weights and optimizer that the fullest device holds at the least, whatever the micro-batches."""
    held = [held_by(facts, setup, share).total for share in distinct_shares(facts, setup)]
    return max(state.held + state.masters + state.optimizer for state in held)


def candidates(facts: ModelFacts, setup: TrainingSetup, rows: int | None = None) -> Iterator[TrainingSetup]:
    """Every layout that is possible, with each micro-batch and recomputation that is tried."""
    devices, rows = setup.layout.size, rows or setup.step_tokens // setup.sequence
    recomputes = dict.fromkeys((setup.recompute, "full"))
    for tp, pp, cp in _model_degrees(facts, setup, devices):
        data, rest = divmod(devices, tp * pp * cp)
        if rest or rows % data:
            continue
        for batch in sorted({setup.batch, *(setup.rows_each * batch for batch in BATCHES)}):
            micro_batches, rest = divmod(rows // data, batch)
            if rest or micro_batches < pp:  # a pipeline with fewer is filled up with empty ones
                continue
            for schedule, virtual in _schedules(facts, pp, micro_batches):
                for stage, shard in _shardings(data, tp * cp, pp):
                    layout = Layout(
                        tp=tp,
                        pp=pp,
                        cp=cp,
                        dp_shard=shard,
                        dp_replicate=data // shard,
                        stage=stage,
                        schedule=schedule,
                        virtual=virtual,
                        sequence_parallel=setup.layout.sequence_parallel,
                        context_method=setup.layout.context_method,
                        offload=setup.layout.offload and stage > 0,
                    )
                    for recompute in recomputes:
                        yield replace(
                            setup, layout=layout, batch=batch, accumulation=micro_batches, recompute=recompute
                        )


def divisors(number: int, most: int) -> list[int]:
    """Up to `most`."""
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]


def _model_degrees(facts: ModelFacts, setup: TrainingSetup, devices: int) -> Iterator[tuple[int, int, int]]:
    config = facts.config
    for tp in divisors(devices, GPUS_IN_NODE):
        try:
            check_heads(config, tp)
        except ConfigError:
            continue
        for pp in divisors(devices // tp, config.num_hidden_layers):
            for cp in divisors(devices // (tp * pp), max(1, setup.sequence // LEAST_TOKENS)):
                if cp == 1 or setup.sequence % (2 * cp * tp) == 0:
                    yield tp, pp, cp


def _schedules(facts: ModelFacts, pp: int, micro_batches: int) -> Iterator[tuple[str, int]]:
    """Orders of a pipeline that need no empty micro-batches: interleaved with 2 stages in each process, and with the most."""
    layers = facts.config.num_hidden_layers
    if pp == 1:
        yield "1f1b", 1
        return
    yield "1f1b", 1
    if micro_batches % pp == 0:
        yield "zero_bubble", 1
        for virtual in sorted({2, layers // pp}):
            if 2 <= virtual <= layers // pp:
                yield "interleaved", virtual
    if 2 * pp <= layers and micro_batches >= 4 * pp:
        yield "zbv", 2


def _shardings(data: int, model: int, pp: int) -> Iterator[tuple[int, int]]:
    """Stages and how many share: copies only; all, or a node's worth with copies of that.

    Args:
        model: processes that share each sequence and matrix.
    """
    yield 0, 1
    node = GPUS_IN_NODE // model
    for shard in sorted({data, node}):
        if 1 < shard <= data and data % shard == 0:
            # torch's pipelines send gradients once a step: stages 2 and 3 are no smaller there
            yield from ((stage, shard) for stage in ((1,) if pp > 1 else (1, 2, 3)))
