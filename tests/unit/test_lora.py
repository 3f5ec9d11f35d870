"""Options of adapters, LoRA+'s two learning rates, and fresh values that do not depend on how a model is shared out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.adapters.lora_linear import LoRALinear
from arriero.adapters.part_dropout import part_dropout
from arriero.adapters.prefix import Prefix, PrefixConfig, apply_prefix
from arriero.config.adapter import AdapterOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OPTIMIZERS
from arriero.config.parser import parse
from arriero.errors import ConfigError, FormatError
from arriero.formats.parts import Placement
from arriero.formats.peft import PeftLoraConfig
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.tensor_split import cut_of
from arriero.parallel.tensor import TensorParallel, apply_tensor_parallel
from arriero.quantization.linear import quantize_layers
from arriero.quantization.schemes import Nf4Weights
from arriero.training.methods.lora import with_fresh_adapter
from arriero.training.optimizer import Optimizer

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def options(argv: str) -> AdapterOptions:
    found: AdapterOptions = parse(
        (ModelOptions, AdapterOptions), ["--model_name_or_path", "x", *argv.split()], "arriero test"
    )[1]
    return found


@pytest.mark.parametrize(
    "argv",
    [
        "--lora_rslora --lora_dora --lora_plus_scale 16",
        "--use_rslora true --use_dora 1 --loraplus_lr_ratio 16",
        "--rslora True --lora_dora True --lora_plus_scale 16",
    ],
)
def test_names_of_other_tools(argv: str) -> None:
    found = options(f"--lora {argv}")
    assert (found.lora_rslora, found.lora_dora, found.lora_plus_scale) == (True, True, 16.0)


@pytest.mark.parametrize("argv", ["--lora_init pissa", "--init_lora_weights pissa", "--pissa True"])
def test_names_of_pissa(argv: str) -> None:
    assert options(f"--lora {argv}").lora_init == "pissa"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--lora --pissa --lora_dora", "do not go together"),
        ("--lora --lora_alpha 0", "--lora_alpha"),
        ("--lora --lora_rank 0", "--lora_rank"),
        ("--lora --lora_plus_scale 0", "--lora_plus_scale"),
        ("--lora --lora_init olora", "--lora_init"),
    ],
)
def test_impossible_options(argv: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        options(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lora_rank 4", "lora_dora", "lora_rslora", "lora_init pissa", "pissa"])
def test_a_stored_adapter_keeps_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options(f"--model_name_or_path m --lora_path a --{name}")
    assert f"--{name.split()[0]} has no effect with --lora_path" in capsys.readouterr().err


def test_what_a_stored_adapter_says_too_is_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that goes on with an adapter writes the adapter's values into its config.yaml, which is fed back."""
    stored = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"], "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    argv = f"--model_name_or_path m --lora_path {tmp_path} --lora_rank 4 --lora_dropout 0.1 --lora_dora"
    options(f"{argv} --lora_alpha 32 --lora_target_modules q_proj v_proj")
    assert "no effect" not in capsys.readouterr().err
    options(f"{argv} --lora_alpha 16 --lora_target_modules q_proj")
    warned = capsys.readouterr().err
    assert warned.count("no effect") == 2
    assert "--lora_alpha" in warned
    assert "--lora_target_modules" in warned


def test_bad_configurations() -> None:
    for bad in ({"alpha": 0.0}, {"alpha": float("nan")}, {"plus_scale": 0.0}, {"rank_pattern": {"q_proj": 0}}):
        with pytest.raises(ConfigError):
            LoRAConfig(**bad)  # type: ignore[arg-type]


def small_model(config: LoRAConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE))
    apply_lora(model, config)
    return model


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    for number, parameter in enumerate(parameters.values()):
        generator = torch.Generator().manual_seed(100 * step + number)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_plus_is_adamw_with_two_groups() -> None:
    model, other = (small_model(LoRAConfig(rank=4, plus_scale=16.0)) for _ in range(2))
    optimizer = Optimizer(model, weight_decay=0.1)
    tensors, expected = trained(model), trained(other)
    of_b = {name for name in expected if ".lora_B." in name}
    assert 0 < len(of_b) < len(expected)
    groups = [
        {"params": [p for name, p in expected.items() if (name in of_b) == is_b], "lr": rate}
        for is_b, rate in ((False, 1e-3), (True, 1.6e-2))
    ]
    truth = torch.optim.AdamW(groups, weight_decay=0.1)
    for step in range(4):
        give_gradients(tensors, step)
        give_gradients(expected, step)
        optimizer.step(1e-3)
        truth.step()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lora_plus_with_every_optimizer(name: str) -> None:
    """A and B each move as in a run of the usual rule at their own rate; a checkpoint of it goes on exactly."""
    models = [small_model(LoRAConfig(rank=4, plus_scale=scale)) for scale in (8.0, 1.0, 1.0, 8.0)]
    optimizers = [Optimizer(model, name=name, weight_decay=0.1) for model in models]
    rates = (1e-3, 1e-3, 8e-3, 1e-3)
    for step in range(2):
        for model, optimizer, rate in list(zip(models, optimizers, rates, strict=True))[:3]:
            give_gradients(trained(model), step)
            optimizer.step(rate)
    plus, slow, fast, resumed = (trained(model) for model in models)
    for key, tensor in plus.items():
        assert torch.equal(tensor, (fast if ".lora_B." in key else slow)[key]), key
    models[3].load_state_dict(models[0].state_dict())
    optimizers[3].load({key: part.tensor.clone() for key, part in optimizers[0].parts().items()})
    for tensors, optimizer in ((plus, optimizers[0]), (resumed, optimizers[3])):
        give_gradients(tensors, 2)
        optimizer.step(1e-3)
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in plus.items())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", ["plain", "dora", "pissa"])
def test_fresh_values_are_those_of_one_process(kind: str, quantized: bool) -> None:
    config = LoRAConfig(rank=3, use_dora=kind == "dora", pissa=kind == "pissa")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE))
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE))
    if quantized:
        for each in (model, empty):
            quantize_layers(each, lambda name, _: Nf4Weights(16) if name.endswith("_proj") else None)
    stored = dict(model.named_parameters())

    def base(name: str, where: Placement) -> Tensor:
        return stored[name].detach()[where.box]

    apply_lora(model, config, seed=6)
    apply_lora(empty, config, seed=6)
    values = with_fresh_adapter(base, empty, config, 6, CPU)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        assert torch.equal(values(name, Placement.whole(shape)), parameter), name
        if ".lora_" not in name:
            continue
        for rank in range(2):  # what each of two tensor-parallel processes gets
            cut = cut_of(name, shape, model.config, 2, rank)
            offset, size = [0] * len(shape), list(shape)
            if cut.dim is not None:
                offset[cut.dim], size[cut.dim] = cut.start, cut.size
            box = Placement(shape, tuple(offset), tuple(size))
            assert torch.equal(values(name, box), parameter.detach()[box.box]), name


def test_parts_of_shared_out_inputs_are_dropped_independently() -> None:
    """And what every process has is dropped alike: they go on drawing alike."""
    shape = {**SHAPE, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1}
    answers: dict[str, list[Tensor]] = {"o_proj": [], "q_proj": [], "prefix": []}
    for rank in (0, 1):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig.from_dict(shape))
            apply_lora(model, LoRAConfig(rank=2, dropout=0.5, target_modules=("q_proj", "o_proj")))
            apply_prefix(model, PrefixConfig(length=8, dropout=0.5))
            apply_tensor_parallel(model, TensorParallel(None, rank, 2, split=False))  # type: ignore[arg-type]
        attention = model.train().model.layers.get_submodule("0.self_attn")
        prefix = attention.get_submodule("prefix")
        torch.manual_seed(5)
        for name in ("o_proj", "q_proj"):
            layer = attention.get_submodule(name)
            assert isinstance(layer, LoRALinear)
            answers[name].append(layer.dropped(torch.ones(9, 16)))
        assert isinstance(prefix, Prefix)
        assert prefix.part == (0, 1), "both processes hold the one head"
        prefix.key, prefix.value = (nn.Parameter(torch.ones(8, 8)) for _ in range(2))
        answers["prefix"].append(prefix()[0])
    assert not torch.equal(*answers["o_proj"])
    assert torch.equal(*answers["q_proj"])
    assert torch.equal(*answers["prefix"])
    kept = {*part_dropout(torch.ones(64), 0.5, (1, 3)).tolist()}
    assert kept == {0.0, 2.0}


def test_tensor_parallel_cuts_follow_the_layer() -> None:
    config = LlamaConfig.from_dict(SHAPE)
    for layer, rows in (("self_attn.q_proj", True), ("mlp.down_proj", False)):
        name = f"model.layers.0.{layer}"
        for part in ("", "0"):
            assert cut_of(f"{name}.lora_A{part}.weight", (3, 32), config, 2, 1).dim == (None if rows else 1)
            assert cut_of(f"{name}.lora_B{part}.weight", (32, 3), config, 2, 1).dim == (0 if rows else None)
        assert cut_of(f"{name}.lora_magnitude_vector", (32,), config, 2, 1).dim == (0 if rows else None)


@pytest.mark.parametrize(("key", "value"), [("fan_in_fan_out", "\u00e9\n"), ("a\nkey", [1, "\n"])])
def test_what_a_configuration_says_is_told_in_one_line(key: str, value: Any) -> None:
    stored = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], key: value}
    with pytest.raises(FormatError, match="which is not supported; only LoRA and DoRA are") as told:
        PeftLoraConfig.from_dict(stored, "adapter_config.json")
    assert str(told.value).splitlines() == [str(told.value)]
