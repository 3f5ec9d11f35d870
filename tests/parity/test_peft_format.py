"""LoRA adapters: PEFT reads what we write, we read what PEFT writes, and the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from arriero.adapters.lora import LoRAConfig, apply_lora  # noqa: E402
from arriero.errors import ConfigError, FormatError  # noqa: E402
from arriero.formats.module_patterns import is_pattern  # noqa: E402
from arriero.formats.peft import (  # noqa: E402
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PeftLoraConfig,
    load_adapter,
    save_adapter,
)
from arriero.models.config import LlamaConfig  # noqa: E402
from arriero.models.llama import LlamaForCausalLM  # noqa: E402


def base(bias: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def theirs(bias: str = "none", **changes: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 10, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", bias=bias, **(settings | changes))
    model = peft.get_peft_model(base(bias != "none"), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if "lora" in name else 0.1))
    return model.eval()


IDS = torch.arange(20)[None] * 3


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_reads_what_peft_writes_and_back(tmp_path: Path, bias: str) -> None:
    model = theirs(bias)
    model.save_pretrained(tmp_path / "theirs")
    config, state = load_adapter(tmp_path / "theirs")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 10, 0.1, bias)
    assert set(config.target_modules) == {"q_proj", "down_proj"}
    trained = {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert state.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in state.items())

    save_adapter(tmp_path / "ours", state, config)
    assert (
        load_file(tmp_path / "ours" / ADAPTER_WEIGHTS).keys() == load_file(tmp_path / "theirs" / ADAPTER_WEIGHTS).keys()
    )
    loaded = peft.PeftModel.from_pretrained(base(bias != "none"), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert (model(IDS).logits - base(bias != "none")(IDS).logits).abs().max() > 0.01


@pytest.mark.parametrize(
    "changes",
    [{"use_rslora": True}, {"target_modules": r".*\.(q|v)_proj"}, {"target_modules": "all-linear"}, {"lora_alpha": 3}],
    ids=["rslora", "pattern", "all-linear", "alpha"],
)
def test_peft_computes_the_same_from_our_copy(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = theirs(**changes)
    model.save_pretrained(tmp_path / "theirs")
    config, state = load_adapter(tmp_path / "theirs")
    save_adapter(tmp_path / "ours", state, config)
    assert load_adapter(tmp_path / "ours")[0] == config
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_fresh_configuration_is_read_by_peft(tmp_path: Path) -> None:
    _, state = saved(tmp_path)
    save_adapter(tmp_path / "b", state, PeftLoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj")))
    config = peft.LoraConfig.from_pretrained(tmp_path / "b")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias, config.use_rslora) == (
        4,
        8,
        0.0,
        "none",
        False,
    )
    assert config.target_modules == {"q_proj", "down_proj"}
    assert config.task_type == "CAUSAL_LM"


def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    theirs().save_pretrained(tmp_path / "a")
    return tmp_path / "a", load_adapter(tmp_path / "a")[1]


REFUSED = {
    "not lora": ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
    "no rank": ({"r": None}, "r must be"),
    "rank 0": ({"r": 0}, "r must be"),
    "rank a text": ({"r": "8"}, "r must be"),
    "alpha a text": ({"lora_alpha": "x"}, "lora_alpha"),
    "dropout 1": ({"lora_dropout": 1.0}, "lora_dropout"),
    "no targets": ({"target_modules": None}, "target_modules"),
    "targets numbers": ({"target_modules": [1]}, "target_modules"),
    "bias": ({"bias": "some"}, "bias"),
    "rslora a text": ({"use_rslora": "yes"}, "use_rslora"),
    "dora without lengths": ({"use_dora": True}, "use_dora"),
    "another rank pattern": ({"rank_pattern": {"q_proj": 2}}, "does not fit the rank 2"),
    "too many names": ({"rank_pattern": {f"layers.{i}.q_proj": 4 for i in range(10_001)}}, "rank_pattern has 10,001"),
    "too many patterns": ({"alpha_pattern": {f"layers.({i})": 4 for i in range(501)}}, "alpha_pattern has 501"),
    "too much work": ({"alpha_pattern": {".*" * 5 + "x": 4, ".*" * 5 + "y": 4}}, "500 regular expressions"),
    "alpha pattern of texts": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
    "a later variant": ({"use_newest_trick": True}, "use_newest_trick"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_or_unsupported_configuration(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder, _ = saved(tmp_path)
    values = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(values | change))
    with pytest.raises(FormatError) as caught:
        load_adapter(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_of_every_layer_is_read_at_once(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    names = [f"^model.layers.{i}.self_attn.q_proj" for i in range(9_000)]
    values = json.loads((folder / ADAPTER_CONFIG).read_text())
    values["rank_pattern"] = dict.fromkeys(names, 4) | {r"layers\.\d+\.mlp\.(up|down)_proj": 4}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(values))
    assert load_adapter(folder)[0].rank_of("model.layers.8999.self_attn.q_proj") == 4


def test_missing_and_broken_files(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    text = (folder / ADAPTER_CONFIG).read_bytes()
    for content in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        (folder / ADAPTER_CONFIG).write_bytes(content)
        with pytest.raises(FormatError, match="adapter_config"):
            load_adapter(folder)
    (folder / ADAPTER_CONFIG).write_bytes(text)
    weights = (folder / ADAPTER_WEIGHTS).read_bytes()
    (folder / ADAPTER_WEIGHTS).write_bytes(weights[:-10])
    with pytest.raises(FormatError, match="safetensors"):
        load_adapter(folder)
    (folder / ADAPTER_WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FormatError, match="never opened"):
        load_adapter(folder)
    with pytest.raises(FormatError, match="adapter_config"):
        load_adapter(tmp_path / "nowhere")


def test_tensors_that_belong_to_no_adapter(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    state = load_file(folder / ADAPTER_WEIGHTS)
    first = next(name for name in state if "lora_A" in name)
    changes: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**state, "other.lora_A.weight": torch.zeros(4, 2)}, "does not start"),
        ({**state, "base_model.model.lm_head.weight": torch.zeros(4, 2)}, "neither a LoRA"),
        ({**state, first: torch.zeros(5, 32)}, "rank 4"),
        ({**state, first: torch.zeros(4, 32, dtype=torch.int8)}, "int8"),
        ({name: tensor for name, tensor in state.items() if name != first}, "no lora_A"),
    ]
    for content, words in changes:
        save_file(content, folder / ADAPTER_WEIGHTS)
        with pytest.raises(FormatError, match=words):
            load_adapter(folder)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no LoRA tensors"):
        save_adapter(tmp_path / "x", {"a.weight": torch.zeros(1)}, PeftLoraConfig(target_modules=("a",)))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("pattern", "valid"),
    [
        (r"model\.layers\.\d+\.self_attn\.(q|k)_proj", True),
        (r".*\.(q_proj|v_proj)", True),
        ("([a-z_.0-9]+)+X", False),  # twice as long for each character of a name
        ("(a|aa)*b", False),
        (".*" * 6, False),
        (".?" * 40 + "x", False),  # twice as long for each
        (r"(.|\w)" * 24 + "x", False),
        (r"([qk]|[kv])" * 24 + "x", False),
        ("(a|b)" * 24 + "x", True),
        ("(?i:(a|A))" * 24 + "x", False),
        ("(a|ab?)" * 24 + "x", False),
        ("(" + "|".join(["."] * 100) + ")" + "x", False),
        ("a{(.*.*.*.*.*.*)}", False),  # a brace that repeats nothing
        (r"[(|\])]*x(?:y|[)]z)", True),
        (r"(?x:a|a )b", False),  # another language
        (r"(?#", False),
        (r"^(?!.*head).*$", True),
        (r"model.layers.(\d+).self_attn.(q|v)_proj", True),
        (r".*\.(q|k|v)_proj$", True),
        (r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", True),  # of PEFT's help
        (
            rf"model\.layers\.({'|'.join(map(str, range(32)))})\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
            True,
        ),
        ("|".join(f"model.layers.{i}.self_attn.q_proj" for i in range(40)), True),
        (r"(?:.*?q_proj|.*?k_proj|.*?v_proj|.*?o_proj)", True),
        (  # as Unsloth writes it
            r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
            r"(?:k_proj|q_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
            r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
            r"(?:(?:k_proj|q_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
            True,
        ),
        ("(?i)q_proj", False),  # valid alone, but not where it is put
        ("a)|(b", False),
        ("(", False),
    ],
)
def test_expressions_of_a_file_that_could_take_for_ever_are_refused(pattern: str, valid: bool) -> None:
    assert is_pattern(pattern) is valid


def test_a_rank_that_no_layer_can_use_is_refused_before_it_is_allocated() -> None:
    config = LlamaConfig.from_dict(
        {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "vocab_size": 32,
        }
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with pytest.raises(
        ConfigError, match=r"rank 100000000000 is more than model\.layers\.0\.self_attn\.q_proj can use"
    ):
        apply_lora(model, LoRAConfig(rank=10**11), fresh=False)
