"""Quantization-aware training: what rounds, where ranges come from, how a run is stored and converted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.adapters.qat import apply_qat, inputs_of_layers, rounding_layers, rounding_of, to_quantized
from arriero.data.batch import Batch, pack, to_common_shape
from arriero.data.order import StepOrder
from arriero.data.sft import IGNORE, Example
from arriero.data.steps import FinetuningSteps
from arriero.errors import ConfigError, FormatError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.products import Linear
from arriero.parallel.processes import Processes
from arriero.quantization.linear import QuantizedLinear
from arriero.quantization.qat import RANGES_FILE, SETTINGS_FILE, QatSettings, is_range, read_settings
from arriero.training.callbacks.activation_ranges import MOMENTUM, ActivationRanges
from arriero.training.evaluation import evaluate_loss
from arriero.training.methods.qat import exact
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.qat_weights import QatWeights
from arriero.training.schedule import Schedule
from arriero.training.trainer import Callback, StepRecord, Trainer
from arriero.training.weights import AdapterWeights, FullWeights

CPU = torch.device("cpu")
CONFIG = LlamaConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
    }
)
LAYERS = 7 * CONFIG.num_hidden_layers
KINDS = {"A8W8": QatSettings("A8W8"), "W4": QatSettings("W4", 16), "A8W4": QatSettings("A8W4", 16)}


def build(settings: QatSettings | None, *, lora: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = LlamaForCausalLM(CONFIG)
    model.init_weights(0)
    model.to(dtype)
    if lora:
        apply_lora(model, LoRAConfig(rank=3))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=generator)
    if settings is not None:
        apply_qat(model, settings)
    return model


def rows(count: int, seed: int = 3) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(
            1, 61, (int(torch.randint(4, 12, (1,), generator=generator)),), generator=generator
        ).tolist()
        made.append(Example(ids, [IGNORE, *ids[2:], IGNORE]))
    return made


def trainer_of(
    model: LlamaForCausalLM,
    settings: QatSettings,
    folder: Path,
    callbacks: list[Callback],
    steps: int = 3,
    **precision: Any,
) -> Trainer:
    weights: Any = FullWeights(model, folder)
    if any(".lora_" in name for name, _ in model.named_parameters()):
        weights = AdapterWeights(model, LoRAConfig(rank=3), "base")
    return Trainer(
        model=model,
        data=FinetuningSteps(rows(8), StepOrder(8, 2, 2, 0)),
        optimizer=Optimizer(model),
        schedule=Schedule("constant", 1e-3, 0.0, 0, steps),
        precision=Precision(precision.get("dtype", torch.float32), precision.get("level", "O1"), CPU),
        weights=QatWeights(model, exact(weights), settings),
        total_steps=steps,
        run_folder=folder,
        device=CPU,
        callbacks=[ActivationRanges(settings), *callbacks],
    )


def ranges(model: nn.Module) -> dict[str, float]:
    return {name: float(tensor.detach()) for name, tensor in model.named_parameters() if is_range(name)}


def greatest_inputs(model: LlamaForCausalLM, batches: list[Batch]) -> dict[str, float]:
    """By hooks on the layers of a plain model."""
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":

            def note(_: nn.Module, args: tuple[Tensor], key: str = f"{name}.input_range") -> None:
                seen[key] = max(seen.get(key, 0.0), float(args[0].abs().max()))

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        for batch in batches:
            model(batch.input_ids, attention=batch.attention())
    return seen


class Look(Callback):
    def __init__(self) -> None:
        self.start: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self.start = ranges(trainer.model)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.steps.append(ranges(trainer.model))


# Settings


@pytest.mark.parametrize(
    ("kind", "given", "inputs", "expected"),
    [
        ("A8W8", None, {576, 1536}, -1),
        ("W4", None, {576, 1536}, 32),
        ("A8W4", None, {64, 176}, 16),
        ("W4", None, {64, 44}, -1),
        ("W4", 64, {64}, 64),
    ],
)
def test_the_usual_group_size_fits_the_model(kind: str, given: int | None, inputs: set[int], expected: int) -> None:
    assert QatSettings.of(kind, given, "learned", inputs).group_size == expected


@pytest.mark.parametrize(
    ("settings", "parts", "words"),
    [
        (("W4", 20), 1, ("--qat_group_size 20", "32 inputs")),
        (("W4", 16), 4, ("--qat_group_size 16", "4 tensor-parallel processes", "o_proj", "8 each")),
        (("W4", 0), 1, ("--qat_group_size is 0",)),
        (("W2", -1), 1, ("--qat_type W2",)),
        (("A8W8", -1, "fixed"), 1, ("--qat_activation fixed",)),
    ],
)
def test_refuses_what_does_not_fit(settings: tuple[Any, ...], parts: int, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        apply_qat(build(None), QatSettings(*settings), column_parts=parts)
    assert all(word in str(raised.value) for word in words), raised.value


def test_rounds_the_layers_of_the_decoder_only() -> None:
    model = build(None)
    before = {name for name, _ in model.named_parameters()}
    names = apply_qat(model, KINDS["A8W8"])
    assert len(names) == LAYERS
    assert all(name.startswith("model.layers.") for name in names)
    assert {name for name, _ in model.named_parameters()} - before == {f"{name}.input_range" for name in names}
    assert type(model.lm_head) is Linear
    assert inputs_of_layers(model) == {32, 48}


@pytest.mark.parametrize(
    "config", [LoRAConfig(rank=3, use_dora=True), LoRAConfig(rank=3, pissa=True)], ids=["DoRA", "PiSSA"]
)
def test_refuses_other_adapters(config: LoRAConfig) -> None:
    model = build(None)
    apply_lora(model, config)
    with pytest.raises(ConfigError, match="plain LoRA"):
        apply_qat(model, KINDS["A8W8"])


def test_refuses_weights_that_are_rounded_already() -> None:
    model = build(KINDS["W4"])
    to_quantized(model)
    with pytest.raises(ConfigError, match="exact weights"):
        apply_qat(model, KINDS["W4"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 60_000,
        json.dumps({"kind": "A8W8", "group_size": -1}),
        json.dumps({"kind": "A8W8", "group_size": True, "ranges": "learned"}),
        json.dumps({"kind": 8, "group_size": -1, "ranges": "learned"}),
        json.dumps({"kind": "A8W3", "group_size": -1, "ranges": "learned"}),
    ],
)
def test_refuses_a_broken_settings_file(tmp_path: Path, text: str) -> None:
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(FormatError, match=SETTINGS_FILE):
        read_settings(tmp_path)


def test_settings_come_back(tmp_path: Path) -> None:
    assert read_settings(tmp_path) is None
    for settings in (*KINDS.values(), QatSettings("A8W8", 64, "moving_average")):
        (tmp_path / SETTINGS_FILE).write_text(settings.to_json())
        assert read_settings(tmp_path) == settings


# Ranges


@pytest.mark.parametrize("how", ["learned", "moving_average"])
def test_ranges_start_at_the_greatest_inputs_of_the_first_step(tmp_path: Path, how: str) -> None:
    """Those of the model without rounding, through bfloat16."""
    settings, look = QatSettings("A8W8", -1, how), Look()
    trainer = trainer_of(build(settings), settings, tmp_path, [look], steps=1)
    truth = greatest_inputs(build(None), trainer.data(0))  # type: ignore[arg-type]
    trainer.train()
    assert look.start == {name: float(torch.tensor(value).bfloat16()) for name, value in truth.items()}


def test_padding_is_not_observed() -> None:
    """A token of padding whose activations are greater than all others."""
    settings = KINDS["A8W8"]
    model = build(settings)
    model.model.embed_tokens.weight.data[0] *= 1000.0
    batches = [pack(rows(2)), pack(rows(3, seed=4)), Batch.empty()]
    padded = to_common_shape(batches, 16)
    rounding = rounding_of(model)
    assert rounding is not None
    rounding.on, rounding.observing = False, True
    first = dict(rounding_layers(model))["model.layers.0.mlp.gate_proj"]
    for mask in (True, False):
        for batch in padded:
            rounding.real = batch.real() if mask else None
            first(model.model.embed_tokens(batch.input_ids))
        alone = max(float(model.model.embed_tokens(batch.input_ids).detach().abs().max()) for batch in batches[:2])
        assert (float(first.observed) == alone) is mask  # type: ignore[arg-type]


def test_real_tokens_of_batches() -> None:
    batch = pack(rows(3))
    assert batch.real() is None
    real = batch.fitted(64).real()
    assert real is not None
    assert real.sum() == batch.row_tokens
    assert real[0, : batch.row_tokens].all()
    assert not Batch.empty().real().any()  # type: ignore[union-attr]
    alike = [Example([*range(1, 21), i], [IGNORE] * 19 + [i, IGNORE]) for i in (30, 31, 32)]
    shared = pack(alike, share_prefixes=True)
    assert shared.input_ids.numel() < shared.row_tokens
    assert shared.real() is None
    assert shared.fitted(60).real().sum() == shared.input_ids.numel()  # type: ignore[union-attr]


@pytest.mark.parametrize("recompute", [False, True])
def test_moving_averages_follow_the_greatest_of_a_step(tmp_path: Path, recompute: bool) -> None:
    """At a learning rate of zero every step sees the same model; it rounds, so the truth is observed on it."""
    from arriero.parallel.activation_checkpointing import apply_activation_checkpointing

    settings, look = QatSettings("A8W8", -1, "moving_average"), Look()
    model = build(settings)
    if recompute:
        apply_activation_checkpointing(model.model.layers)
    trainer = trainer_of(model, settings, tmp_path, [look])
    trainer.schedule = Schedule("constant", 0.0, 0.0, 0, 3)
    observed: list[dict[str, float]] = []

    class Observe(Callback):
        """Before each step's ranges change."""

        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            observed.append({f"{name}.input_range": float(layer.observed) for name, layer in rounding_layers(model)})  # type: ignore[arg-type]
            evaluate_loss(trainer.execution, [pack(rows(2, seed=9))])  # observes nothing

    trainer.callbacks.insert(0, Observe())
    trainer.train()
    expected = look.start
    for step, seen in zip(look.steps, observed, strict=True):
        expected = {name: MOMENTUM * value + (1 - MOMENTUM) * seen[name] for name, value in expected.items()}
        assert step == pytest.approx(expected, rel=1e-6)
        expected = step


def test_learned_ranges_move_and_are_kept_in_fp32_masters(tmp_path: Path) -> None:
    settings, look = KINDS["A8W8"], Look()
    model = build(settings, dtype=torch.bfloat16)
    trainer = trainer_of(model, settings, tmp_path, [look], steps=2, dtype=torch.bfloat16, level="O2")
    trainer.train()
    masters = {name: float(master) for name, master in trainer.optimizer.masters.items() if is_range(name)}
    assert masters == pytest.approx(look.start, rel=0.01)  # moved by two steps of 1e-3 at most
    assert masters != look.start  # those whose inputs are greater in the second step


# Storage


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("settings", [KINDS["A8W8"], QatSettings("A8W4", -1, "moving_average"), KINDS["W4"]], ids=str)
def test_a_run_resumes_exactly(tmp_path: Path, settings: QatSettings, lora: bool) -> None:
    from arriero.training.checkpoint import take_snapshot, write_checkpoint

    whole = Look()
    trainer = trainer_of(build(settings, lora=lora), settings, tmp_path, [whole], steps=4)

    class Save(Callback):
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            if record.step == 2:
                snapshot = take_snapshot(trainer.weights, trainer.optimizer.parts(), trainer.state, copy=False)
                write_checkpoint(tmp_path, snapshot)

    trainer.callbacks.append(Save())
    trainer.train()
    again = trainer_of(build(settings, lora=lora), settings, tmp_path, [], steps=4)
    again.resume(tmp_path / "checkpoint-2")
    again.train()
    for (name, one), (_, other) in zip(trainer.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert (tmp_path / "checkpoint-2" / RANGES_FILE).exists() == settings.rounds_inputs
    other = replace(settings, group_size=8)
    with pytest.raises(FormatError, match="groups of 8"):
        trainer_of(build(other, lora=lora), other, tmp_path, []).resume(tmp_path / "checkpoint-2")


def test_weights_beside_the_ranges_are_a_plain_model(tmp_path: Path) -> None:
    from arriero.formats import hf

    settings = KINDS["A8W8"]
    model = build(settings)
    store = QatWeights(model, exact(FullWeights(model, tmp_path)), settings)
    store.write(tmp_path / "run", store.parts(), Processes())
    read = hf.load_model(tmp_path / "run")
    own = dict(model.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in read.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_converted_layers_compute_the_same_bits(kind: str, lora: bool, dtype: torch.dtype) -> None:
    model = build(KINDS[kind], lora=lora, dtype=dtype)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    for _, layer in rounding_layers(model):
        if layer.input_range is not None:
            layer.input_range.data.fill_(1.5)  # clips
    with torch.no_grad():
        before = model(ids)
        names = to_quantized(model)
        after = model(ids)
    assert len(names) == LAYERS
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == LAYERS
    assert torch.equal(before, after)
    exact_logits = build(None, lora=lora, dtype=dtype)(ids)
    assert not torch.equal(before, exact_logits)


def test_a_compiled_layer_gives_the_same() -> None:
    torch._dynamo.reset()
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(2))
    layers = [build(KINDS["A8W8"]).model.layers[0].mlp.gate_proj for _ in range(2)]
    layers[1].compile(backend="aot_eager")
    outputs = [layer(x) for layer in layers]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().mean().backward()
    for (name, one), (_, other) in zip(*(layer.named_parameters() for layer in layers), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
