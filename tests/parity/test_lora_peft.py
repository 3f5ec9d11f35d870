"""LoRA against the PEFT library and against plain autograd: same files, same logits, same gradients."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arriero.adapters.lora import (
    LoRAConfig,
    LoRALinear,
    adapted_layers,
    adapter_state,
    apply_lora,
    check_adapter,
    load_adapter_state,
    merge_lora,
)
from arriero.adapters.lora_mix import mix_adapters
from arriero.adapters.peft_config import from_peft, to_peft
from arriero.config.adapter import AdapterOptions
from arriero.engine.request_adapters import AdapterPool
from arriero.errors import ConfigError, FormatError
from arriero.formats import hf
from arriero.formats import peft as peft_files
from arriero.models.llama import LlamaForCausalLM

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from twin_models import VOCAB, twin_models  # noqa: E402


def pair(seed: int = 0, *, biases: bool = False) -> tuple[LlamaForCausalLM, nn.Module]:
    """Our model and transformers' with the same random weights."""
    torch.manual_seed(seed)  # the adapters' first values
    return twin_models(seed, attention_bias=biases, mlp_bias=biases)


def randomise(model: nn.Module, seed: int = 5) -> None:
    """Give every trained tensor noise, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def ids(rows: int = 2, length: int = 11) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(9))


VARIANTS = {
    "plain": LoRAConfig(rank=4, alpha=8.0),
    "odd alpha": LoRAConfig(rank=3, alpha=5.5, target_modules=("q_proj", "v_proj")),
    "rslora": LoRAConfig(rank=4, alpha=8.0, use_rslora=True),
    "lora_only": LoRAConfig(rank=2, alpha=4.0, bias="lora_only", target_modules=("q_proj", "down_proj")),
    "all biases": LoRAConfig(rank=2, alpha=4.0, bias="all", target_modules=("k_proj",)),
    "pattern": LoRAConfig(rank=2, alpha=4.0, target_modules=r".*layers\.1\.mlp\.(gate|up)_proj"),
    "all-linear": LoRAConfig(rank=2, alpha=4.0, target_modules="all-linear"),
    "with head": LoRAConfig(rank=2, alpha=4.0, target_modules=("o_proj", "lm_head")),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_peft_reads_our_adapter(config: LoRAConfig, tmp_path: Path) -> None:
    ours, theirs = pair(biases=config.bias != "none")
    with torch.no_grad():
        plain = ours(ids())
    apply_lora(ours, config)
    randomise(ours)
    peft_files.save_adapter(tmp_path / "adapter", adapter_state(ours), to_peft(config, "base"))
    wrapped = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        mine, other = ours(ids()), wrapped(ids()).logits
    assert float((mine - plain).abs().max()) > 1e-3, "the adapter must change something"
    assert float((mine - other).abs().max()) <= 1e-5
    assert ours.training is False


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_pefts_adapter(bias: str, rslora: bool, tmp_path: Path) -> None:
    ours, theirs = pair(biases=True)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        lora_dropout=0.1,
        bias=bias,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj", "up_proj"],
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(theirs, config).eval()
    randomise(wrapped)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    stored, state = peft_files.load_adapter(tmp_path / "theirs")
    mine = from_peft(stored)
    assert mine.rank == 3
    assert mine.scaling == pytest.approx(7 / math.sqrt(3) if rslora else 7 / 3)
    assert mine.dropout == 0.1
    names = apply_lora(ours, mine)
    assert len(names) == 6
    load_adapter_state(ours, state)
    with torch.no_grad():
        difference = (ours(ids()) - wrapped(ids()).logits).abs().max()
    assert float(difference) <= 1e-5
    theirs_trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs_trained


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_merged_equals_adapter(config: LoRAConfig) -> None:
    ours, theirs = pair(biases=config.bias != "none")
    apply_lora(ours, config)
    randomise(ours)
    with torch.no_grad():
        before = ours(ids())
        merge_lora(ours)
        after = ours(ids())
    assert float((before - after).abs().max()) <= 1e-5
    assert not list(adapted_layers(ours))
    assert set(ours.state_dict()) == set(theirs.state_dict()), "a merged model has the names of a plain one"


def test_gradients_equal_plain_autograd_and_closed_form() -> None:
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = nn.Linear(7, 5, bias=True, dtype=torch.float64)
    config = LoRAConfig(rank=3, alpha=4.0)
    layer = LoRALinear(base, config)
    with torch.no_grad():
        layer.lora_B.weight.copy_(noise(5, 3))
    x, upstream = noise(2, 4, 7).requires_grad_(), noise(2, 4, 5)
    y = layer(x)
    y.backward(upstream)
    weights = (layer.weight, layer.bias, layer.lora_A.weight, layer.lora_B.weight)
    w, b, a_, b_ = (t.detach().clone().requires_grad_() for t in weights)
    x2 = x.detach().clone().requires_grad_()
    y2 = F.linear(x2, w, b) + (4.0 / 3.0) * (x2 @ a_.T @ b_.T)
    y2.backward(upstream)
    torch.testing.assert_close(y, y2, rtol=0, atol=1e-12)
    for mine, plain in zip((x, *weights), (x2, w, b, a_, b_), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=0, atol=1e-12)
    # dL/dB = s g^T (x A^T), worked out by hand
    flat_x, flat_g = x.detach().reshape(-1, 7), upstream.reshape(-1, 5)
    torch.testing.assert_close(layer.lora_B.weight.grad, 4.0 / 3.0 * flat_g.T @ (flat_x @ a_.detach().T))
    assert torch.autograd.gradcheck(lambda t: layer(t), (noise(3, 7).requires_grad_(),), eps=1e-6, atol=1e-7)


def test_frozen_base_gets_no_gradient() -> None:
    ours, _ = pair()
    apply_lora(ours, LoRAConfig(rank=2))
    ours(ids()).sum().backward()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_gradients_equal_pefts(bias: str, tmp_path: Path) -> None:
    ours, theirs = pair(biases=True)
    config = LoRAConfig(rank=4, alpha=8.0, bias=bias)  # type: ignore[arg-type]
    apply_lora(ours, config)
    randomise(ours)
    peft_files.save_adapter(tmp_path / "a", adapter_state(ours), to_peft(config, "base"))
    wrapped = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "a"), is_trainable=True)
    ours.train()
    wrapped.train()
    for logits in (ours(ids()), wrapped(ids()).logits):
        F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids()[:, 1:].reshape(-1)).backward()
    mine = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    other = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", ""): p.grad
        for name, p in wrapped.named_parameters()
        if p.requires_grad
    }
    assert mine.keys() == other.keys()
    assert ("model.layers.0.self_attn.q_proj.bias" in mine) == (bias != "none")
    for name, grad in mine.items():
        assert float((grad - other[name]).abs().max()) <= 1e-6, name


def test_dropout_drops_inputs_of_the_branch_only() -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 6, bias=True)
    layer = LoRALinear(base, LoRAConfig(rank=4, alpha=8.0, dropout=0.5))
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(4, 64)
    layer.train()
    torch.manual_seed(11)
    y = layer(x)
    torch.manual_seed(11)
    mask = F.dropout(torch.ones_like(x), 0.5)  # 0 or 2: the same draw as over x
    expected = F.linear(x, base.weight, base.bias) + 2.0 * ((x * mask) @ layer.lora_A.weight.T @ layer.lora_B.weight.T)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    torch.manual_seed(12)
    assert not torch.equal(layer(x), y)
    draws = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    layer.eval()
    assert float((draws - layer(x)).abs().max()) < 0.25, "the mean over draws is the layer without dropout"
    assert torch.equal(layer(x), layer(x))


def test_starts_as_the_base_model() -> None:
    ours, theirs = pair()
    apply_lora(ours, LoRAConfig())
    with torch.no_grad():
        assert float((ours(ids()) - theirs(ids()).logits).abs().max()) <= 1e-5
    for _, layer in adapted_layers(ours):
        bound = 1.0 / math.sqrt(layer.in_features)  # Kaiming uniform with a = sqrt(5)
        assert float(layer.lora_A.weight.detach().abs().max()) <= bound
        assert float(layer.lora_A.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.25)
        assert not layer.lora_B.weight.detach().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_keeps_an_fp32_adapter(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    base = nn.Linear(16, 12, bias=False).to(dtype)
    layer = LoRALinear(base, LoRAConfig(rank=2, alpha=4.0))
    nn.init.normal_(layer.lora_B.weight)
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
    x = torch.randn(5, 16).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    exact_x = x.detach().float().requires_grad_()
    a, b = (t.weight.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    exact = F.linear(exact_x, base.weight.float()) + 2.0 * (exact_x @ a.T @ b.T)
    exact.square().sum().backward()
    assert y.dtype == dtype
    assert layer.lora_A.weight.grad.dtype == torch.float32
    for mine, true in ((y, exact), (x.grad, exact_x.grad), (layer.lora_A.weight.grad, a.grad)):
        assert float((mine.float() - true).norm() / true.norm()) < 2e-2


def test_autocast_matches_fp32_closely_and_gradients_keep_their_dtype() -> None:
    torch.manual_seed(2)
    layer = LoRALinear(nn.Linear(16, 12), LoRAConfig(rank=2, alpha=4.0))
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 16)
    grads = {}
    for half in (False, True):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            y = layer(inputs)
        y.float().square().sum().backward()
        assert y.dtype == (torch.bfloat16 if half else torch.float32)
        grads[half] = [inputs.grad, *(p.grad for p in layer.parameters())]
    for full, half_grad in zip(grads[False], grads[True], strict=True):
        assert half_grad.dtype == torch.float32
        assert float((full - half_grad).norm() / full.norm()) < 3e-2


def test_warm_start_goes_on_from_the_stored_adapter(tmp_path: Path) -> None:
    from arriero.config.checkpoint import CheckpointOptions
    from arriero.config.data import DataOptions
    from arriero.config.logging import LoggingOptions
    from arriero.config.model import ModelOptions
    from arriero.config.optimization import OptimizationOptions
    from arriero.config.parallel import ParallelOptions
    from arriero.config.precision import PrecisionOptions
    from arriero.config.quantization import QuantizationOptions
    from arriero.engine.loading import LoadedModel
    from arriero.parallel.processes import Processes
    from arriero.training.finetune_options import FinetuneOptions
    from arriero.training.methods.build import build_weights

    ours, theirs = pair()
    wrapped = peft.get_peft_model(
        theirs, peft.LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    ).eval()
    randomise(wrapped)
    wrapped.save_pretrained(str(tmp_path / "first"))
    options = FinetuneOptions(
        model=ModelOptions(model_name_or_path=str(tmp_path)),
        data=DataOptions(),
        optimization=OptimizationOptions(),
        precision=PrecisionOptions(),
        adapter=AdapterOptions(lora=True, lora_path=str(tmp_path / "first"), lora_rank=16),
        quantization=QuantizationOptions(),
        parallel=ParallelOptions(),
        checkpoint=CheckpointOptions(output_dir=str(tmp_path / "run")),
        logging=LoggingOptions(),
    )
    loaded = LoadedModel(ours, None, tmp_path, torch.device("cpu"))  # type: ignore[arg-type]
    store, _ = build_weights(loaded, options)
    with torch.no_grad():
        assert float((ours(ids()) - wrapped(ids()).logits).abs().max()) <= 1e-5
    store.write(tmp_path / "second", store.parts(), Processes())
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["r"] == 5
    again = peft.PeftModel.from_pretrained(pair()[1], str(tmp_path / "second")).eval()
    with torch.no_grad():
        assert float((again(ids()).logits - wrapped(ids()).logits).abs().max()) <= 1e-5


def test_adapter_of_another_base_is_refused_by_name() -> None:
    ours, _ = pair()
    apply_lora(ours, LoRAConfig(rank=2))
    state = {name: tensor.clone() for name, tensor in adapter_state(ours).items()}
    first = "model.layers.0.mlp.down_proj.lora_A.weight"
    with pytest.raises(FormatError, match=first.replace(".", r"\.")):
        load_adapter_state(ours, {name: t for name, t in state.items() if name != first})
    with pytest.raises(FormatError, match=r"layers\.7"):
        load_adapter_state(ours, {**state, "model.layers.7.mlp.down_proj.lora_A.weight": state[first]})
    with pytest.raises(FormatError, match="another base model"):
        load_adapter_state(ours, {**state, first: torch.zeros(2, 5)})


def test_bad_configurations_are_refused() -> None:
    for bad in ({"rank": 0}, {"dropout": 1.0}, {"bias": "some"}):
        with pytest.raises(ConfigError):
            LoRAConfig(**bad)
    with pytest.raises(ConfigError, match="no_such"):
        apply_lora(pair()[0], LoRAConfig(target_modules=("no_such",)))
    config = LoRAConfig(target_modules=("q_proj", "v_porj"))
    with pytest.raises(
        ConfigError, match="matches v_porj; they are called down_proj, gate_proj, k_proj, o_proj, q_proj, "
    ):
        apply_lora(pair()[0], config)
    # a file of PEFT's may name layers of other models
    assert {name[-6:] for name in apply_lora(pair()[0], config, fresh=False)} == {"q_proj"}


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("copies", [False, "auto"])
def test_the_head_of_a_tied_model_is_changed_alone(copies: bool | str, kind: dict[str, bool], tmp_path: Path) -> None:
    ours, theirs = twin_models(tie_word_embeddings=True)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", **kind)
    wrapped = peft.get_peft_model(theirs, config).eval()
    randomise(wrapped)
    wrapped.save_pretrained(str(tmp_path / "a"), save_embedding_layers=copies)
    stored, state = peft_files.load_adapter(tmp_path / "a")
    assert ("lm_head.weight" in state) == (copies == "auto")
    apply_lora(ours, from_peft(stored), fresh=False)
    load_adapter_state(ours, state)
    embedding = ours.model.embed_tokens.weight.clone()
    with torch.no_grad():
        wanted = wrapped(ids()).logits
        apart = ours(ids())
    merge_lora(ours)
    assert ours.config.tie_word_embeddings is False
    assert torch.equal(ours.model.embed_tokens.weight, embedding)
    hf.save_model(ours, ours.config, tmp_path / "merged")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        for found in (apart, ours(ids()), hf.load_model(tmp_path / "merged")(ids()), read(ids()).logits):
            assert float((found - wanted).abs().max()) <= 1e-5


def test_a_copy_of_another_bases_weight_is_refused(tmp_path: Path) -> None:
    ours, theirs = twin_models(tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(theirs, config).save_pretrained(str(tmp_path / "a"))
    stored, state = peft_files.load_adapter(tmp_path / "a")
    mine = from_peft(stored)
    apply_lora(ours, mine, fresh=False)
    load_adapter_state(ours.bfloat16(), state)  # rounded, as it may have been loaded
    with torch.no_grad():
        ours.model.embed_tokens.weight[3, 3] += 1
    with pytest.raises(FormatError, match=r"holds a lm_head\.weight that is not the model's"):
        load_adapter_state(ours, state)
    with torch.device("meta"):
        empty = LlamaForCausalLM(ours.config)
    apply_lora(empty, mine, fresh=False)
    with pytest.raises(FormatError, match="cannot be compared here: save it without"):
        check_adapter(empty, state)
    with pytest.raises(ConfigError, match=r"adapter 2 holds a copy of the base's lm_head\.weight"):
        mix_adapters([(mine, {}), (mine, state)], [1.0, 1.0])


def test_an_adapter_of_the_head_is_none_of_a_request(tmp_path: Path) -> None:
    ours, theirs = twin_models(tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(theirs, config).save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    with pytest.raises(ConfigError, match="lm_head is adapted, and only linear layers of the decoder can be"):
        AdapterPool(ours).read("a", tmp_path / "a")
