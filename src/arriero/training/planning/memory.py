"""Memory of one device over a training step: how much of each kind, and when the most of it is held at once.

A step has six moments at which it can be greatest; the activations shrink from the first to the fifth while the gradients
grow, so neither sum of all kinds is ever held. Sharding is ZeRO's (Rajbhandari et al. 2020, arXiv:1910.02054) as torch's
FSDP2 does it: a step gathers the weights of a layer, or of all, beside the shard that is held.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from arriero.training.loss import chunk_rows
from arriero.training.planning.activations import (
    FLOAT,
    Widths,
    attention_kernel,
    block_saved,
    blocks_kept,
    kept_of_block,
    local_shape,
    loss_saved,
    model_saved,
    scores,
    total,
)
from arriero.training.planning.pipeline import Share, distinct_shares
from arriero.training.planning.setup import ModelFacts, TrainingSetup
from arriero.training.planning.state import Held, held_by

MIB = 2**20
# A process that has imported torch and this package, and what its kernels allocate at their first use; measured on Linux
# with torch 2.13.
HOST_IMPORTS, HOST_KERNELS = 310 * MIB, 25 * MIB
# CUDA context, cuBLAS workspaces and what the caching allocator cannot hand out: a usual figure, not measured here.
CUDA_OVERHEAD = 1024 * MIB


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        kinds: the greatest size of each kind over a step, by name; they are not all there at once.
        moments: bytes held at each moment of a step, in order.
        overhead: bytes of the process or the CUDA context, held always and part of every moment.
        pp: the place in the pipeline of the device.
        host: bytes of host memory that `offload` uses instead.
    """

    kinds: dict[str, int]
    moments: dict[str, int]
    overhead: int
    pp: int = 0
    host: int = 0

    @cached_property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak(self) -> int:
        return self.moments[self.moment]


def training_memory(facts: ModelFacts, setup: TrainingSetup) -> Memory:
    """What the device holds that holds most."""
    found = [share_memory(facts, setup, share) for share in distinct_shares(facts, setup)]
    return max(found, key=lambda memory: memory.peak)


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients at the moments of a step.

    Attributes:
        shards: as they are held at its end.
        stepping: as the optimizer takes them.
        earlier: of the micro-batches before the last.
        layer: that the backward pass of one layer adds.
        outside: of head, norm and embedding, until they are shared out.
    """

    shards: int
    stepping: int
    earlier: int
    layer: int
    head: int
    outside: int

    @classmethod
    def of(cls, setup: TrainingSetup, held: Held) -> Gradients:
        every, layer, head, outside = held.total, held.layer, held.head, held.outside
        # masters are stepped by fp32 gradients, made one after another while the half-precision ones go
        stepping = every.trained_shards * FLOAT if every.masters else every.gradient_shards
        if not setup.fully_sharded:
            earlier = stepping if setup.accumulation > 1 else 0
            return cls(every.gradients, stepping, earlier, layer.gradients, head.gradients, 0)

        def on_the_way(trained: int, made: int) -> int:
            # what autograd made and the buffer in which it is added up
            return made + trained * setup.reduce_bytes

        several = setup.micro_batches > 1
        earlier = stepping if several else 0
        if several and (setup.layout.stage < 2 or setup.layout.pp > 1):  # torch's pipelines send once a step
            earlier = every.trained * setup.reduce_bytes
        return cls(
            every.gradient_shards,
            stepping,
            earlier,
            on_the_way(layer.trained, layer.gradients),
            head.gradients,
            on_the_way(outside.trained, outside.gradients),
        )


def share_memory(facts: ModelFacts, setup: TrainingSetup, share: Share) -> Memory:
    """What a device at one place of the pipeline holds."""
    held = held_by(facts, setup, share)
    every, config = held.total, facts.config
    gradients, gathered = Gradients.of(setup, held), _gathered(setup, held)
    overhead = CUDA_OVERHEAD if setup.device == "cuda" else HOST_IMPORTS + HOST_KERNELS
    stored = every.held + every.masters + every.optimizer
    offloaded = setup.layout.offload and setup.device == "cuda"
    host = stored + gradients.stepping if offloaded else 0
    between = overhead + (0 if offloaded else stored)
    always = between + gathered

    outside = total(model_saved(facts, setup)) if share.head else 0
    loss = total(loss_saved(facts, setup)) if share.head else 0
    if setup.layout.pp > 1 and setup.layout.schedule in ("zero_bubble", "zbv"):
        # torch's pipelines hold the losses to the end of a step; a backward pass in two halves leaves each its gradients
        always += loss * (setup.micro_batches - 1)
    kept = blocks_kept(facts, setup, share.layers, share.passes) + outside + _messages(facts, setup, share)
    casts = _cached_casts(facts, setup, len(share.layers))
    earlier = gradients.earlier
    # gradients that each micro-batch shares out at once leave for the host
    if offloaded and earlier == gradients.stepping:
        earlier = 0
    at_hand = 0 if offloaded else gradients.shards
    logits = _loss_working(facts, setup) if share.head else 0
    backward = _block_backward(facts, setup)
    own_layer = total(kept_of_block(facts, setup, share.layers[0]))
    # what other micro-batches in the pipeline keep, while this one is at its first layer
    others = math.ceil((kept - outside) * (share.passes - 1) / share.passes) if share.passes > 1 else 0
    # a tied head's gradient stands beside the embedding's until both are there
    tied = config.tie_word_embeddings and not setup.fully_sharded
    tied_again = held.embedding.gradients if tied else 0
    if setup.fully_sharded:
        there = (earlier or at_hand) + gradients.layer + gradients.head
    else:
        # of all other layers and the head: the embedding's own comes last
        rest = every.gradients - gradients.layer - gradients.head
        there = earlier + gradients.layer if earlier else rest
    head_gradient = tied_again or gradients.head
    ending = (earlier or at_hand) if setup.fully_sharded else gradients.shards
    update = 0 if offloaded else gradients.stepping + _update_working(facts, setup)
    moments = {
        "the loss": always + earlier + kept + casts + loss + logits,
        "backward of the loss": always + earlier + kept + 2 * loss,
        "backward of the last layer": always + max(earlier, head_gradient) + kept + backward,
        "backward of the first layer": always + others + own_layer + backward + there,
        "end of the backward pass": always + ending + gradients.outside + tied_again + others + own_layer,
        "the update": between + (0 if setup.fully_sharded else gathered) + update,
    }
    kinds = {
        "weights": 0 if offloaded else every.held,
        "master weights": 0 if offloaded else every.masters,
        "optimizer": 0 if offloaded else every.optimizer,
        "gradients": max(ending, earlier, 0 if offloaded else gradients.stepping),
        "activations": kept + (casts if setup.recompute != "none" else 0),
        "loss": loss + logits,
        "working memory": max(backward, _update_working(facts, setup)),
        "weights gathered": gathered,
        "overhead": overhead,
    }
    return Memory({name: size for name, size in kinds.items() if size}, moments, overhead, share.pp, host)


def _gathered(setup: TrainingSetup, held: Held) -> int:
    """Weights that a device holds besides its shards while it computes.

    Under stage 3 two layers (one is fetched ahead) and what is outside of them; in a pipeline all its layers, since torch's
    pipelines let go of none after a backward pass. Below stage 3 all of them; FSDP2 copies them even where nothing is shared.
    """
    if not setup.fully_sharded:
        return 0
    if setup.layout.stage == 3 and setup.layout.pp == 1:
        return min(2, held.layers) * held.layer.weights + held.outside.weights
    return held.total.weights


def _messages(facts: ModelFacts, setup: TrainingSetup, share: Share) -> int:
    """Hidden states that a pipeline's stages keep of each pass for the backward one: what came in and what went out."""
    if setup.layout.pp == 1:
        return 0
    size = setup.stream_tokens * facts.config.hidden_size * setup.weight_bytes
    return math.ceil(2 * size * share.passes * setup.layout.virtual)


def _cached_casts(facts: ModelFacts, setup: TrainingSetup, layers: int) -> int:
    """Half-precision copies of trained weights that autocast keeps to the end of the forward pass.

    Without recomputation autograd keeps the same copies, and they are counted there.
    """
    if not setup.keeps_casts or setup.recompute == "none":
        return 0
    cast = sum(
        math.prod(local_shape(p, facts.config, setup.layout.tp)) for p in facts.layer if p.ndim == 2 and p.trained
    )
    kept = sum(tensor.size for tensor in kept_of_block(facts, setup) if tensor.cast)
    return max(0, cast * setup.compute_bytes - kept) * layers


def _loss_working(facts: ModelFacts, setup: TrainingSetup) -> int:
    """The greatest that the loss holds beside what it keeps: hidden states twice, a chunk of logits and its softmax.

    On a CPU the softmax takes the logits' place.
    """
    config, rows = facts.config, Widths.of(facts, setup.layout.tp).vocabulary
    head = 0 if facts.method.frozen else rows * config.hidden_size
    chunk = chunk_rows(setup.tokens, rows) * rows
    hidden = 2 * setup.tokens * config.hidden_size * setup.weight_bytes
    wide = (1 if setup.device == "cpu" else 2) * chunk * FLOAT
    if setup.compute_bytes == FLOAT:
        return hidden + wide
    cast = rows * config.hidden_size * setup.compute_bytes if setup.autocast else 0
    # logits and softmax in fp32, or softmax, its cast, and the product that is added to the head's gradient
    return hidden + cast + max(wide, chunk * (FLOAT + 2) + head * 2)


def _block_backward(facts: ModelFacts, setup: TrainingSetup) -> int:
    """What the backward pass of one layer adds to what was kept."""
    config, tokens, widths = facts.config, setup.tokens, Widths.of(facts, setup.layout.tp)
    stream = 3 * tokens * config.hidden_size * setup.weight_bytes
    # of the product silu(gate) * up: the gradients of both factors, beside its own, which takes the place of the product
    mlp = 2 * tokens * widths.inner * setup.compute_bytes
    last, pairs = config.num_hidden_layers - 1, 0
    if attention_kernel(config, setup, last, facts.method.prefix_length) == "written out":
        pairs = 2 * scores(setup) * widths.heads * FLOAT
    again = 0
    if setup.recompute == "full":
        again = total(block_saved(facts, setup, last))
    elif setup.recompute == "core_attn":
        again = sum(t.size for t in block_saved(facts, setup, last) if t.core)
    return again + stream + max(mlp, pairs) + _made_weights(facts, setup)


def _made_weights(facts: ModelFacts, setup: TrainingSetup) -> int:
    """Whole weights of a layer that are made for one product and let go.

    Those in few bits are made in fp32 and cast. DoRA adds the update up in fp32 to find the lengths of the rows.
    """
    bytes_each = 0
    if facts.method.quantize_base is not None:
        bytes_each = FLOAT + setup.compute_bytes
    if facts.method.dora:
        bytes_each = max(bytes_each, 2 * FLOAT)
    return math.ceil(bytes_each * facts.largest_matrix / setup.layout.tp) if bytes_each else 0


def _update_working(facts: ModelFacts, setup: TrainingSetup) -> int:
    """What an optimizer holds while it steps; AdamW's kernel works in place.

    Muon orthogonalises one whole matrix after another, wherever its parts are, with a handful of copies (bf16 on a GPU, fp32 on
    a CPU), and scales an fp32 update. Lion makes an fp32 update of one parameter after another.
    """
    if setup.optimizer == "lion":
        layout = setup.layout
        largest = max((p.numel for p in facts.parameters if p.trained), default=0)
        return math.ceil(largest / (layout.tp * layout.dp_shard * layout.cp)) * FLOAT
    if setup.optimizer != "muon":
        return 0
    item = FLOAT if setup.device == "cpu" else 2
    return max((p.numel for p in facts.layer if p.trained and p.ndim == 2), default=0) * (4 * item + 2 * FLOAT)
