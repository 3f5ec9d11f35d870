"""A plan as one dictionary for machines and as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arriero.training.objectives.preference import NEEDS_REFERENCE
from arriero.training.planning.activations import attention_kernel
from arriero.training.planning.fitting import SEQUENCE_LIMIT, Lever, largest_batch, levers, longest_sequence
from arriero.training.planning.layout_report import amount, duration, gib, layout_dictionary, layout_rows
from arriero.training.planning.machine import Links, Machine
from arriero.training.planning.memory import Memory, training_memory
from arriero.training.planning.setup import ModelFacts, TrainingSetup
from arriero.training.planning.speed import Speed, training_speed


@dataclass(frozen=True)
class Plan:
    """Everything that `arriero plan` tells.

    Attributes:
        utilization: share of the device's FLOP/s that is reckoned with.
        tokens: of the whole run; None if not given.
        levers: changes that lower the memory; only where the setup does not fit.
        links: between devices; None where they are not known.
    """

    name: str
    facts: ModelFacts
    setup: TrainingSetup
    machine: Machine
    utilization: float
    tokens: float | None
    memory: Memory
    speed: Speed
    sequence: int
    batch: int
    levers: tuple[Lever, ...]
    links: Links | None = None

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.machine.memory

    @property
    def has_reference(self) -> bool:
        """Whether the model answers every pair once before the first step, to be the reference."""
        return self.setup.preference in NEEDS_REFERENCE

    @property
    def seconds(self) -> float | None:
        """Time of the whole run."""
        return None if self.tokens is None else self.speed.seconds(self.tokens)


def make_plan(
    name: str,
    facts: ModelFacts,
    setup: TrainingSetup,
    machine: Machine,
    utilization: float,
    tokens: float | None,
    links: Links | None = None,
) -> Plan:
    """Plan one setup on one machine."""
    memory = training_memory(facts, setup)
    return Plan(
        name=name,
        facts=facts,
        setup=setup,
        machine=machine,
        utilization=utilization,
        tokens=tokens,
        memory=memory,
        speed=training_speed(facts, setup, machine.flops, utilization, links),
        sequence=longest_sequence(facts, setup, machine.memory),
        batch=largest_batch(facts, setup, machine.memory),
        levers=tuple(levers(facts, setup)) if memory.peak > machine.memory else (),
        links=links,
    )


def kernels(plan: Plan) -> list[str]:
    """The attention kernels of the model's layers, without repetition."""
    config = plan.facts.config
    prefix = plan.facts.method.prefix_length
    return sorted({attention_kernel(config, plan.setup, layer, prefix) for layer in range(config.num_hidden_layers)})


def as_dictionary(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; memory in bytes, work in FLOPs, time in seconds."""
    facts, speed, machine = plan.facts, plan.speed, plan.machine
    return {
        "model": plan.name,
        "setup": asdict(plan.setup) | asdict(facts.method),
        **layout_dictionary(plan.setup, machine.flops, speed, plan.links),
        "parameters": {
            "total": facts.total,
            "embedding_and_head": facts.vocabulary,
            "trained": facts.trained,
        },
        "flops_per_token": {
            "forward": speed.forward_per_token,
            "training": speed.training_per_token,
            "recomputed": speed.recomputed_per_token,
            "reference": speed.forward_per_token if plan.has_reference else 0.0,
        },
        "attention_kernel": kernels(plan),
        "memory": {
            "kinds": plan.memory.kinds,
            "moments": plan.memory.moments,
            "peak": plan.memory.peak,
            "peak_moment": plan.memory.moment,
            "pipeline_place": plan.memory.pp,
            "host": plan.memory.host,
        },
        "device_memory": {"bytes": machine.memory, "source": machine.memory_source},
        "fits": plan.fits,
        "longest_sequence": plan.sequence,
        "largest_micro_batch": plan.batch,
        "levers": [asdict(lever) for lever in plan.levers],
        "device_flops": {"peak": machine.flops, "source": machine.flops_source, "utilization": plan.utilization},
        "step_tokens": speed.step_tokens,
        "step_seconds": speed.step_seconds,
        "tokens_per_second": speed.tokens_per_second,
        "run_tokens": plan.tokens,
        "run_seconds": plan.seconds,
    }


def as_text(plan: Plan) -> str:
    """The plan as aligned tables."""
    facts, setup, machine = plan.facts, plan.setup, plan.machine
    sections = [
        (f"Model: {plan.name}", _model_rows(facts)),
        (f"Memory of one device: {_described(setup)}", _memory_rows(plan.memory)),
        (f"Fits into {gib(machine.memory)} ({machine.memory_source})?", _fit_rows(plan)),
        ("Work and time", _time_rows(plan)),
    ]
    if setup.layout.size > 1:
        sections.append((f"Layout: {setup.layout}", layout_rows(facts, setup, plan.speed, plan.links, machine)))
    if plan.levers:
        sections.insert(3, ("What would lower it", _lever_rows(plan)))
    lines = []
    for title, rows in sections:
        width = max(24, *(len(label) for label, _ in rows))
        lines += [title, *(f"  {label:<{width}}  {value}".rstrip() for label, value in rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def fp32_text(half: Plan) -> str:
    """What a plan in fp32 for a GPU says of bf16, which may be what was meant.

    Args:
        half: the same plan with --bf16.
    """
    rate = half.speed.tokens_per_second
    speed = "" if rate is None else f", {rate:,.0f} tokens a second"
    return f"This is fp32; with --bf16: {gib(half.memory.peak)} at the peak{speed}\n"


def _described(setup: TrainingSetup) -> str:
    precision = setup.compute_dtype
    if precision != "float32":
        precision += " O1" if setup.autocast else " O2"
    words = [f"{setup.batch} x {setup.sequence:,} tokens", precision, setup.optimizer]
    if setup.preference is not None:
        words.insert(1, f"{setup.preference}: a pair is two rows")
    words.append(
        {"none": "no recomputation", "core_attn": "attention recomputed", "full": "layers recomputed"}[setup.recompute]
    )
    if setup.layout.size > 1:
        words.append(f"{setup.layout.size} devices, {setup.layout}")
    return ", ".join([*words, setup.device])


def _model_rows(facts: ModelFacts) -> list[tuple[str, str]]:
    trained = f"{facts.trained:>18,}"
    if facts.method.frozen:
        trained += f"  {facts.method}"
    tied = "  (one matrix: tied)" if facts.config.tie_word_embeddings else ""
    return [
        ("parameters", f"{facts.total:>18,}"),
        ("embedding and head", f"{facts.vocabulary:>18,}{tied}"),
        ("trained", trained),
    ]


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    rows = [(kind, f"{gib(size):>14}") for kind, size in memory.kinds.items()]
    if memory.host:
        rows.append(("host memory", f"{gib(memory.host):>14}  offloaded, not part of the peak"))
    place = f" in place {memory.pp} of the pipeline" if memory.pp else ""
    return [*rows, ("peak", f"{gib(memory.peak):>14}  at {memory.moment}{place}; not all kinds are there at once")]


def _fit_rows(plan: Plan) -> list[tuple[str, str]]:
    spare = plan.machine.memory - plan.memory.peak
    verdict = f"yes, {gib(spare)} to spare" if spare >= 0 else f"no, {gib(-spare)} too much"
    rows = [("as asked", verdict)]
    limit = plan.facts.config.max_position_embeddings
    sequence = f"{plan.sequence:,} tokens" if plan.sequence < SEQUENCE_LIMIT else f"more than {SEQUENCE_LIMIT:,} tokens"
    beyond = f" (the model's positions end at {limit:,})" if plan.sequence > limit else ""
    rows.append((f"longest row, {plan.setup.batch} a micro-batch", sequence + beyond if plan.sequence else "none"))
    unit = "rows" if plan.setup.preference is None else "pairs of rows"
    rows.append((f"most {unit} of {plan.setup.sequence:,} tokens", f"{plan.batch:,}" if plan.batch else "none"))
    if plan.setup.device == "cpu":
        rows.append(("beside it", "freed memory that the C library keeps, up to as much again: see docs/plan.md"))
    return rows


def _lever_rows(plan: Plan) -> list[tuple[str, str]]:
    marks = {True: "fits", False: "still too much"}
    return [(lv.options, f"{gib(lv.peak):>14}  {marks[lv.peak <= plan.machine.memory]}") for lv in plan.levers]


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
    speed, machine = plan.speed, plan.machine
    rule = "4 a weight, 6 a trained one" if plan.facts.method.frozen else "6N"
    rows = [
        ("forward", f"{amount(speed.forward_per_token, 'FLOP')} a token"),
        (
            "training",
            f"{amount(speed.training_per_token, 'FLOP')} a token ({rule} + attention, N without the embedding)",
        ),
    ]
    if speed.recomputed_per_token:
        rows.append(("computed again", f"{amount(speed.recomputed_per_token, 'FLOP')} a token"))
    if plan.has_reference:
        once = f"{amount(speed.forward_per_token, 'FLOP')} a token, once for every pair before the first step"
        rows.append(("reference", f"{once}; not in the times below"))
    if "written out" in kernels(plan):
        rows.append(("attention", "no fused kernel takes this: scores of every pair are kept"))
    if machine.flops is None:
        return [*rows, ("peak of a device", machine.flops_source)]
    rows.append(("peak of a device", f"{amount(machine.flops, 'FLOP/s')} ({machine.flops_source})"))
    rows.append(("reached, assumed", f"{plan.utilization:.0%} of it; --mfu changes that"))
    if speed.step_seconds is not None and speed.tokens_per_second is not None:
        tokens = f"{speed.tokens_per_second:,.0f} tokens a second"
        rows.append(("a step", f"{speed.step_tokens:,} tokens in {duration(speed.step_seconds)}: {tokens}"))
    if plan.tokens is not None and plan.seconds is not None:
        rows.append(
            (f"{plan.tokens:,.0f} tokens", f"{plan.tokens / speed.step_tokens:,.0f} steps, {duration(plan.seconds)}")
        )
    return rows


def too_much(plan: Plan) -> str:
    """One line for a setup that does not fit: by how much, and what helps."""
    lacking = gib(plan.memory.peak - plan.machine.memory)
    line = f"does not fit: {gib(plan.memory.peak)} needed, {lacking} more than there is"
    helping = [lever for lever in plan.levers if lever.peak <= plan.machine.memory]
    if helping:
        best: Sequence[str] = [f"{lever.options} ({gib(lever.peak)})" for lever in helping[:3]]
        return f"{line}; what helps: {' or '.join(best)}"
    least = min((lever.peak for lever in plan.levers), default=plan.memory.peak)
    return f"{line}, and {gib(least)} at the least with other options: take a larger device, more of them, or a smaller model"
