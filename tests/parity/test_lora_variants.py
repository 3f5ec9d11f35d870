"""DoRA, PiSSA, rsLoRA, rank patterns and mixed adapters against the PEFT library: same start, same steps, same files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arriero.adapters.dora import DoRALinear
from arriero.adapters.lora import (
    LoRAConfig,
    LoRALinear,
    adapted_layers,
    adapter_state,
    apply_lora,
    load_adapter_state,
    merge_lora,
)
from arriero.adapters.lora_mix import check_mix, mix_adapters
from arriero.adapters.peft_config import from_peft, to_peft
from arriero.adapters.pissa import PiSSALinear, as_plain, start_factors
from arriero.errors import ConfigError, FormatError
from arriero.formats import peft as peft_files
from arriero.formats.parts import Placement
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes
from arriero.quantization.integers import IntegerScheme
from arriero.quantization.linear import quantize_layers
from arriero.quantization.schemes import IntegerWeights, Nf4Weights, WeightScheme
from arriero.training.weights import AdapterWeights

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from twin_models import VOCAB, their_model, twin_models  # noqa: E402

TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
IDS = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(9))


def our_base() -> LlamaForCausalLM:
    return twin_models(attention_bias=True)[0]


def their_base() -> nn.Module:
    return their_model(attention_bias=True)


def wrapped(**settings: Any) -> nn.Module:
    """PEFT's model with a fresh adapter, the same each time."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **settings}
    )
    torch.manual_seed(3)
    model: nn.Module = peft.get_peft_model(their_base(), config).eval()
    return model


def trained_tensors(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """What PEFT trains, under our names."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".base_layer", "")
        .replace("_vector.default.weight", "_vector")
        .replace(".default", ""): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }


def twins(ours: LlamaForCausalLM, theirs: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trained parameters of both by our names, after giving ours the values of PEFT's."""
    mine = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    other = trained_tensors(theirs)
    assert mine.keys() == other.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(other[name])
    return mine, other


def noise(parameters: dict[str, nn.Parameter], seed: int = 5, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(IDS)
        return found if isinstance(found, Tensor) else found.logits


def loss(model: nn.Module) -> Tensor:
    found = model(IDS)
    found = found if isinstance(found, Tensor) else found.logits
    return F.cross_entropy(found[:, :-1].reshape(-1, VOCAB), IDS[:, 1:].reshape(-1))


def same_steps(ours: nn.Module, theirs: nn.Module, mine: dict[str, Any], other: dict[str, Any], steps: int = 5) -> None:
    """Some optimizer steps of both, whose losses must stay together; drops are drawn from the same seeds."""
    optimizers = [torch.optim.AdamW(p.values(), lr=1e-2, weight_decay=0.1) for p in (mine, other)]
    ours.train()
    theirs.train()
    for step in range(steps):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(step)
            value = loss(model)
            value.backward()
            losses.append(value.item())
        assert abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[1]), step
        if step == 0:
            for name, parameter in mine.items():
                scale = float(other[name].grad.abs().max())
                assert float((parameter.grad - other[name].grad).abs().max()) <= 1e-5 * max(1.0, scale), name
        for optimizer in optimizers:
            optimizer.step()
    ours.eval()
    theirs.eval()


def ours_and_pefts(config: LoRAConfig, **settings: Any) -> tuple[LlamaForCausalLM, nn.Module]:
    ours, theirs = our_base(), wrapped(**settings)
    apply_lora(ours, config)
    return ours, theirs


# DoRA


@pytest.mark.parametrize(("dropout", "rslora"), [(0.0, False), (0.0, True), (0.3, False)])
def test_dora_trains_as_pefts(dropout: float, rslora: bool) -> None:
    config = LoRAConfig(rank=4, alpha=6.0, dropout=dropout, target_modules=TARGETS, use_dora=True, use_rslora=rslora)
    ours, theirs = ours_and_pefts(config, use_dora=True, lora_dropout=dropout, use_rslora=rslora)
    start = {name: p.detach().clone() for name, p in ours.named_parameters() if name.endswith("magnitude_vector")}
    mine, other = twins(ours, theirs)
    for name, lengths in start.items():
        torch.testing.assert_close(lengths, other[name].detach(), rtol=1e-6, atol=0)
    before = logits(ours)
    assert float((before - logits(our_base())).abs().max()) <= 1e-5, "it starts as the base"
    noise(mine)
    twins_noise = {name: parameter.detach() for name, parameter in mine.items()}
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(twins_noise[name])
    same_steps(ours, theirs, mine, other)
    assert float((logits(ours) - before).abs().max()) > 1e-2
    assert float((logits(ours) - logits(theirs)).abs().max()) <= 1e-5


def test_dora_files_go_both_ways(tmp_path: Path) -> None:
    config = LoRAConfig(rank=4, alpha=6.0, target_modules=TARGETS, use_dora=True, bias="lora_only")
    ours = our_base()
    apply_lora(ours, config)
    noise({name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad})
    peft_files.save_adapter(tmp_path / "ours", adapter_state(ours), to_peft(config, "base"))
    theirs = peft.PeftModel.from_pretrained(their_base(), str(tmp_path / "ours")).eval()
    assert float((logits(ours) - logits(theirs)).abs().max()) <= 1e-5
    theirs.save_pretrained(str(tmp_path / "theirs"))
    stored, state = peft_files.load_adapter(tmp_path / "theirs")
    assert from_peft(stored).use_dora
    again = our_base()
    apply_lora(again, from_peft(stored), fresh=False)
    load_adapter_state(again, state)
    assert torch.equal(logits(again), logits(ours))


def test_dora_norm_is_a_constant_in_the_backward_pass() -> None:
    torch.manual_seed(0)
    base = nn.Linear(7, 5, dtype=torch.float64)
    layer = DoRALinear(base, LoRAConfig(rank=3, alpha=4.0, use_dora=True))
    for parameter in (layer.lora_B.weight, layer.lora_magnitude_vector):
        nn.init.normal_(parameter)
    x, upstream = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    layer(x).backward(upstream)
    a, b, m = (
        p.detach().clone().requires_grad_()
        for p in (layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    )
    v = base.weight.detach() + 4.0 / 3.0 * b @ a  # equation 5, written out
    y = F.linear(x, (m / v.detach().norm(dim=1))[:, None] * v, base.bias.detach())
    y.backward(upstream)
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)
    mine = (layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    for parameter, other in zip(mine, (a, b, m), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-12)


# PiSSA


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_and_trains_as_pefts(rslora: bool, tmp_path: Path) -> None:
    config = LoRAConfig(rank=4, alpha=6.0, target_modules=TARGETS, pissa=True, use_rslora=rslora)
    ours, theirs = ours_and_pefts(config, init_lora_weights="pissa", use_rslora=rslora)
    before = logits(ours)
    assert float((before - logits(our_base())).abs().max()) <= 1e-5, "it starts as the base"
    mine = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    other = trained_tensors(theirs)
    assert mine.keys() == other.keys()
    for name, parameter in mine.items():  # the very same start
        torch.testing.assert_close(parameter, other[name], rtol=1e-5, atol=1e-6)
    same_steps(ours, theirs, mine, other)
    assert float((logits(ours) - before).abs().max()) > 1e-2
    assert float((logits(ours) - logits(theirs)).abs().max()) <= 1e-5
    # PEFT, which needs no singular values for it, reads our file on the plain base
    peft_files.save_adapter(tmp_path / "ours", adapter_state(ours), to_peft(config, "base"))
    plain = peft.PeftModel.from_pretrained(their_base(), str(tmp_path / "ours")).eval()
    assert float((logits(ours) - logits(plain)).abs().max()) <= 1e-5
    stored, state = peft_files.load_adapter(tmp_path / "ours")
    assert stored.r == 8
    assert from_peft(stored).scaling == pytest.approx(config.scaling)
    again = our_base()
    apply_lora(again, from_peft(stored), fresh=False)
    load_adapter_state(again, state)
    assert float((logits(again) - logits(ours)).abs().max()) <= 1e-5


def test_pissa_resumes_exactly(tmp_path: Path) -> None:
    config = LoRAConfig(rank=3, alpha=6.0, target_modules=TARGETS, pissa=True)
    ours = our_base()
    apply_lora(ours, config)
    noise({name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad})
    store = AdapterWeights(ours, config, "base")
    store.write(tmp_path / "checkpoint", store.parts(), Processes())
    other = our_base()
    apply_lora(other, config)
    assert float((logits(other) - logits(ours)).abs().max()) > 1e-2
    AdapterWeights(other, config, "base").load(tmp_path / "checkpoint")
    for (name, mine), (_, read) in zip(ours.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine, read), name
    with pytest.raises(FormatError, match="lora_alpha"):
        AdapterWeights(other, LoRAConfig(rank=3, alpha=7.0, target_modules=TARGETS, pissa=True), "base").load(
            tmp_path / "checkpoint"
        )


def test_any_box_of_a_pissa_checkpoint_is_read(tmp_path: Path) -> None:
    config = LoRAConfig(rank=3, alpha=6.0, target_modules=("o_proj",), pissa=True)
    ours = our_base()
    apply_lora(ours, config)
    noise({name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad})
    peft_files.save_adapter(tmp_path / "a", adapter_state(ours), to_peft(config, "base"))
    whole = {name: tensor for name, tensor in adapter_state(ours).items() if ".lora_" in name}
    for dim in (0, 1):
        for first in (True, False):
            boxes = {}
            for name, tensor in whole.items():
                cut = tensor.shape[dim] // 2
                offset, size = [0, 0], list(tensor.shape)
                offset[dim], size[dim] = (0, cut) if first else (cut, tensor.shape[dim] - cut)
                boxes[name] = Placement(tuple(tensor.shape), tuple(offset), tuple(size))
            found = peft_files.load_adapter_parts(tmp_path / "a", boxes)
            assert all(torch.equal(found[name], whole[name][where.box]) for name, where in boxes.items())


def test_pissa_start_is_the_best_approximation_of_its_rank() -> None:
    weight = torch.randn(9, 13, generator=torch.Generator().manual_seed(1))
    a, b = start_factors(weight, 4, 1.5)
    rest = torch.linalg.svdvals(weight)[4:]  # Eckart-Young: what is left has the other singular values
    torch.testing.assert_close(torch.linalg.svdvals(weight - 1.5 * b @ a)[: len(rest)], rest)
    with pytest.raises(ConfigError, match="singular values"):
        PiSSALinear(nn.Linear(4, 9), LoRAConfig(rank=5, pissa=True))
    with pytest.raises(ConfigError, match="do not go together"):
        LoRAConfig(pissa=True, use_dora=True)


# Merging and mixing

VARIANTS = {
    "dora": LoRAConfig(rank=4, alpha=6.0, target_modules=TARGETS, use_dora=True),
    "pissa": LoRAConfig(rank=4, alpha=6.0, target_modules=TARGETS, pissa=True, use_rslora=True),
    "patterns": LoRAConfig(rank=4, alpha=6.0, target_modules=TARGETS, rank_pattern={r"1\.mlp\..*": 2}),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_merged_equals_adapter(config: LoRAConfig) -> None:
    ours = our_base()
    apply_lora(ours, config)
    noise({name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad})
    before = logits(ours)
    merge_lora(ours)
    assert float((before - logits(ours)).abs().max()) <= 1e-5
    assert not list(adapted_layers(ours))
    assert set(ours.state_dict()) == set(our_base().state_dict())


def test_patterns_of_ranks_and_alphas_are_pefts(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"v_proj": 11, "q_": 3},
    }
    theirs = wrapped(**patterns)
    noise(trained_tensors(theirs))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    stored, state = peft_files.load_adapter(tmp_path / "theirs")
    ours = our_base()
    apply_lora(ours, from_peft(stored), fresh=False)
    load_adapter_state(ours, state)
    layers = dict(adapted_layers(ours))
    assert layers["model.layers.1.mlp.down_proj"].lora_A.weight.shape[0] == 6
    assert layers["model.layers.0.self_attn.v_proj"].scaling == 11 / 4
    assert float((logits(ours) - logits(theirs)).abs().max()) <= 1e-5
    peft_files.save_adapter(tmp_path / "ours", adapter_state(ours), to_peft(from_peft(stored), "base"))
    again = peft.PeftModel.from_pretrained(their_base(), str(tmp_path / "ours")).eval()
    assert float((logits(again) - logits(theirs)).abs().max()) <= 1e-6


def test_mixed_adapters_equal_pefts_cat(tmp_path: Path) -> None:
    theirs = wrapped()
    noise(trained_tensors(theirs))
    second = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "up_proj"])
    theirs.add_adapter("second", second)
    theirs.set_adapter("second")
    noise({name: p for name, p in theirs.named_parameters() if ".second." in name}, seed=8)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    theirs.add_weighted_adapter(["default", "second"], [0.7, -0.3], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    folders = [tmp_path / "theirs", tmp_path / "theirs" / "second"]
    adapters = [(from_peft(stored), state) for stored, state in map(peft_files.load_adapter, folders)]
    config, state = mix_adapters(adapters, [0.7, -0.3])
    check_mix((config, state), adapters, [0.7, -0.3])
    ours = our_base()
    apply_lora(ours, config, fresh=False)
    load_adapter_state(ours, state)
    assert float((logits(ours) - logits(theirs)).abs().max()) <= 1e-5
    peft_files.save_adapter(tmp_path / "sum", state, to_peft(config, "base"))
    again = peft.PeftModel.from_pretrained(their_base(), str(tmp_path / "sum")).eval()
    assert float((logits(again) - logits(theirs)).abs().max()) <= 1e-5
    broken = {name: tensor * 1.01 if "lora_B" in name else tensor for name, tensor in state.items()}
    with pytest.raises(FormatError, match="differs"):
        check_mix((config, broken), adapters, [0.7, -0.3])


def test_what_cannot_be_mixed_is_refused() -> None:
    def adapter(**changes: Any) -> tuple[LoRAConfig, dict[str, Tensor]]:
        ours = our_base()
        config = LoRAConfig(**{"rank": 2, "target_modules": ("q_proj",), **changes})
        apply_lora(ours, config)
        return config, adapter_state(ours)

    plain = adapter()
    with pytest.raises(ConfigError, match="1 numbers for 2"):
        mix_adapters([plain, plain], [1.0])
    with pytest.raises(ConfigError, match="adapter 2 is a DoRA"):
        mix_adapters([plain, adapter(use_dora=True)], [1.0, 1.0])
    with pytest.raises(ConfigError, match="trained biases"):
        mix_adapters([adapter(bias="lora_only")], [0.5])
    other = {name: torch.zeros(2, 5) if "lora_A" in name else tensor for name, tensor in plain[1].items()}
    with pytest.raises(ConfigError, match="different models"):
        mix_adapters([plain, (plain[0], other)], [1.0, 1.0])


# Quantized bases

SCHEMES: dict[str, WeightScheme] = {
    "int8": IntegerWeights(IntegerScheme(8, None)),
    "int4": IntegerWeights(IntegerScheme(4, 16), packed=True),
    "nf4": Nf4Weights(16),
}


@pytest.mark.parametrize("kind", ["plain", "dora", "pissa"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_on_a_quantized_base(scheme: WeightScheme, kind: str) -> None:
    """An adapter on quantized layers computes and trains as on plain layers with the dequantized weights."""
    config = LoRAConfig(rank=3, alpha=6.0, target_modules=TARGETS, use_dora=kind == "dora", pissa=kind == "pissa")
    small, plain = our_base(), our_base()
    layers = quantize_layers(small, lambda name, _: scheme if name.endswith("_proj") else None)
    with torch.no_grad():
        for name, layer in layers.items():
            plain.get_submodule(name).weight.copy_(layer.dequantized(torch.float32))  # type: ignore[union-attr, operator]
    parameters = []
    for model in (small, plain):
        apply_lora(model, config, seed=4)
        model.train()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        noise(trained)
        parameters.append(trained)
        loss(model).backward()
    assert parameters[0].keys() == parameters[1].keys()
    assert all(isinstance(layer, LoRALinear) and layer.scheme is scheme for _, layer in adapted_layers(small))
    assert float((logits(small) - logits(plain)).abs().max()) <= 1e-5
    for name, parameter in parameters[0].items():
        torch.testing.assert_close(parameter.grad, parameters[1][name].grad, rtol=1e-4, atol=1e-6)
    stored = {name: p.dtype for name, p in small.named_parameters() if not p.is_floating_point()}
    small.to(torch.float64)
    assert stored
    assert all(dict(small.named_parameters())[name].dtype == dtype for name, dtype in stored.items())
    merged = merge_lora(plain), merge_lora(small.float())
    assert merged[0].state_dict().keys() == merged[1].state_dict().keys()  # the layers without adapters too
    assert float((logits(merged[0]) - logits(merged[1])).abs().max()) <= 1e-5


# Files that are wrong


def saved(folder: Path, edit: Callable[[dict[str, Tensor]], None], **settings: Any) -> Path:
    from safetensors.torch import load_file, save_file

    config = LoRAConfig(rank=2, target_modules=("q_proj",), use_dora=True)
    ours = our_base()
    apply_lora(ours, config)
    peft_files.save_adapter(folder, adapter_state(ours), to_peft(config, "base"))
    tensors = load_file(folder / peft_files.ADAPTER_WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / peft_files.ADAPTER_WEIGHTS)
    values = json.loads((folder / peft_files.ADAPTER_CONFIG).read_text())
    (folder / peft_files.ADAPTER_CONFIG).write_text(json.dumps(values | settings))
    return folder


def test_broken_dora_files(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    cases: list[tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = [
        (lambda tensors: tensors.pop(name), {}, "has no lora_magnitude_vector"),
        (lambda tensors: tensors.update({name: torch.ones(3)}), {}, r"shape \[3\], \[32\] is needed"),
        (lambda tensors: None, {"use_dora": False}, "has a lora_magnitude_vector"),
        (lambda tensors: None, {"rank_pattern": {"q_proj": 0}}, "rank_pattern must"),
        (lambda tensors: None, {"rank_pattern": {"(": 2}}, "rank_pattern must"),
        (lambda tensors: None, {"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern must"),
        (lambda tensors: None, {"target_modules": "("}, "not a regular expression"),
        (lambda tensors: None, {"lora_alpha": 0}, "above 0"),
    ]
    for number, (edit, settings, words) in enumerate(cases):
        with pytest.raises(FormatError, match=words):
            peft_files.load_adapter(saved(tmp_path / str(number), edit, **settings))


def test_all_that_does_not_fit_is_counted() -> None:
    ours = our_base()
    apply_lora(ours, LoRAConfig(rank=2, target_modules=TARGETS))
    state = {
        name.replace("layers.1", "layers.7"): torch.zeros(2, 5) if ".0.self_attn.q_proj.lora_A" in name else tensor
        for name, tensor in adapter_state(ours).items()
    }
    with pytest.raises(FormatError) as caught:
        load_adapter_state(ours, state)
    message = str(caught.value)
    assert "q_proj.lora_A.weight is (2, 5), the model needs (2, 32)" in message
    assert "layers.7" in message
    assert "and 18 more" in message  # 1 shape, 10 unknown, 10 missing; 3 named
    assert "\n" not in message


def test_as_plain_keeps_the_scaling() -> None:
    for rslora in (False, True):
        config = LoRAConfig(rank=3, alpha=5.0, pissa=True, use_rslora=rslora)
        assert as_plain(config).scaling == pytest.approx(config.scaling)
        assert as_plain(config).rank == 6
    assert as_plain(LoRAConfig()) == LoRAConfig()
