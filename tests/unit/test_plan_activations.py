"""The planned activations against what autograd really keeps, counted by its own hooks."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.activation_checkpointing import apply_activation_checkpointing
from arriero.training.loss import linear_cross_entropy
from arriero.training.planning import activations
from arriero.training.planning.activations import blocks_kept, loss_saved, model_saved, total
from arriero.training.planning.setup import Method, TrainingSetup, model_facts

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = {
    "vocab_size": 640,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def shape(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(SHAPE | changes))


def kept_by_autograd(
    config: LlamaConfig,
    setup: TrainingSetup,
    *,
    rank: int = 0,
    targets: tuple[str, ...] = (),
    math: bool = False,
    method: Method | None = None,
) -> int:
    """Bytes of the distinct storages that a forward pass saves, parameters left out."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.init_weights()
    model.to(getattr(torch, setup.weight_dtype))
    if rank:
        apply_lora(model, LoRAConfig(rank=rank, target_modules=targets))
    if method is not None:
        method.apply(model)
    if setup.recompute != "none":
        apply_activation_checkpointing(model.model.layers, setup.recompute)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors themselves: a freed storage's address could come back

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.randint(0, config.vocab_size, (setup.batch, setup.sequence))
    autocast = torch.autocast(setup.device, dtype=getattr(torch, setup.compute_dtype), enabled=setup.autocast)
    kernel = sdpa_kernel(SDPBackend.MATH) if math else contextlib.nullcontext()
    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast, kernel:
        hidden = model.hidden_states(ids)
        loss = linear_cross_entropy(hidden, model.lm_head.weight, ids).loss
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return size


HALF = {"compute_dtype": "bfloat16"}
CASES: dict[str, tuple[LlamaConfig, TrainingSetup, int, tuple[str, ...]]] = {
    "fp32": (shape(), TrainingSetup(batch=2, sequence=96), 0, ()),
    "one long row": (shape(num_hidden_layers=2), TrainingSetup(batch=1, sequence=384), 0, ()),
    "tied, equal heads": (
        shape(tie_word_embeddings=True, num_key_value_heads=6),
        TrainingSetup(batch=3, sequence=64),
        0,
        (),
    ),
    "wide MLP, one key head": (
        shape(intermediate_size=1024, num_key_value_heads=1),
        TrainingSetup(batch=2, sequence=96),
        0,
        (),
    ),
    "qwen3": (shape(model_type="qwen3"), TrainingSetup(batch=2, sequence=96), 0, ()),
    "mistral, short window": (
        shape(model_type="mistral", sliding_window=16),
        TrainingSetup(batch=1, sequence=256),
        0,
        (),
    ),
    "bf16 O1": (shape(), TrainingSetup(batch=2, sequence=96, **HALF), 0, ()),
    "bf16 O2": (shape(), TrainingSetup(batch=2, sequence=96, **HALF, weight_dtype="bfloat16"), 0, ()),
    "recompute layers": (shape(num_hidden_layers=6), TrainingSetup(batch=4, sequence=128, recompute="full"), 0, ()),
    "recompute layers, bf16 O2": (
        shape(num_hidden_layers=6),
        TrainingSetup(batch=4, sequence=128, recompute="full", **HALF, weight_dtype="bfloat16"),
        0,
        (),
    ),
    "recompute attention": (shape(), TrainingSetup(batch=4, sequence=96, recompute="core_attn"), 0, ()),
    "recompute attention, bf16 O1": (
        shape(),
        TrainingSetup(batch=4, sequence=96, recompute="core_attn", **HALF),
        0,
        (),
    ),
    "LoRA": (shape(), TrainingSetup(batch=2, sequence=96), 8, LINEAR),
    "LoRA on q and v": (shape(), TrainingSetup(batch=2, sequence=96), 8, ("q_proj", "v_proj")),
    "LoRA, bf16 O1": (shape(), TrainingSetup(batch=2, sequence=96, **HALF), 8, LINEAR),
    "LoRA on q and the MLP, bf16 O1": (
        shape(),
        TrainingSetup(batch=2, sequence=96, **HALF),
        8,
        ("q_proj", *LINEAR[4:]),
    ),
    "LoRA, recompute attention": (shape(), TrainingSetup(batch=4, sequence=96, recompute="core_attn"), 8, LINEAR),
    "LoRA, bf16 O2": (shape(), TrainingSetup(batch=2, sequence=96, **HALF, weight_dtype="bfloat16"), 8, LINEAR),
}


@pytest.mark.parametrize("name", CASES)
def test_formula_equals_what_autograd_keeps(name: str) -> None:
    config, setup, rank, targets = CASES[name]
    facts = model_facts(config, lora_rank=rank, lora_targets=targets)
    planned = blocks_kept(facts, setup) + total(model_saved(facts, setup)) + total(loss_saved(facts, setup))
    measured = kept_by_autograd(config, setup, rank=rank, targets=targets, math=False)
    assert planned == pytest.approx(measured, rel=0.02)


O2 = {**HALF, "weight_dtype": "bfloat16"}
ADAPTER = {"lora_rank": 8, "lora_targets": LINEAR}
METHODS: dict[str, tuple[TrainingSetup, Method]] = {
    "DoRA": (TrainingSetup(batch=2, sequence=96), Method(**ADAPTER, dora=True)),
    "DoRA on q and v, bf16 O2": (
        TrainingSetup(batch=2, sequence=96, **O2),
        Method(8, ("q_proj", "v_proj"), dora=True),
    ),
    "DoRA, bf16 O1": (TrainingSetup(batch=2, sequence=96, **HALF), Method(**ADAPTER, dora=True)),
    "DoRA, recompute layers": (TrainingSetup(batch=4, sequence=96, recompute="full"), Method(**ADAPTER, dora=True)),
    "QLoRA": (TrainingSetup(batch=2, sequence=96), Method(**ADAPTER, quantize_base="nf4")),
    "QLoRA on q and v": (TrainingSetup(batch=2, sequence=96), Method(8, ("q_proj", "v_proj"), quantize_base="nf4")),
    "QLoRA, bf16 O1": (TrainingSetup(batch=2, sequence=96, **HALF), Method(**ADAPTER, quantize_base="nf4")),
    "QLoRA, bf16 O2": (TrainingSetup(batch=2, sequence=96, **O2), Method(**ADAPTER, quantize_base="int8")),
    "QLoRA, recompute attention": (
        TrainingSetup(batch=4, sequence=96, recompute="core_attn"),
        Method(**ADAPTER, quantize_base="int8"),
    ),
    "prefix": (TrainingSetup(batch=2, sequence=96), Method(prefix_length=20)),
    "long prefix, one row": (TrainingSetup(batch=1, sequence=128), Method(prefix_length=64)),
    "prefix, bf16 O2": (TrainingSetup(batch=2, sequence=96, **O2), Method(prefix_length=20)),
    "prefix, network": (TrainingSetup(batch=2, sequence=96), Method(prefix_length=20, prefix_network=256)),
    "prefix, recompute layers": (TrainingSetup(batch=4, sequence=96, recompute="full"), Method(prefix_length=20)),
    "prefix, quantized": (TrainingSetup(batch=2, sequence=96), Method(prefix_length=20, quantize_base="nf4")),
}


@pytest.mark.parametrize("name", METHODS)
def test_formula_equals_what_autograd_keeps_of_a_method(name: str) -> None:
    setup, method = METHODS[name]
    facts = model_facts(shape(), **asdict(method))
    planned = blocks_kept(facts, setup) + total(model_saved(facts, setup)) + total(loss_saved(facts, setup))
    assert planned == pytest.approx(kept_by_autograd(shape(), setup, method=method), rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_formula_of_written_out_attention(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, setup = shape(), TrainingSetup(batch=2, sequence=192, compute_dtype=dtype, weight_dtype=dtype)
    facts = model_facts(config)
    monkeypatch.setattr(activations, "attention_kernel", lambda *_: "written out")
    planned = blocks_kept(facts, setup) + total(model_saved(facts, setup)) + total(loss_saved(facts, setup))
    assert planned == pytest.approx(kept_by_autograd(config, setup, rank=0, targets=(), math=True), rel=0.02)


def test_the_cpu_takes_the_fused_kernel_for_every_case() -> None:
    """A kernel that writes the scores out would save batch x heads x S x S numbers: the hooks would see them."""
    config, setup = shape(num_hidden_layers=1), TrainingSetup(batch=1, sequence=1024)
    scores = config.num_attention_heads * setup.sequence**2 * 4
    fused = kept_by_autograd(config, setup, rank=0, targets=(), math=False)
    assert kept_by_autograd(config, setup, rank=0, targets=(), math=True) > fused + scores


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp32", "qwen3", "bf16 O1", "bf16 O2", "mistral, short window", "tied, equal heads"])
def test_formula_on_cuda(name: str) -> None:
    config, setup, rank, targets = CASES[name]
    setup = replace(setup, device="cuda")
    with torch.device("cuda"):
        facts = model_facts(config, lora_rank=rank, lora_targets=targets)
        planned = blocks_kept(facts, setup) + total(model_saved(facts, setup)) + total(loss_saved(facts, setup))
        measured = kept_by_autograd(config, setup, rank=rank, targets=targets, math=False)
    assert planned == pytest.approx(measured, rel=0.03)
