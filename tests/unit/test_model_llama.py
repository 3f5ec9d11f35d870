"""The decoder's own laws: names, ties, meta construction, fresh weights, checkpointing, packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from arriero.models.attention import AttentionInfo
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM, RMSNorm
from arriero.models.paged_cache import PagedCache, Run


def config(**changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**values | changes)


def fresh(settings: LlamaConfig, seed: int = 0) -> LlamaForCausalLM:
    model = LlamaForCausalLM(settings)
    model.init_weights(seed)
    return model


def test_parameter_names_are_those_of_an_hf_folder() -> None:
    model = LlamaForCausalLM(config(model_type="qwen3", attention_bias=True, num_hidden_layers=1))
    layer = "model.layers.0."
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected |= {f"{layer}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
    expected |= {f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    expected |= {f"{layer}self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")}
    expected |= {f"{layer}self_attn.{name}_norm.weight" for name in "qk"}
    assert set(model.state_dict()) == expected
    assert LlamaForCausalLM(config(mlp_bias=True)).model.layers[0].mlp.up_proj.bias is not None


@pytest.mark.parametrize(
    "settings",
    [
        config(),
        config(tie_word_embeddings=True),
        config(attention_bias=True, mlp_bias=True),
        config(model_type="qwen2", attention_bias=True),
        config(model_type="qwen3"),
    ],
)
def test_parameters_are_counted_without_building(settings: LlamaConfig) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert settings.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_fresh_weights_are_reproducible_and_as_configured() -> None:
    settings = config(attention_bias=True, mlp_bias=True, hidden_size=96, intermediate_size=200, vocab_size=300)
    first, second, other = fresh(settings, 1), fresh(settings, 1), fresh(settings, 2)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if "norm" in name:
            assert torch.equal(a, torch.ones_like(a))
        elif name.endswith("bias"):
            assert torch.equal(a, torch.zeros_like(a))
        else:
            assert not torch.equal(a, c)
            assert a.std().item() == pytest.approx(0.2, rel=0.05)
            assert abs(a.mean().item()) < 0.02


@pytest.mark.parametrize("tied", [False, True])
def test_meta_then_materialised_equals_built_directly(tied: bool) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    settings = config(tie_word_embeddings=tied, rope_scaling=scaling)
    direct = fresh(settings)
    input_ids = torch.arange(12)[None]

    with torch.device("meta"):
        late = LlamaForCausalLM(settings)
    late.to_empty(device="cpu")
    late.init_weights(0)
    assert torch.equal(late(input_ids), direct(input_ids))
    assert (late.lm_head.weight is late.model.embed_tokens.weight) == tied

    with torch.device("meta"):
        assigned = LlamaForCausalLM(settings)
    state = {name: value for name, value in direct.state_dict().items() if not (tied and name == "lm_head.weight")}
    result = assigned.load_state_dict(state, assign=True, strict=False)
    assert result.missing_keys == (["lm_head.weight"] if tied else [])
    assigned.tie_weights()
    assert torch.equal(assigned(input_ids), direct(input_ids))
    assert len(list(assigned.parameters())) == len(list(direct.parameters()))


def test_tied_head_gets_both_gradients_in_one_parameter() -> None:
    model = fresh(config(tie_word_embeddings=True))
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names
    model(torch.tensor([[1, 2]])).sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(dim=1).count_nonzero() == 31  # the head reaches every row, the embedding only two


def test_forward_is_the_head_of_hidden_states() -> None:
    model = fresh(config())
    input_ids = torch.arange(10).view(2, 5)
    hidden = model.hidden_states(input_ids)
    assert hidden.shape == (2, 5, 24)
    assert torch.equal(model(input_ids), hidden @ model.lm_head.weight.T)


def test_default_positions_and_given_ones() -> None:
    model = fresh(config())
    input_ids = torch.arange(8).view(2, 4)
    assert torch.equal(model(input_ids), model(input_ids, torch.arange(4).expand(2, 4)))
    shifted = model(input_ids, torch.arange(4)[None] + 50)
    torch.testing.assert_close(shifted, model(input_ids), atol=1e-4, rtol=0)  # RoPE is relative
    assert not torch.allclose(model(input_ids, torch.arange(4)[None] * 3), model(input_ids), atol=1e-4)


@pytest.mark.parametrize("rope", [None, {"rope_type": "dynamic", "factor": 2.0}])
@pytest.mark.parametrize("window", [None, 3])
def test_packing_changes_neither_result_nor_gradient(window: int | None, rope: dict[str, Any] | None) -> None:
    settings = config(model_type="mistral", sliding_window=window, rope_scaling=rope, max_position_embeddings=8)
    packed, separate = fresh(settings), fresh(settings)
    lengths = [4, 1, 11, 2]
    input_ids = torch.randint(0, 31, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    logits = packed(input_ids, attention=AttentionInfo.documents(lengths))
    logits.square().sum().backward()
    for document, part in zip(input_ids.split(lengths, 1), logits.split(lengths, 1), strict=True):
        alone = separate(document)
        torch.testing.assert_close(part, alone, atol=1e-4, rtol=0)
        alone.square().sum().backward()
    for (name, a), b in zip(packed.named_parameters(), separate.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4 * float(b.grad.abs().max()), rtol=0, msg=name)


def test_layers_can_be_checkpointed_by_wrapping_forward() -> None:
    plain, wrapped = fresh(config()), fresh(config())
    for layer in wrapped.model.layers:
        inner = layer.forward
        layer.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
    input_ids = torch.arange(9)[None]
    info = AttentionInfo.documents([4, 5])
    for model in (plain, wrapped):
        model(input_ids, attention=info).square().sum().backward()
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_shared_prefix_then_decode_equals_full_forward() -> None:
    model = fresh(config(model_type="mistral", sliding_window=4))
    prefix = torch.tensor([5, 6, 7, 8, 9])
    suffixes = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    following = torch.tensor([10, 11])
    with torch.no_grad():
        cache = PagedCache(model.config, num_blocks=3, block_size=5)
        view = cache.view([Run(0, 5, [2])])
        model(prefix[None], view.positions, view.attention, view)
        view = cache.view([Run(5, 3, [2, 0]), Run(5, 1, [2, 1])])
        got = model(torch.cat(suffixes)[None], view.positions, view.attention, view)[0].split([3, 1])
        view = cache.view([Run(8, 1, [2, 0]), Run(6, 1, [2, 1])])
        last = model(following[None], view.positions, view.attention, view)[0]
        for row, suffix in enumerate(suffixes):
            whole = torch.cat((prefix, suffix, following[row : row + 1]))
            expected = model(whole[None])[0]
            torch.testing.assert_close(got[row], expected[5:-1], atol=1e-4, rtol=0)
            torch.testing.assert_close(last[row], expected[-1], atol=1e-4, rtol=0)


def test_autocast_trains_close_to_fp32() -> None:
    exact, mixed = fresh(config(model_type="qwen3")), fresh(config(model_type="qwen3"))
    input_ids = torch.arange(9)[None]
    info = AttentionInfo.documents([4, 5])
    expected = exact(input_ids, attention=info)
    expected.square().mean().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mixed(input_ids, attention=info)
    got.float().square().mean().backward()
    torch.testing.assert_close(got.float(), expected, atol=0.05 * float(expected.detach().abs().max()), rtol=0)
    for a, b in zip(mixed.parameters(), exact.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, atol=0.1 * float(b.grad.abs().max()), rtol=0)


def test_rms_norm_by_its_formula() -> None:
    norm = RMSNorm(12, 0.5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x.float()).double(), expected, atol=1e-5, rtol=0)


def test_exports_to_a_plain_graph() -> None:
    model = fresh(config()).eval()
    input_ids = torch.arange(6)[None]
    exported = torch.export.export(model, (input_ids,))
    torch.testing.assert_close(exported.module()(input_ids), model(input_ids), atol=1e-5, rtol=0)
