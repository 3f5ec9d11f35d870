"""Memory of one device over a training step: how much of each kind, and when the most of it is held at once.

A step has six moments at which it can be greatest; the activations shrink from the first to the fifth while the gradients
grow, so neither sum of all kinds is ever held. Sharding is that of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from arriero.training.loss import CHUNK_ELEMENTS
from arriero.training.optimizer import EMBEDDING, HEAD, LEAST_8BIT
from arriero.training.optimizers.block_quantization import BLOCK
from arriero.training.planning.activations import (
    FLOAT,
    attention_kernel,
    block_saved,
    blocks_kept,
    kept_of_block,
    loss_saved,
    model_saved,
    total,
)
from arriero.training.planning.setup import ModelFacts, Parameter, TrainingSetup, shared_out

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
    """

    kinds: dict[str, int]
    moments: dict[str, int]
    overhead: int

    @cached_property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak(self) -> int:
        return self.moments[self.moment]


def parameter_bytes(parameter: Parameter, setup: TrainingSetup) -> int:
    """Bytes of a weight as it is held between steps."""
    return parameter.numel * (FLOAT if parameter.is_adapter else setup.weight_bytes)


def optimizer_bytes(parameter: Parameter, rule: str) -> int:
    """Bytes of the optimizer's state of one trained parameter, master weights left out; as `Optimizer` makes it."""
    size, eight = parameter.numel, rule == "adamw_8bit"
    if rule == "muon" and parameter.ndim == 2 and EMBEDDING not in parameter.name and HEAD not in parameter.name:
        return size * FLOAT
    if eight and size >= LEAST_8BIT and EMBEDDING not in parameter.name:
        return 2 * (size + -(-size // BLOCK) * FLOAT)
    return 2 * size * FLOAT + FLOAT  # the step count is a tensor too


def training_memory(facts: ModelFacts, setup: TrainingSetup) -> Memory:
    """What one device holds."""
    trained = [p for p in facts.parameters if p.trained]
    whole = sum(parameter_bytes(p, setup) for p in facts.parameters)
    weights = shared_out(whole, setup, 3)
    halves = sum(p.numel for p in trained if not p.is_adapter) if setup.weight_bytes < FLOAT else 0
    masters = shared_out(halves * FLOAT, setup, 1)
    state = shared_out(sum(optimizer_bytes(p, setup.optimizer) for p in trained), setup, 1)
    held = sum(parameter_bytes(p, setup) for p in trained)
    gradients = shared_out(held, setup, 2)
    # masters are stepped by fp32 gradients, made one after another while the half-precision ones go
    stepping = shared_out(sum(p.numel for p in trained) * FLOAT, setup, 2) if halves else gradients
    gathered = _gathered(facts, setup)
    overhead = CUDA_OVERHEAD if setup.device == "cuda" else HOST_IMPORTS + HOST_KERNELS
    always = weights + masters + state + gathered + overhead

    blocks, outside, loss = blocks_kept(facts, setup), total(model_saved(facts, setup)), total(loss_saved(facts, setup))
    kept = blocks + outside
    casts = _cached_casts(facts, setup)
    earlier = stepping if setup.accumulation > 1 else 0  # of the micro-batches before; those of masters in fp32
    head = 0 if facts.lora_rank else facts.config.vocab_size * facts.config.hidden_size
    embedding_again = head * setup.weight_bytes if facts.config.tie_word_embeddings else 0
    head_gradient = shared_out(head * setup.weight_bytes, setup, 2)
    logits = _loss_working(facts, setup, head)
    backward = _block_backward(facts, setup)
    layer_gradients = sum(parameter_bytes(p, setup) for p in trained if p.in_block) // facts.config.num_hidden_layers
    # of all other layers and the head: the embedding's own comes last
    others = held - layer_gradients - (0 if facts.config.tie_word_embeddings else head * setup.weight_bytes)
    there = earlier + layer_gradients if earlier else shared_out(others, setup, 2)
    first_layer = total(kept_of_block(facts, setup)) + backward + there
    update = _update_working(facts, setup)
    moments = {
        "the loss": always + earlier + kept + casts + loss + logits,
        "backward of the loss": always + earlier + kept + 2 * loss,
        "backward of the last layer": always + max(earlier, head_gradient) + kept + backward,
        "backward of the first layer": always + first_layer,
        "end of the backward pass": always + gradients + embedding_again + total(kept_of_block(facts, setup)),
        "the update": always + stepping + update,
    }
    kinds = {
        "weights": weights,
        "master weights": masters,
        "optimizer": state,
        "gradients": max(gradients, stepping),
        "activations": kept + (casts if setup.recompute != "none" else 0),
        "loss": loss + logits,
        "working memory": max(backward, update),
        "weights gathered": gathered,
        "overhead": overhead,
    }
    return Memory({name: size for name, size in kinds.items() if size}, moments, overhead)


def _gathered(facts: ModelFacts, setup: TrainingSetup) -> int:
    """Whole weights that a device holds under stage 3: two layers (one is fetched ahead), or embedding and head."""
    if setup.sharding < 3 or setup.devices == 1:
        return 0
    layers = facts.config.num_hidden_layers
    block = sum(p.numel for p in facts.parameters if p.in_block) // layers
    outside = sum(p.numel for p in facts.parameters if not p.in_block)
    return (2 * block + outside) * setup.compute_bytes


def _cached_casts(facts: ModelFacts, setup: TrainingSetup) -> int:
    """Half-precision copies of trained weights that autocast keeps to the end of the forward pass.

    Without recomputation autograd keeps the same copies, and they are counted there. Under stage 3 weights are cast as they
    are gathered, a layer at a time.
    """
    if not setup.autocast or setup.recompute == "none" or setup.sharding >= 3:
        return 0
    cast = sum(p.numel for p in facts.parameters if p.in_block and p.ndim == 2 and p.trained)
    kept = sum(tensor.size for tensor in kept_of_block(facts, setup) if "in half precision" in tensor.name)
    return max(0, cast * setup.compute_bytes - kept * facts.config.num_hidden_layers)


def _loss_working(facts: ModelFacts, setup: TrainingSetup, head: int) -> int:
    """The greatest that the loss holds beside what it keeps: hidden states twice, a chunk of logits and its softmax."""
    config = facts.config
    chunk = min(setup.tokens, max(1, CHUNK_ELEMENTS // config.vocab_size)) * config.vocab_size
    hidden = 2 * setup.tokens * config.hidden_size * setup.weight_bytes
    if setup.compute_bytes == FLOAT:
        return hidden + 2 * chunk * FLOAT
    cast = config.vocab_size * config.hidden_size * setup.compute_bytes if setup.autocast else 0
    # logits and softmax in fp32, or softmax, its cast, and the product that is added to the head's gradient
    return hidden + cast + max(2 * chunk * FLOAT, chunk * (FLOAT + 2) + head * 2)


def _block_backward(facts: ModelFacts, setup: TrainingSetup) -> int:
    """What the backward pass of one layer adds to what was kept."""
    config, tokens = facts.config, setup.tokens
    stream = 3 * tokens * config.hidden_size * setup.weight_bytes
    # of the product silu(gate) * up: the gradients of both factors, beside its own, which takes the place of the product
    mlp = 2 * tokens * config.intermediate_size * setup.compute_bytes
    scores = 0
    if attention_kernel(config, setup, config.num_hidden_layers - 1) == "written out":
        scores = 2 * tokens * setup.sequence * config.num_attention_heads * FLOAT
    again = 0
    if setup.recompute == "full":
        again = total(block_saved(facts, setup, config.num_hidden_layers - 1))
    elif setup.recompute == "core_attn":
        again = sum(t.size for t in block_saved(facts, setup, config.num_hidden_layers - 1) if t.core)
    return again + stream + max(mlp, scores)


def _update_working(facts: ModelFacts, setup: TrainingSetup) -> int:
    """What an optimizer holds while it steps; AdamW's kernel works in place.

    Muon orthogonalises one matrix after another with a handful of copies in bf16, and scales an fp32 update.
    """
    if setup.optimizer != "muon":
        return 0
    matrices = [p.numel for p in facts.parameters if p.trained and p.ndim == 2 and not p.in_vocabulary]
    return max(matrices, default=0) * (4 * 2 + 2 * FLOAT)
