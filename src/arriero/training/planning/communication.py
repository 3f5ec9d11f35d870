"""What the processes of a layout send each other in a step: by axis, in bytes that one device sends.

Rings: of n processes that gather or scatter B bytes each sends (n - 1) / n of them, and twice that to add them up for all
(Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"). Left out, as small: norms of
gradients, counts of tokens, log-sums of a shared vocabulary, and gradients of norms under tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.layout import Layout
from arriero.training.planning.activations import FLOAT, Widths
from arriero.training.planning.machine import Links
from arriero.training.planning.pipeline import Share
from arriero.training.planning.setup import ModelFacts, TrainingSetup
from arriero.training.planning.state import held_by


@dataclass(frozen=True)
class Traffic:
    """One kind of message of one device in a step.

    Attributes:
        axis: of the layout; "shard" is dp_shard and cp together, which share out the model's state.
        size: bytes that the device sends.
        calls: how often it is called; `messages` single ones that the device sends.
        hidden: whether it runs beside the arithmetic, so that only what outlasts it is waited for.
    """

    axis: str
    what: str
    size: float
    calls: int
    messages: int
    hidden: bool


def members(layout: Layout, axis: str) -> tuple[int, int]:
    """Processes of a group of one axis, and how far apart their ranks are."""
    stride = {"tp": 1, "cp": layout.tp, "shard": layout.tp}
    stride["dp_replicate"] = layout.tp * layout.cp * layout.dp_shard
    stride["pp"] = stride["dp_replicate"] * layout.dp_replicate
    size = layout.dp_shard * layout.cp if axis == "shard" else getattr(layout, axis)
    return size, stride[axis]


def traffic(facts: ModelFacts, setup: TrainingSetup, share: Share) -> list[Traffic]:
    """Everything that the device at one place of the pipeline sends in a step; nothing of what has only one process."""
    found = [
        *_replicas(facts, setup, share),
        *_shards(facts, setup, share),
        *_tensor(facts, setup, share),
        *_context(facts, setup, share),
        *_pipeline(facts, setup, share),
    ]
    return [one for one in found if one.calls]


def seconds(one: Traffic, layout: Layout, links: Links) -> float:
    """Time of it: its bytes at the bandwidth of the links of its axis, and the delay of each message."""
    group = members(layout, one.axis)
    return one.size / links.bandwidth(*group) + one.messages * links.delay(*group)


def _replicas(facts: ModelFacts, setup: TrainingSetup, share: Share) -> list[Traffic]:
    layout, held = setup.layout, held_by(facts, setup, share)
    n, groups = layout.dp_replicate, len(share.layers) + layout.virtual
    if n == 1:
        return []
    size = 2 * (n - 1) / n * held.total.trained_shards * setup.reduce_bytes
    return [Traffic("dp_replicate", "all-reduce of gradients", size, groups, 2 * (n - 1) * groups, True)]


def _shards(facts: ModelFacts, setup: TrainingSetup, share: Share) -> list[Traffic]:
    """FSDP2 sends a layer at a time. Stage 3 gathers again for each backward pass, but for what is outside of the layers.

    In torch's pipelines gradients go once a step, and weights stay gathered after a backward pass: then stage 3 gathers once
    for each micro-batch.
    """
    layout, held = setup.layout, held_by(facts, setup, share)
    n, layers = layout.dp_shard * layout.cp, held.layers
    if n == 1:
        return []
    m, pipelined = setup.micro_batches, layout.pp > 1
    once = layout.stage < 2 or (pipelined and layout.stage < 3)  # a step
    of_layers = 1 if once else m * (2 if layout.stage == 3 and not pipelined else 1)
    of_outside = 1 if once or pipelined else m
    gathered = layers * held.layer.weights * of_layers + held.outside.weights * of_outside
    sent = 1 if layout.stage < 2 or pipelined else m
    part, groups = (n - 1) / n, layout.virtual
    gathers, scatters = layers * of_layers + groups * of_outside, (layers + groups) * sent
    return [
        Traffic("shard", "all-gather of weights", part * gathered, gathers, (n - 1) * gathers, True),
        Traffic(
            "shard",
            "reduce-scatter of gradients",
            part * held.total.trained * setup.reduce_bytes * sent,
            scatters,
            (n - 1) * scatters,
            True,
        ),
    ]


def _tensor(facts: ModelFacts, setup: TrainingSetup, share: Share) -> list[Traffic]:
    """Each layer enters and leaves its two blocks in both passes, embedding and head once (arXiv:2205.05198, section 4.2.2).

    Entering gathers and leaving scatters where tokens are shared out; else leaving adds up forward and entering backward,
    which is as much. What is computed again gathers again; it stops before the last block is left.
    """
    n, layers, m = setup.layout.tp, len(share.layers), setup.micro_batches
    if n == 1:
        return []
    one = (n - 1) / n * setup.tokens * facts.config.hidden_size * setup.weight_bytes
    again = {"none": 0, "core_attn": 1, "full": 3}[setup.recompute]
    if not setup.layout.sequence_parallel:  # all-reduces, each as much as two; of those computed again
        one, again = 2 * one, {"none": 0, "core_attn": 0, "full": 1}[setup.recompute]
    each = 8 if setup.layout.sequence_parallel else 4
    ends = 2 if setup.layout.sequence_parallel else 1
    calls = m * (layers * (each + again) + ends * (share.embedding + share.head))
    name = "all-gather and reduce-scatter" if setup.layout.sequence_parallel else "all-reduce"
    steps = (n - 1) * (1 if setup.layout.sequence_parallel else 2)
    return [Traffic("tp", f"{name} of hidden states", one * calls, calls, steps * calls, False)]


def _context(facts: ModelFacts, setup: TrainingSetup, share: Share) -> list[Traffic]:
    """Keys and values of every layer are gathered, again if attention is computed again, and their gradients scattered.

    In a ring they go around in each pass, which is as much, and their gradients, in fp32, once (`parallel/ring.py`).
    """
    n, layers, m = setup.layout.cp, len(share.layers), setup.micro_batches
    if n == 1:
        return []
    key = Widths.of(facts, setup.layout.tp).key
    one = (n - 1) / n * setup.batch * setup.sequence * 2 * key * setup.compute_bytes
    gathers, scatters = m * layers * (1 if setup.recompute == "none" else 2), m * layers
    if setup.layout.has_ring(setup.device):
        passes, wider = gathers + m * layers, FLOAT / setup.compute_bytes
        return [
            Traffic("cp", "ring of keys and values", one * passes, passes, (n - 1) * passes, False),
            Traffic("cp", "ring of their gradients", one * wider * scatters, scatters, (n - 1) * scatters, False),
        ]
    return [
        Traffic("cp", "all-gather of keys and values", one * gathers, gathers, (n - 1) * gathers, False),
        Traffic("cp", "reduce-scatter of their gradients", one * scatters, scatters, (n - 1) * scatters, False),
    ]


def _pipeline(facts: ModelFacts, setup: TrainingSetup, share: Share) -> list[Traffic]:
    """Hidden states to the next stage and their gradients to the one before, where another process has it."""
    layout = setup.layout
    if layout.pp == 1:
        return []
    one = setup.stream_tokens * facts.config.hidden_size * setup.weight_bytes
    mine, sends = set(layout.stages_of(share.pp)), 0
    for stage in mine:
        sends += sum(0 <= other < layout.stages and other not in mine for other in (stage + 1, stage - 1))
    calls = sends * setup.micro_batches
    return [Traffic("pp", "hidden states and their gradients", one * calls, calls, calls, True)]
