"""The planned memory against the peak of real training steps, and the plan's arithmetic against closed forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.config.adapter import LINEAR_LAYERS
from arriero.config.layout import Layout
from arriero.errors import ConfigError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.presets import find_preset
from arriero.quantization.linear import linear_layers
from arriero.training import flops
from arriero.training.optimizer import Optimizer
from arriero.training.planning.fitting import largest, largest_batch, levers, longest_sequence
from arriero.training.planning.machine import find_gpu, find_machine
from arriero.training.planning.memory import HOST_IMPORTS, training_memory
from arriero.training.planning.pipeline import distinct_shares
from arriero.training.planning.setup import ITEM_BYTES, Method, TrainingSetup, model_facts
from arriero.training.planning.speed import training_speed
from arriero.training.planning.state import held_by, optimizer_bytes

SOURCE = Path(__file__).parents[2] / "src"
MIB = 2**20

# Real steps in a process of their own; prints how far its resident memory rose above what the imports took.
STEPS = """
import json, sys
import torch
import torch._dynamo  # the first step of torch's optimizers imports it
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.activation_checkpointing import apply_activation_checkpointing
from arriero.training.loss import linear_cross_entropy
from arriero.training import flops
from arriero.training.optimizer import Optimizer
from arriero.training.planning.setup import Method
from arriero.training.precision import Precision

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

torch.set_num_threads(1)
shape, setup, method = json.loads(sys.argv[1])
before = status("VmRSS")
model = LlamaForCausalLM(LlamaConfig(**shape))
model.init_weights()
level = "O2" if setup["weight_dtype"] == setup["compute_dtype"] else "O1"
precision = Precision(getattr(torch, setup["compute_dtype"]), level, torch.device("cpu"))
model.to(precision.parameter_dtype)
Method(**method | {"lora_targets": tuple(method["lora_targets"])}).apply(model)
if setup["recompute"] != "none":
    apply_activation_checkpointing(model.model.layers, setup["recompute"])
optimizer = Optimizer(model, name=setup["optimizer"].split()[0], sgd_momentum=0.9)
ids = torch.randint(0, shape["vocab_size"], (setup["batch"], setup["sequence"]))
for _ in range(2):
    for _ in range(setup["accumulation"]):
        with precision.context():
            loss = linear_cross_entropy(model.hidden_states(ids), model.lm_head.weight, ids).loss / ids.numel()
        precision.backward(loss)
        optimizer.collect_gradients()
    precision.unscale(optimizer)
    optimizer.clip(1.0, optimizer.squared_norm() ** 0.5)
    optimizer.step(1e-4)
    precision.update()
    optimizer.zero_grad()
print(status("VmHWM") - before)
"""


def shape(hidden: int, layers: int, vocab: int, heads: int, key_heads: int, *, tied: bool = False) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": tied,
    }


def measured_peak(values: dict[str, Any], setup: TrainingSetup, method: Method) -> int:
    fields = ("batch", "sequence", "accumulation", "compute_dtype", "weight_dtype", "recompute", "optimizer")
    chosen = {name: getattr(setup, name) for name in fields}
    # glibc's heap keeps and splinters what is freed: every larger block on its own shows what is really held
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEPS, json.dumps([values, chosen, asdict(method)])]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


SMALL = shape(384, 8, 4096, 6, 2)
RUNS: dict[str, tuple[dict[str, Any], TrainingSetup]] = {
    "fp32, 16M": (SMALL, TrainingSetup(batch=2, sequence=512)),
    "accumulation": (SMALL, TrainingSetup(batch=2, sequence=256, accumulation=2)),
    "large vocabulary, tied, 36M": (shape(512, 6, 32000, 8, 8, tied=True), TrainingSetup(batch=1, sequence=256)),
    "three chunks of logits": (shape(128, 2, 32000, 2, 2), TrainingSetup(batch=1, sequence=2400)),
    "weights outweigh activations": (shape(512, 6, 16000, 8, 8), TrainingSetup(batch=1, sequence=64)),
    "recompute layers": (SMALL, TrainingSetup(batch=1, sequence=512, recompute="full")),
    "recompute attention": (SMALL, TrainingSetup(batch=4, sequence=128, recompute="core_attn")),
    "bf16 O1": (SMALL, TrainingSetup(batch=2, sequence=256, compute_dtype="bfloat16")),
    "bf16 O2": (SMALL, TrainingSetup(batch=2, sequence=256, compute_dtype="bfloat16", weight_dtype="bfloat16")),
    "8-bit AdamW": (SMALL, TrainingSetup(batch=1, sequence=256, optimizer="adamw_8bit")),
    "Lion": (SMALL, TrainingSetup(batch=1, sequence=256, optimizer="lion")),
}


ADAPTER: dict[str, Any] = {"lora_rank": 8, "lora_targets": LINEAR_LAYERS}
TRAINED = {
    "QLoRA": Method(**ADAPTER, quantize_base="nf4"),
    "DoRA": Method(**ADAPTER, dora=True),
    "prefix": Method(prefix_length=32),
}
RUNS |= {name: (SMALL, TrainingSetup(batch=2, sequence=256)) for name in TRAINED}
MANY = (
    "fp32, 16M",
    "bf16 O1",
    "DoRA",
    "prefix",
    "accumulation",
    "large vocabulary, tied, 36M",
    "weights outweigh activations",
    "recompute attention",
    "Lion",
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.peers) if n in MANY else n for n in RUNS])
def test_peak_of_real_steps(name: str) -> None:
    values, setup = RUNS[name]
    method = TRAINED.get(name, Method())
    planned = training_memory(model_facts(LlamaConfig(**values), **asdict(method)), setup).peak - HOST_IMPORTS
    measured = measured_peak(values, setup, method)
    print(f"{name}: planned {planned / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB, {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=0.1)


def test_a_base_in_few_bits_is_counted_as_it_is_held() -> None:
    """nf4: half a byte and a 64th of 4 bytes a weight; arithmetic and the number of parameters stay those of whole weights."""
    config = LlamaConfig(**SMALL)
    plain, held = (model_facts(config, **ADAPTER, quantize_base=kind) for kind in (None, "nf4"))
    assert (held.total, held.trained, held.training) == (plain.total, plain.trained, plain.training)
    assert plain.total == config.num_parameters() + plain.trained
    weights = sum(rows * columns for rows, columns in linear_layers(config).values())
    kinds = [training_memory(facts, TrainingSetup()).kinds["weights"] for facts in (plain, held)]
    assert kinds[0] - kinds[1] == weights * (4 - 0.5 - 4 / 64)
    assert [lever.options for lever in levers(plain, TrainingSetup()) if "quantize" in lever.options]
    assert not [lever for lever in levers(held, TrainingSetup()) if "quantize" in lever.options]


def test_the_network_of_a_prefix_is_whole_in_every_process() -> None:
    config, setup = LlamaConfig(**SMALL), TrainingSetup(layout=Layout(dp_shard=2, tp=2, stage=3))
    facts = model_facts(config, prefix_length=8, prefix_network=64)
    network = 8 * 384 + 64 * 384 + 64  # embedding, matrix, bias
    layers = 8 * 2 * (128 * 64 + 128)  # the matrix and the bias of keys and of values of 8 layers, shared out
    assert facts.trained == network + layers
    state = held_by(facts, setup, distinct_shares(facts, setup)[0]).total
    assert state.trained_shards == network + layers / 4


@pytest.mark.parametrize("rule", ["adamw", "adamw_8bit", "muon", "lion", "sgd", "sgd with momentum"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizer_state_is_what_the_optimizer_holds(rule: str, dtype: str) -> None:
    config = LlamaConfig(**shape(96, 2, 300, 4, 2, tied=True))
    model = LlamaForCausalLM(config)
    model.init_weights()
    model.to(getattr(torch, dtype))
    optimizer = Optimizer(model, name=rule.split()[0], sgd_momentum=0.9 if "momentum" in rule else 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.collect_gradients()
    optimizer.step(1e-3)
    held = optimizer.bytes_held()
    facts, setup = model_facts(config), TrainingSetup(compute_dtype=dtype, weight_dtype=dtype, optimizer=rule)
    kinds = training_memory(facts, setup).kinds
    planned = sum(optimizer_bytes(p, rule) for p in facts.parameters)
    assert kinds.get("optimizer", 0) == planned
    assert planned + kinds.get("master weights", 0) == pytest.approx(held, abs=4 * len(facts.parameters))  # step counts


@pytest.mark.parametrize(
    ("name", "total"),
    [("llama-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("smollm2-135m", 134_515_008)],
)
def test_published_parameter_counts(name: str, total: int) -> None:
    facts = model_facts(find_preset(name).config)
    assert facts.total == facts.trained == total
    # 16 bytes a parameter of weights, gradients and AdamW in fp32 (Rajbhandari et al. 2020, section 3.1)
    kinds = training_memory(facts, TrainingSetup(batch=1, sequence=64)).kinds
    assert kinds["weights"] + kinds["gradients"] + kinds["optimizer"] == pytest.approx(16 * total, rel=1e-5)


def test_flops_are_six_a_weight_and_attention() -> None:
    config = find_preset("llama-7b").config
    facts = model_facts(config)
    speed = training_speed(facts, TrainingSetup(sequence=2048, batch=3, accumulation=2), flops=1e15, utilization=0.5)
    norms = 65 * 4096
    weights = facts.total - 32000 * 4096 - norms
    # Chowdhery et al. 2022, appendix B: 12 L H Q T for full attention; the causal half, its diagonal included
    attention = 12 * 32 * 4096 * 2049 / 2
    assert speed.training_per_token == pytest.approx(6 * weights + attention, rel=1e-12)
    assert speed.forward_per_token == pytest.approx(speed.training_per_token / 3, rel=1e-12)
    assert speed.step_tokens == 3 * 2 * 2048
    assert speed.step_seconds == pytest.approx(speed.step_tokens * speed.training_per_token / 0.5e15)
    # computed again: everything but the head
    again = training_speed(facts, TrainingSetup(sequence=2048, recompute="full"), None, 0.5)
    assert again.recomputed_per_token == pytest.approx(speed.forward_per_token - 2 * 32000 * 4096, rel=1e-12)
    assert again.step_seconds is None


def test_lora_trains_only_its_own() -> None:
    config = find_preset("llama-7b").config
    facts = model_facts(config, lora_rank=8, lora_targets=LINEAR_LAYERS)
    trained = 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert facts.trained == trained
    assert facts.total == 6_738_415_616 + trained
    half = TrainingSetup(sequence=512, compute_dtype="bfloat16", weight_dtype="bfloat16")
    kinds = training_memory(facts, half).kinds
    assert kinds["weights"] == 2 * 6_738_415_616 + 4 * trained
    assert kinds["gradients"] == 4 * trained
    assert "master weights" not in kinds


def test_sharding_divides_as_zero_does() -> None:
    """Rajbhandari et al. 2020, figure 1: with mixed precision 2 + 2 + 12 bytes a parameter.

    Here the weights are gathered from shards for the step, so that below stage 3 there are 2 / N more.
    """
    config = find_preset("llama-7b").config
    facts, count, devices = model_facts(config), 6_738_415_616, 64
    for stage, expected in ((0, 2 + 16.0), (1, 4 + 14 / 64), (2, 2 + 16 / 64), (3, 16 / 64)):
        layout = Layout(dp_shard=devices, stage=stage) if stage else Layout(dp_replicate=devices)
        setup = TrainingSetup(
            # gradients are whole below stage 2 where they add up over micro-batches, in the format of the sum
            compute_dtype="bfloat16",
            weight_dtype="bfloat16",
            layout=layout,
            device="cuda",
            accumulation=2,
            reduce_dtype="bfloat16",
        )
        kinds = training_memory(facts, setup).kinds
        gradients = kinds["gradients"] / (2 if stage >= 2 else 1)  # fp32 at the update; the paper counts the half ones
        if stage == 0:
            gradients = 2 * count  # as above
        held = kinds["weights"] + kinds["master weights"] + kinds["optimizer"] + gradients
        if stage < 3:
            held += kinds["weights gathered"]
        assert held / count == pytest.approx(expected, rel=1e-4), stage


def test_what_fits_is_the_last_that_does() -> None:
    facts = model_facts(find_preset("smollm2-135m").config)
    setup, memory = TrainingSetup(batch=2, sequence=256), 8 * 2**30
    sequence, batch = longest_sequence(facts, setup, memory), largest_batch(facts, setup, memory)
    for changes, most in (({"sequence": sequence}, True), ({"sequence": sequence + 1}, False)):
        assert (training_memory(facts, replace(setup, **changes)).peak <= memory) is most
    assert training_memory(facts, replace(setup, batch=batch)).peak <= memory
    assert training_memory(facts, replace(setup, batch=batch + 1)).peak > memory
    assert longest_sequence(facts, setup, 2**20) == 0


@pytest.mark.parametrize("answer", [0, 1, 2, 3, 7, 8, 99, 100])
def test_largest(answer: int) -> None:
    assert largest(lambda value: value <= answer, 100) == answer
    assert largest(lambda value: True, 100) == 100


def test_levers_lower_the_peak() -> None:
    facts = model_facts(find_preset("llama-7b").config)
    setup = TrainingSetup(batch=4)
    found = levers(facts, setup)
    now = training_memory(facts, setup).peak
    assert [lever.peak for lever in found] == sorted((lever.peak for lever in found), reverse=True)
    assert all(lever.peak < now for lever in found)
    assert {"--recompute", "--optim adamw_8bit", "--bf16 --fp16_opt_level O2"} <= {lever.options for lever in found}


def test_scores_are_kept_only_without_a_fused_kernel() -> None:
    grouped, equal = find_preset("llama-3-8b").config, find_preset("llama-7b").config
    fp32 = TrainingSetup(device="cuda", sequence=4096)
    scores = 32 * 32 * 4096**2 * 4  # layers, heads, S^2, fp32
    half = fp32.with_precision("bfloat16", "bfloat16")
    assert training_memory(model_facts(grouped), fp32).kinds["activations"] > scores
    assert training_memory(model_facts(grouped), half).kinds["activations"] < scores
    assert training_memory(model_facts(equal), fp32).kinds["activations"] < scores
    assert training_memory(model_facts(grouped), replace(fp32, device="cpu")).kinds["activations"] < scores


@pytest.mark.parametrize(
    ("name", "known", "size"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 80),
        ("NVIDIA H100 PCIe", "H100 PCIe", None),
        ("NVIDIA H200", "H200", None),
        ("NVIDIA A100-SXM4-40GB", "A100", 40),
        ("NVIDIA A100 80GB PCIe", "A100", 80),
        ("Tesla V100-PCIE-16GB", "V100", 16),
        ("Tesla V100-SXM2-32GB", "V100", 32),
        ("Tesla T4", "T4", None),
        ("NVIDIA L40S", "L40S", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", None),
        ("A100 40 GB", "A100", 40),
        ("h100pcie", "H100 PCIe", None),
    ],
)
def test_gpu_names_as_torch_tells_them(
    name: str, known: str, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_gpu(name) == (known, size)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    flops.peak_flops.cache_clear()
    peak, source = flops.peak_flops(torch.device("cuda"), torch.bfloat16)
    assert (peak, source) == (flops.DEVICE_PEAKS[known][1] * 1e12, f"{name} data sheet")
    flops.peak_flops.cache_clear()


@pytest.mark.parametrize(
    "name",
    ["A1000", "T400", "H1000", "A10G", "Tesla V100S-PCIE-32GB", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 NVL"]
    + ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "80GB", "NVIDIA"],
)
def test_another_gpu_is_not_taken_for_a_known_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=rf"--gpu '{name}' is not known: known are H200, .*, T4; or give --memory"):
        find_gpu(name)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "matrix_product_flops", lambda device, dtype: 1.0)
    flops.peak_flops.cache_clear()
    assert flops.peak_flops(torch.device("cuda"), torch.bfloat16) == (1.0, "measured matrix product")
    flops.peak_flops.cache_clear()


def test_gpus_by_name() -> None:
    assert find_gpu("h100") == ("H100", None)
    assert find_gpu("NVIDIA A100-SXM4-80GB") == ("A100", 80)
    assert find_gpu("rtx4090") == ("RTX 4090", None)
    assert find_gpu("NVIDIA A10") == ("A10", None)
    with pytest.raises(ConfigError, match="known are H200"):
        find_gpu("Z9")
    machine = find_machine("cuda", "bfloat16", gpu="A100", memory=None, flops=None)
    assert (machine.memory, machine.flops) == (80_000_000_000, 312e12)
    smaller = find_machine("cuda", "bfloat16", gpu="Tesla V100-PCIE-16GB", memory=None, flops=None)
    assert (smaller.memory, smaller.memory_source) == (16_000_000_000, "V100 of 16 GB")
    given = find_machine("cuda", "bfloat16", gpu="A100 40GB", memory=30, flops=None)
    assert (given.memory, given.memory_source) == (30, "given")
    assert set(ITEM_BYTES) == {"float32", "bfloat16", "float16"}
