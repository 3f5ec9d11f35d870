"""Prefix tuning against the PEFT library: same files, same logits, same gradients and steps, same text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arriero.adapters.prefix import (
    PrefixConfig,
    apply_prefix,
    is_prefix,
    load_prefix_state,
    prefix_kv,
    prefix_state,
)
from arriero.adapters.prefix_files import open_prefix, whole_state
from arriero.errors import FormatError
from arriero.formats.peft_prefix import ENCODER_WEIGHTS
from arriero.models.attention import AttentionInfo
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes
from arriero.training.prefix_weights import PrefixWeights

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from twin_models import SHAPE, VOCAB, twin_models  # noqa: E402

LENGTH = 5
KINDS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one key-value head": {"num_key_value_heads": 1},
    "a head each": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 12},
    "llama3 RoPE": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "sliding window": {"model_type": "mistral", "sliding_window": 6},
    "query and key norms": {"model_type": "qwen3", "head_dim": 8},
}


def ids(rows: int = 2, length: int = 11) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 5) -> None:
    """A prefix of weight: numbers as large as a model's own keys and values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)


def prefixed(config: PrefixConfig, **changes: Any) -> tuple[LlamaForCausalLM, Any]:
    """Our model with a random prefix, and transformers' without one."""
    ours, theirs = twin_models(**changes)
    apply_prefix(ours, config)
    randomise(ours)
    return ours, theirs


def save(model: LlamaForCausalLM, config: PrefixConfig, folder: Path) -> Path:
    weights = PrefixWeights(model, config, "base")
    weights.write(folder, weights.parts(), Processes())
    return folder


def trained_twin(theirs: Any, ours: LlamaForCausalLM, config: PrefixConfig) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's trainable model with our prefix in it; and where each of our parameters lies in theirs, as views."""
    size = config.projection_size or ours.config.hidden_size
    wrapped = peft.get_peft_model(
        theirs,
        peft.PrefixTuningConfig(
            num_virtual_tokens=config.length,
            task_type="CAUSAL_LM",
            prefix_projection=config.projection,
            encoder_hidden_size=size,
        ),
    )
    encoder = wrapped.prompt_encoder["default"]
    width = ours.config.num_key_value_heads * ours.config.head_dim
    places: dict[str, Any] = {}
    for layer in range(ours.config.num_hidden_layers):
        for number, which in enumerate(("key", "value")):
            start = (2 * layer + number) * width
            name, columns = f"model.layers.{layer}.self_attn.prefix.{which}", slice(start, start + width)
            if config.projection:
                places[f"{name}_proj.weight"] = (encoder.transform[2].weight, (columns,))
                places[f"{name}_proj.bias"] = (encoder.transform[2].bias, (columns,))
            else:
                places[name] = (encoder.embedding.weight, (slice(None), columns))
    if config.projection:
        everything = (slice(None),)
        places["prefix_encoder.embedding.weight"] = (encoder.embedding.weight, everything)
        places["prefix_encoder.linear.weight"] = (encoder.transform[0].weight, everything)
        places["prefix_encoder.linear.bias"] = (encoder.transform[0].bias, everything)
    own = prefix_state(ours)
    assert own.keys() == places.keys()
    with torch.no_grad():
        for name, (parameter, index) in places.items():
            parameter[index] = own[name]
    return wrapped, places


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_logits_equal_pefts(changes: dict[str, Any]) -> None:
    ours, theirs = prefixed(PrefixConfig(LENGTH), **changes)
    with torch.no_grad():
        plain = theirs(ids()).logits
        wrapped, _ = trained_twin(theirs, ours, PrefixConfig(LENGTH))
        mine, other = ours(ids()), wrapped.eval()(ids()).logits
    assert float((mine - plain).abs().max()) > 1e-2, "the prefix must change something"
    assert float((mine - other).abs().max()) <= 1e-5


def test_positions_start_after_the_prefix() -> None:
    """Counted from 0 the logits would be others: this is what decides the rule."""
    ours, theirs = prefixed(PrefixConfig(LENGTH))
    with torch.no_grad():
        wrapped, _ = trained_twin(theirs, ours, PrefixConfig(LENGTH))
        other = wrapped.eval()(ids()).logits
        hidden = ours.model.embed_tokens(ids())
        differences = []
        for start in (LENGTH, 0):
            angles = ours.model.rotary(torch.arange(start, start + ids().shape[1])[None], hidden.dtype)
            x = hidden
            for layer in ours.model.layers:
                x = layer(x, angles, AttentionInfo.causal().with_prefix(LENGTH), None)
            differences.append(float((ours.lm_head(ours.model.norm(x)) - other).abs().max()))
    assert differences[0] <= 1e-5
    assert differences[1] > 1e-2


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_rows_equal_pefts(padding: str) -> None:
    ours, theirs = prefixed(PrefixConfig(LENGTH))
    wrapped, _ = trained_twin(theirs, ours, PrefixConfig(LENGTH))
    short, row = 7, ids(1)
    side = (row.shape[1] - short, 0) if padding == "left" else (0, row.shape[1] - short)
    batch = torch.cat([row, F.pad(row[:, :short], side, value=0)])
    mask = torch.cat([torch.ones_like(row), F.pad(torch.ones(1, short, dtype=torch.long), side)])
    # PEFT adds the prefix to positions that are given; left out, those of a left-padded row would count its padding.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        other = wrapped.eval()(input_ids=batch, attention_mask=mask, position_ids=positions).logits
        mine = ours(batch, positions, AttentionInfo.padded(mask))
    real = mask.bool()
    assert float((mine - other)[real].abs().max()) <= 1e-5


@pytest.mark.parametrize("projection", [False, True])
def test_peft_reads_our_prefix(projection: bool, tmp_path: Path) -> None:
    config = PrefixConfig(LENGTH, projection=projection, projection_size=24)
    ours, theirs = prefixed(config)
    folder = save(ours, config, tmp_path / "prefix")
    assert (folder / ENCODER_WEIGHTS).exists() == projection, "the network is kept, keys and values are not kept twice"
    wrapped = peft.PeftModel.from_pretrained(theirs, str(folder)).eval()
    with torch.no_grad():
        difference = (ours(ids()) - wrapped(ids()).logits).abs().max()
    assert float(difference) <= 1e-5
    stored = json.loads((folder / "adapter_config.json").read_text())
    assert stored["token_dim"] == 16
    assert (stored["num_attention_heads"], stored["num_layers"]) == (2, 2), "the key-value heads"


@pytest.mark.parametrize("projection", [False, True])
def test_we_read_pefts_prefix(projection: bool, tmp_path: Path) -> None:
    ours, theirs = twin_models()
    wrapped = peft.get_peft_model(
        theirs,
        peft.PrefixTuningConfig(
            num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=projection, encoder_hidden_size=20
        ),
    ).eval()
    randomise(wrapped)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    stored = open_prefix(tmp_path / "theirs", ours.config, "base", trainable=True)
    assert stored.config == PrefixConfig(3), (
        "without the network, which PEFT does not keep, these are plain keys and values"
    )
    apply_prefix(ours, stored.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in prefix_state(ours).items()}
    load_prefix_state(ours, whole_state(stored, shapes))
    with torch.no_grad():
        assert float((ours(ids()) - wrapped(ids()).logits).abs().max()) <= 1e-5


@pytest.mark.parametrize("projection", [False, True])
def test_gradients_and_steps_equal_pefts(projection: bool) -> None:
    # PEFT's embedding is as wide as the keys, ours as the hidden states: with a key-value head for each head it is the same
    config = PrefixConfig(LENGTH, projection=projection, projection_size=24)
    ours, theirs = prefixed(config, num_key_value_heads=4)
    wrapped, places = trained_twin(theirs, ours, config)
    trained = dict(ours.named_parameters())
    assert {name for name, p in trained.items() if p.requires_grad} == places.keys()
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-6)
        for model in (ours, wrapped)
    ]
    for step in range(4):
        losses = []
        for model, optimizer in zip((ours, wrapped), optimizers, strict=True):
            model.train()
            optimizer.zero_grad()
            output = model(ids())
            logits = output if isinstance(output, Tensor) else output.logits
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids()[:, 1:].reshape(-1))
            loss.backward()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        for name, (parameter, index) in places.items():
            assert float((trained[name].grad - parameter.grad[index]).abs().max()) <= 1e-6, f"{name}, step {step}"
        for optimizer in optimizers:
            optimizer.step()
    for name, (parameter, index) in places.items():
        assert float((trained[name] - parameter[index]).detach().abs().max()) <= 1e-5, name


def test_frozen_base_gets_no_gradient() -> None:
    ours, _ = prefixed(PrefixConfig(LENGTH, projection=True))
    ours(ids()).sum().backward()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == is_prefix(name), name


def test_text_equals_pefts_generate(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from arriero.data.tokenizer import load_tokenizer
    from arriero.engine.sampling_params import SamplingParams
    from arriero.engine.shared_generation import generate_shared

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(VOCAB)}, "0"))
    backend.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = prefixed(PrefixConfig(LENGTH))
    wrapped, _ = trained_twin(theirs, ours, PrefixConfig(LENGTH))
    shared = ids(1, 20)[0].tolist()  # more than a block
    prompts = [[5, 6, 7], [9], [*shared, 4], [*shared, 8, 3]]
    params = [SamplingParams(max_new_tokens=12, ignore_eos=True)] * len(prompts)
    answers = generate_shared(ours, load_tokenizer(tmp_path), prompts, params, max_running=3)
    assert answers[3].cached_tokens > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        row = torch.tensor([prompt])
        whole = wrapped.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer.token_ids == whole[0, len(prompt) :].tolist()
    assert len({tuple(answer.token_ids) for answer in answers}) == len(answers)


def test_the_plain_keys_and_values_are_a_cache(tmp_path: Path) -> None:
    """`prefix_kv` is what transformers' own cache takes, without PEFT."""
    config = PrefixConfig(LENGTH, projection=True, dropout=0.5)
    ours, theirs = prefixed(config)
    ours.train()
    plain = prefix_kv(ours)
    assert plain is not None
    assert plain.length == LENGTH
    assert ours.model.layers[0].self_attn.prefix.training, "as it was"
    cache = transformers.DynamicCache()
    for layer in plain.keys:
        cache.update(plain.keys[layer][None], plain.values[layer][None], layer)
    with torch.no_grad():
        difference = (ours.eval()(ids(1)) - theirs(ids(1), past_key_values=cache).logits).abs().max()
    assert float(difference) <= 1e-5


@pytest.mark.parametrize("projection", [False, True])
def test_training_goes_on_from_a_stored_prefix(projection: bool, tmp_path: Path) -> None:
    config = PrefixConfig(LENGTH, projection=projection, projection_size=24)
    ours, _ = prefixed(config)
    folder = save(ours, config, tmp_path / "prefix")
    again, _ = twin_models()
    stored = open_prefix(folder, again.config, "base", trainable=True, dropout=0.25)
    assert stored.config == PrefixConfig(LENGTH, projection, 24 if projection else None, 0.25)
    apply_prefix(again, stored.config, seed=3)
    weights = PrefixWeights(again, stored.config, "base")
    weights.load(folder)
    for name, tensor in prefix_state(ours).items():
        assert torch.equal(tensor, prefix_state(again)[name]), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"num_hidden_layers": 3}, "3 layers with 2"), ({"num_key_value_heads": 4}, "2 layers with 4")],
)
def test_a_prefix_of_another_base_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    ours, _ = prefixed(PrefixConfig(LENGTH))
    folder = save(ours, PrefixConfig(LENGTH), tmp_path / "prefix")
    other = LlamaConfig.from_dict(SHAPE | changes)
    with pytest.raises(FormatError, match=rf"for base \(2 layers with 2 .*, and other/model has {words}"):
        open_prefix(folder, other, "other/model")
