"""What the engine's runner computes is what transformers computes, however tokens, blocks and layers are packed."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arriero.adapters.lora import apply_lora
from arriero.adapters.lora_config import LoRAConfig
from arriero.engine.runner import TorchRunner, Work
from arriero.models import attention, paged_cache
from arriero.models.llama import LlamaForCausalLM
from arriero.models.packed_linear import MANY_ROWS
from arriero.models.packed_model import PackedModel
from arriero.models.paged_cache import PagedCache, Run
from arriero.quantization.choice import scheme_for
from arriero.quantization.linear import QuantizedLinear, dequantize_layers, quantize_layers

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))
from twin_models import VOCAB, twin_models

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "tied, one key-value head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral, window": {"model_type": "mistral", "sliding_window": 5, "head_dim": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, window in some layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}
SEQUENCES = [
    torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (MANY_ROWS + 21, 11, 14)
]
# what of each sequence a step computes: whole, in chunks, a token at a time, beside each other
STEPS = [
    [(0, 0, 7), (1, 0, 5)],
    [(0, 7, 8), (1, 5, 6)],
    [(0, 8, 8 + MANY_ROWS), (1, 6, 7), (2, 0, 1)],
    [(1, 7, 8), (2, 1, 2)],
    [(2, 2, 13)],
    [(0, 8 + MANY_ROWS, MANY_ROWS + 21), (1, 8, 11), (2, 13, 14)],
]


def blocks_of(sequence: int, scattered: bool) -> list[int]:
    """24 blocks of 4 tokens for each sequence: neighbours, or none beside the next."""
    return [sequence + 3 * i for i in range(24)] if scattered else list(range(24 * sequence, 24 * sequence + 24))


def logits_of(runner: TorchRunner, scattered: bool = False) -> list[Tensor]:
    """Of each sequence (S, V), computed in the steps."""
    found: list[list[Tensor]] = [[] for _ in SEQUENCES]
    for step in STEPS:
        work = [Work(SEQUENCES[i][a:b], a, blocks_of(i, scattered), b - a) for i, a, b in step]
        for (i, _, _), part in zip(step, torch.split(runner.run(work), [b - a for _, a, b in step]), strict=True):
            found[i].append(part)
    return [torch.cat(parts) for parts in found]


def check(ours: LlamaForCausalLM, theirs: Any, weight_copies: bool, scattered: bool = False) -> None:
    runner = TorchRunner(ours, block_size=4, max_tokens=4 * 72, weight_copies=weight_copies)
    for sequence, logits in zip(SEQUENCES, logits_of(runner, scattered), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([sequence])).logits[0]
        assert len(logits) == len(sequence)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("weight_copies", [False, True])
@pytest.mark.parametrize(("scattered", "piece"), [(False, 256), (True, 256), (False, 4), (True, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    family: str, scattered: bool, piece: int, weight_copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_cache, "MASKED_QUERIES", piece)
    ours, theirs = twin_models(max_position_embeddings=128, **FAMILIES[family])
    check(ours, theirs, weight_copies, scattered)


@pytest.mark.parametrize("copied", [32768, 30])
@pytest.mark.parametrize("kv_dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("family", ["llama", "tied, one key-value head", "qwen2, window in some layers"])
def test_all_sequences_attend_in_one_call(
    family: str, scattered: bool, kv_dtype: str, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does in half precision, with other attention in flash attention's place, which no CPU has."""
    monkeypatch.setattr(paged_cache, "COPIED_TOKENS", copied)
    calls = []

    def in_its_place(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        calls.append((query.shape[2], key.shape[2]))
        return attention._reference(query, key, value, *rest)

    monkeypatch.setattr(paged_cache, "takes_lengths", lambda *_: True)
    monkeypatch.setattr(attention, "_varlen", in_its_place)
    ours, theirs = twin_models(max_position_embeddings=128, **FAMILIES[family])
    runner = TorchRunner(ours, block_size=4, max_tokens=4 * 72, kv_cache_dtype=kv_dtype)
    tolerance = 1e-5 if kv_dtype == "auto" else 0.02
    for sequence, logits in zip(SEQUENCES, logits_of(runner, scattered), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([sequence])).logits[0]
        assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    together = [[step] for step in STEPS]
    if copied == 30:  # the third and the last step have 55 and 49 tokens and more
        together[2], together[5] = [STEPS[2][:1], STEPS[2][1:]], [STEPS[5][:1], STEPS[5][1:]]
    expected_calls = []
    for groups in together:
        parts = [(sum(end - start for _, start, end in group), sum(end for _, _, end in group)) for group in groups]
        expected_calls += parts * ours.config.num_hidden_layers
    assert calls == expected_calls


@pytest.mark.parametrize("weight_copies", [False, True])
def test_logits_with_rope_that_depends_on_the_length(weight_copies: bool) -> None:
    """The angles are those of the length that a sequence has in the step, so only whole sequences can be compared."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ours, theirs = twin_models(max_position_embeddings=16, rope_parameters=rope)
    runner = TorchRunner(ours, block_size=4, max_tokens=4 * 72, weight_copies=weight_copies)
    work = [Work(sequence, 0, blocks_of(i, False), len(sequence)) for i, sequence in enumerate(SEQUENCES)]
    for sequence, logits in zip(SEQUENCES, torch.split(runner.run(work), [len(s) for s in SEQUENCES]), strict=True):
        with torch.no_grad():
            expected = copy.deepcopy(theirs)(torch.tensor([sequence])).logits[0]  # whose angles would stay behind
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("weight_copies", [False, True])
@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("o_proj", "up_proj"), ("k_proj", "gate_proj", "down_proj")], ids=str
)
def test_layers_with_an_adapter_are_called_as_they_are(targets: tuple[str, ...], weight_copies: bool) -> None:
    ours, theirs = twin_models(max_position_embeddings=128)
    apply_lora(ours, LoRAConfig(rank=3, alpha=6.0, target_modules=targets))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for name, module in theirs.named_modules():
            if name.endswith(targets):
                own = ours.get_submodule(name)
                module.weight += 2.0 * own.get_parameter("lora_B.weight") @ own.get_parameter("lora_A.weight")
    check(ours.eval(), theirs, weight_copies)


@pytest.mark.parametrize("weight_copies", [False, True])
def test_layers_in_few_bits_are_called_as_they_are(weight_copies: bool) -> None:
    ours, theirs = twin_models(max_position_embeddings=128, hidden_size=64, intermediate_size=64)
    scheme = scheme_for("int8", ours.config)
    chosen = ("q_proj", "o_proj", "gate_proj")
    quantize_layers(ours, lambda name, _: scheme if name.endswith(chosen) else None)
    assert any(isinstance(module, QuantizedLinear) for module in ours.modules())
    whole = copy.deepcopy(ours)
    dequantize_layers(whole)
    theirs.load_state_dict(whole.state_dict())
    check(ours, theirs, weight_copies)


class DenseDelta:
    """Adds x D to the first rows of each layer's output."""

    def __init__(self, rows: int, deltas: dict[tuple[int, str], Tensor]) -> None:
        self._rows, self._deltas = rows, deltas

    def add(self, layer: int, name: str, x: Tensor, y: Tensor) -> None:
        y[: self._rows] += x[: self._rows] @ self._deltas[layer, name].t()


@pytest.mark.parametrize("weight_copies", [False, True])
def test_deltas_reach_every_linear_layer_and_only_their_rows(weight_copies: bool) -> None:
    ours, theirs = twin_models(max_position_embeddings=128)
    changed = copy.deepcopy(theirs)
    deltas, generator = {}, torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, module in changed.named_modules():
            if name.endswith("_proj"):
                delta = torch.randn(module.weight.shape, generator=generator) * 0.1
                _, _, layer, place = name.split(".", 3)
                deltas[int(layer), place] = delta
                module.weight += delta
    assert len(deltas) == 14
    cache = PagedCache(ours.config, 72, 4)
    packed = PackedModel(ours, copy=weight_copies)
    first, second = SEQUENCES[0], SEQUENCES[1]
    view = cache.view([Run(0, len(first), blocks_of(0, False)), Run(0, len(second), blocks_of(1, False))])
    rows = DenseDelta(len(first), deltas)
    with torch.inference_mode():
        hidden = packed.hidden_states(torch.tensor([first + second]), view.positions, view.attention, view, rows)[0]
        parts = torch.split(packed.lm_head(hidden), [len(first), len(second)])
        for model, sequence, logits in zip((changed, theirs), (first, second), parts, strict=True):
            expected = model(torch.tensor([sequence])).logits[0]
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def train(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Tensor:
    ids = torch.tensor([SEQUENCES[0]])
    loss = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("weight_copies", [False, True])
@pytest.mark.parametrize("family", ["biases everywhere", "tied, one key-value head", "qwen3"])
def test_the_model_stays_what_it_is(family: str, weight_copies: bool, tmp_path: Path) -> None:
    """Packing changes no parameter; they train as before, are saved as before, and what they become is what generates."""
    ours, _ = twin_models(max_position_embeddings=128, **FAMILIES[family])
    untouched, theirs = twin_models(max_position_embeddings=128, **FAMILIES[family])
    parameters = dict(ours.named_parameters())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (ours, untouched)]
    assert train(ours, optimizers[0]) == train(
        untouched, optimizers[1]
    )  # moments are there when the weights are packed
    runner = TorchRunner(ours, block_size=4, max_tokens=4 * 72, weight_copies=weight_copies)
    logits_of(runner)
    assert {name: id(p) for name, p in ours.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    for _ in range(2):
        for (name, own), expected in zip(ours.state_dict().items(), untouched.state_dict().values(), strict=True):
            assert own.equal(expected), name
        assert train(ours, optimizers[0]) == train(untouched, optimizers[1])
    assert not any(parameter.is_inference() for parameter in ours.parameters())
    state = {name: value for name, value in ours.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * sum(v.nbytes for v in state.values()) + 8192
    assert all(value.equal(state[name]) for name, value in load_file(tmp_path / "model.safetensors").items())

    theirs.load_state_dict(untouched.state_dict())
    for sequence, logits in zip(SEQUENCES, logits_of(runner), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([sequence])).logits[0]
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("weight_copies", [False, True])
def test_weights_that_are_replaced_count(weight_copies: bool) -> None:
    ours, _ = twin_models(max_position_embeddings=128)
    other, theirs = twin_models(seed=1, max_position_embeddings=128)
    runner = TorchRunner(ours, block_size=4, max_tokens=4 * 72, weight_copies=weight_copies)
    logits_of(runner)
    for own, new in zip(ours.parameters(), other.parameters(), strict=True):
        own.data = new.detach().clone()
    for sequence, logits in zip(SEQUENCES, logits_of(runner), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([sequence])).logits[0]
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_copies_the_weights_are_held_once() -> None:
    ours, _ = twin_models()
    packed = PackedModel(ours)
    PackedModel(ours)  # finds them side by side already
    attention = ours.model.layers[0].self_attn
    storages = {m.weight.untyped_storage().data_ptr() for m in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(storages) == 1
    linear = sum(m.weight.nbytes for m in ours.modules() if isinstance(m, nn.Linear))
    assert PackedModel.copy_bytes(ours) == linear
    assert packed.config is ours.config


@pytest.mark.parametrize("family", ["llama", "mistral, window", "qwen3"])
def test_modules_compute_over_blocks_too(family: str) -> None:
    """As a model that several processes hold does: layer by layer, with the same view."""
    ours, theirs = twin_models(max_position_embeddings=128, **FAMILIES[family])
    cache = PagedCache(ours.config, 72, 4)
    for start, end in ((0, 6), (6, 7), (7, 11)):
        view = cache.view([Run(start, end - start, blocks_of(i, True)) for i in (0, 1)])
        ids = torch.tensor([SEQUENCES[0][start:end] + SEQUENCES[1][start:end]])
        with torch.inference_mode():
            logits = ours(ids, view.positions, view.attention, view)[0]
            for i, part in enumerate(torch.split(logits, end - start)):
                expected = theirs(torch.tensor([SEQUENCES[i][:end]])).logits[0, start:]
                assert (part - expected).abs().max() <= 1e-5 * expected.abs().max()
