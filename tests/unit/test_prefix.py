"""Prefixes: attention after learned keys in every kind of batch, fresh values, cuts, dropout, caches, files and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.adapters.prefix import (
    Prefix,
    PrefixConfig,
    apply_prefix,
    initial_values,
    load_prefix_state,
    prefix_kv,
    prefix_state,
)
from arriero.adapters.prefix_files import open_prefix
from arriero.config.adapter import AdapterOptions, AdapterPathOptions
from arriero.config.compatibility import check
from arriero.config.parallel import ParallelOptions
from arriero.data.batch import pack
from arriero.data.sft import IGNORE, Example
from arriero.errors import ConfigError, FormatError
from arriero.formats.peft_prefix import PeftPrefixConfig, read_config
from arriero.models.attention import AttentionInfo, attention, put_before
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.paged_cache import PagedCache, Run
from arriero.models.tensor_split import cut_of
from arriero.parallel.activation_checkpointing import apply_activation_checkpointing
from arriero.parallel.compilation import apply_compile
from arriero.parallel.processes import Processes
from arriero.training.optimizer import Optimizer
from arriero.training.prefix_weights import PrefixWeights

LENGTH = 4
SHAPE: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def model_with(config: PrefixConfig, **changes: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes))
    model.init_weights(1)
    apply_prefix(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in prefix_state(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.eval()


def tokens(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 53, (length,), generator=generator).tolist() for length in lengths]


def examples(rows: list[list[int]], prompts: list[int]) -> list[Example]:
    return [
        Example(row, [IGNORE] * (prompt - 1) + row[prompt:] + [IGNORE])
        for row, prompt in zip(rows, prompts, strict=True)
    ]


# Attention

INFOS: dict[str, Callable[[], AttentionInfo]] = {
    "causal": AttentionInfo.causal,
    "documents": lambda: AttentionInfo.documents([3, 3, 1, 5]),
    "one document": lambda: AttentionInfo.documents([12]),
    "branching": lambda: AttentionInfo.branching([(4, 2, 3), (3,)]),
    "one branching": lambda: AttentionInfo.branching([(5, 3, 4)]),
    "padded": lambda: AttentionInfo.padded(torch.arange(12)[None] < torch.tensor([[12], [7]])),
}


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("backend", ["sdpa", "repeated", "reference"])
@pytest.mark.parametrize("kind", INFOS)
def test_every_backend_attends_after_a_prefix(kind: str, backend: Any, window: int | None) -> None:
    """Against the softmax written out, document by document, with the keys that a cache would hold."""
    generator = torch.Generator().manual_seed(0)
    info = INFOS[kind]().with_prefix(LENGTH)
    rows = 2 if kind == "padded" else 1
    query = torch.randn(rows, 4, 12, 8, generator=generator)
    own = [torch.randn(rows, 2, 12, 8, generator=generator) for _ in range(2)]
    prefix = [torch.randn(2, LENGTH, 8, generator=generator) for _ in range(2)]
    key, value = (put_before(first, rest, info) for first, rest in zip(prefix, own, strict=True))
    got = attention(query, key, value, info, scale=0.3, sliding_window=window, backend=backend)
    expected = torch.zeros_like(query)
    for row in range(rows):
        for queries, keys, see in spans(kind, row):
            k, v = (
                torch.cat([first, rest[row][:, keys]], dim=1).repeat_interleave(2, dim=0)
                for first, rest in zip(prefix, own, strict=True)
            )
            scores = query[row][:, queries] @ k.transpose(1, 2) * 0.3
            distance = see[:, None] - torch.cat([torch.arange(LENGTH), LENGTH + torch.arange(len(keys))])[None]
            hidden = (distance < 0) | (distance >= (window or 10**6))
            expected[row][:, queries] = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    real = 7 if kind == "padded" else 12  # a padding query sees itself too, and counts for nothing
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[-1][:, :real], expected[-1][:, :real], atol=1e-5, rtol=0)


def spans(kind: str, row: int) -> list[tuple[list[int], list[int], Tensor]]:
    """Runs of queries; the own keys that each has before it, in order; and where each query stands, the prefix counted."""
    documents = {
        "causal": [(12,)],
        "documents": [(3,), (3,), (1,), (5,)],
        "one document": [(12,)],
        "branching": [(4, 2, 3), (3,)],
        "one branching": [(5, 3, 4)],
        "padded": [(12,)] if row == 0 else [(7,)],
    }[kind]
    found, at = [], 0
    for start, *branches in documents:
        beginning = list(range(at, at + start))
        found.append((beginning, beginning, LENGTH + torch.arange(start)))
        at += start
        for length in branches:
            branch = list(range(at, at + length))
            found.append((branch, beginning + branch, LENGTH + start + torch.arange(length)))
            at += length
    return found


@pytest.mark.parametrize("kind", [kind for kind in INFOS if kind != "padded"])
def test_positions_count_from_the_prefix(kind: str) -> None:
    info, device = INFOS[kind](), torch.device("cpu")
    after = info.with_prefix(LENGTH)
    assert torch.equal(after.positions(12, device), info.positions(12, device) + LENGTH)
    assert after is info.with_prefix(LENGTH), "masks are made once a batch, not once a layer"
    assert info.with_prefix(0) is info
    if kind == "documents":
        lengths, before = after.sequence_lengths(device), info.sequence_lengths(device)
        assert lengths is not None
        assert before is not None
        assert torch.equal(lengths, before + LENGTH)


# The model

ROPE: dict[str, dict[str, Any]] = {
    "plain": {},
    "sliding window": {"model_type": "mistral", "sliding_window": 6},
    "RoPE by length": {"max_position_embeddings": 12, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
}


@pytest.mark.parametrize("changes", ROPE.values(), ids=ROPE.keys())
def test_packed_rows_equal_separate_ones(changes: dict[str, Any]) -> None:
    model = model_with(PrefixConfig(LENGTH), **changes)
    rows = tokens(9, 9, 3, 11)
    batch = pack(examples(rows, [2, 2, 1, 4]))
    with torch.no_grad():
        packed = model(batch.input_ids, attention=batch.attention())[0]
        for row, part in zip(rows, torch.split(packed, [len(row) for row in rows]), strict=True):
            torch.testing.assert_close(part, model(torch.tensor([row]))[0], atol=1e-5, rtol=0)
        matrix = model(torch.tensor(rows[:2]))
    torch.testing.assert_close(matrix.flatten(0, 1), packed[:18], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [ROPE["plain"], ROPE["sliding window"]], ids=["plain", "sliding window"])
def test_shared_beginnings_equal_separate_rows(changes: dict[str, Any]) -> None:
    """Loss gradients too: those of the prefix add up over the rows."""
    model = model_with(PrefixConfig(LENGTH, projection=True), **changes)
    beginning, *ends = tokens(20, 3, 5, 2)
    rows = [*(beginning + end for end in ends), *tokens(7, seed=4)]
    made = examples(rows, [21, 21, 21, 3])
    shared, apart = pack(made, share_prefixes=True), pack(made)
    assert any(len(document) > 1 for document in shared.parts)
    gradients = []
    for batch in (shared, apart):
        model.zero_grad()
        logits = model(batch.input_ids, attention=batch.attention())
        torch.nn.functional.cross_entropy(logits[0], batch.labels[0], ignore_index=IGNORE, reduction="sum").backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * 4 + 3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("how", ["full", "core_attn", "compiled"])
def test_recomputed_and_compiled_layers_give_the_same_gradients(how: str) -> None:
    plain, other = (model_with(PrefixConfig(LENGTH, projection=True), num_hidden_layers=1) for _ in range(2))
    layers = list(other.model.layers.children())
    if how == "compiled":
        torch._dynamo.reset()
        apply_compile(layers, backend="aot_eager")
    else:
        apply_activation_checkpointing(layers, how)
    ids = torch.tensor(tokens(6, 6))
    for model in (plain, other):
        model(ids).square().sum().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-3, rtol=1e-5, msg=name)


def test_half_precision_models_keep_an_fp32_prefix() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.init_weights(1)
    apply_prefix(model, PrefixConfig(LENGTH, projection=True))
    assert {tensor.dtype for tensor in prefix_state(model).values()} == {torch.float32}
    logits = model(torch.tensor(tokens(5)))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)


def test_dropout_drops_entries_of_the_prefix_while_training_only() -> None:
    prefix = Prefix(50, 16, 8, 0.5, torch.device("cpu"))
    with torch.no_grad():
        prefix.key.fill_(1.0)
        prefix.value.fill_(3.0)
    key, value = prefix()
    assert key.shape == (2, 50, 8)
    assert set(key.unique().tolist()) == {0.0, 2.0}
    assert set(value.unique().tolist()) == {0.0, 6.0}
    assert float(key.detach().mean()) == pytest.approx(1.0, abs=0.2)
    key, _ = prefix.eval()()
    assert set(key.unique().tolist()) == {1.0}


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_a_prefix_is_always_adamws(name: str) -> None:
    """Its tables are small, and no matrices between hidden states: both rules leave it alone."""
    stepped = []
    for rule in (name, "adamw"):
        model = model_with(PrefixConfig(LENGTH, projection=True, projection_size=300))
        for parameter in model.parameters():
            parameter.grad = parameter.detach().sin() if parameter.requires_grad else None
        Optimizer(model, name=rule, weight_decay=0.1).step(1e-2)
        stepped.append(prefix_state(model))
    assert all(torch.equal(tensor, stepped[1][key]) for key, tensor in stepped[0].items())


# Layouts


@pytest.mark.parametrize("projection", [False, True])
def test_fresh_values_do_not_depend_on_the_layout(projection: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    apply_prefix(model, PrefixConfig(LENGTH, projection=projection), seed=11)
    for name, whole in prefix_state(model).items():
        shape = tuple(whole.shape)
        box = (slice(1, shape[0]), *(slice(0, size - 1) for size in shape[1:]))
        assert torch.equal(initial_values(name, box, shape, model.config, 11), whole[box]), name
        assert whole.any() != name.endswith(".bias"), name
    other = LlamaForCausalLM(LlamaConfig(**SHAPE))
    apply_prefix(other, PrefixConfig(LENGTH, projection=projection), seed=12)
    assert not torch.equal(next(iter(prefix_state(other).values())), next(iter(prefix_state(model).values())))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tensor_parallel_processes_hold_their_heads(tp: int) -> None:
    config = LlamaConfig(**SHAPE)
    base = "model.layers.0.self_attn"
    for name, shape in (("key", (LENGTH, 16)), ("value_proj.weight", (16, 7)), ("key_proj.bias", (16,))):
        for rank in range(tp):
            own = cut_of(f"{base}.prefix.{name}", shape, config, tp, rank)
            heads = cut_of(f"{base}.k_proj.weight", (16, 32), config, tp, rank)
            assert own.dim == (None if tp == 1 else 1 if name == "key" else 0)
            if tp > 1:
                assert (own.start, own.size, own.copies, own.copy) == (
                    heads.start,
                    heads.size,
                    heads.copies,
                    heads.copy,
                )
    assert cut_of("prefix_encoder.linear.weight", (7, 32), config, tp, 0).dim is None


# Generation


def test_cached_rows_equal_whole_forward_passes() -> None:
    model = model_with(PrefixConfig(LENGTH, projection=True))
    plain = prefix_kv(model)
    assert plain is not None
    cache, blocks = PagedCache(model.config, 10, 3), [[0, 2, 4, 6], [1, 3, 5, 7]]
    rows = tokens(5, 8)
    with torch.no_grad():
        for own in blocks:
            cache.put(own, 0, plain.keys, plain.values)
        view = cache.view([Run(LENGTH, 4, blocks[0]), Run(LENGTH, 7, blocks[1])])
        ids = torch.tensor([rows[0][:4] + rows[1][:7]])
        prefill = model(ids, view.positions, view.attention, view)[0]
        view = cache.view([Run(LENGTH + 4, 1, blocks[0]), Run(LENGTH + 7, 1, blocks[1])])
        decode = model(torch.tensor([[row[-1] for row in rows]]), view.positions, view.attention, view)[0]
        for row, start, last in zip(rows, torch.split(prefill, [4, 7]), decode, strict=True):
            torch.testing.assert_close(torch.cat([start, last[None]]), model(torch.tensor([row]))[0], atol=1e-5, rtol=0)


def test_a_model_without_a_prefix_has_none() -> None:
    assert prefix_kv(LlamaForCausalLM(LlamaConfig(**SHAPE))) is None


# Bad input


def test_options_that_do_not_go_together() -> None:
    parallel = ParallelOptions(context_parallel_degree=2)
    for adapter in (AdapterOptions(prefix_tuning=True), AdapterPathOptions(prefix_path="somewhere")):
        with pytest.raises(ConfigError, match=r"--prefix_.* and --context_parallel_degree 2 do not go together"):
            check([adapter, parallel])
    check([AdapterOptions(), parallel])
    for schedule in ("zero_bubble", "zbv"):
        pipeline = ParallelOptions(pipeline_parallel_degree=2, pipeline_schedule=schedule)
        with pytest.raises(ConfigError, match=f"--prefix_projection and --pipeline_schedule {schedule} do not"):
            check([AdapterOptions(prefix_tuning=True, prefix_projection=True), pipeline])
        check([AdapterOptions(prefix_tuning=True), pipeline])
    assert AdapterOptions(prefix_path="somewhere").prefix_tuning, "to train with a given prefix is to go on with it"
    with pytest.raises(ConfigError, match="--lora and --prefix_path"):
        AdapterOptions(lora=True, prefix_path="somewhere")
    for bad in ({"num_prefix_tokens": 0}, {"prefix_projection_hidden_size": 0}, {"prefix_dropout": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            AdapterOptions(prefix_tuning=True, **bad)


def test_a_prefix_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with pytest.raises(ConfigError, match="--num_prefix_tokens 64 fills the model's context of 64"):
        apply_prefix(model, PrefixConfig(64))
    assert all(p.requires_grad for p in model.parameters()), "it is left as it was"
    stored = model_with(PrefixConfig(20))
    save(stored, PrefixConfig(20), tmp_path)
    with pytest.raises(FormatError, match="a prefix of 20 fills the context of small, 16"):
        open_prefix(tmp_path, LlamaConfig(**SHAPE | {"max_position_embeddings": 16}), "small")


def save(model: LlamaForCausalLM, config: PrefixConfig, folder: Path) -> None:
    weights = PrefixWeights(model, config, "base")
    weights.write(folder, weights.parts(), Processes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "'LORA' is not a prefix.*--lora_path"),
        ({"peft_type": "IA3"}, "'IA3' is not a prefix"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a whole number of at least 1, got 0"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens"),
        ({"num_layers": None}, "num_layers must be"),
        ({"token_dim": "16"}, "token_dim must be"),
        ({"num_attention_heads": 3}, "token_dim 16 is no multiple of num_attention_heads 3"),
        ({"num_transformer_submodules": 2}, "only decoders"),
        ({"prefix_projection": 1}, "prefix_projection must be true or false"),
        ({"encoder_hidden_size": -1}, "encoder_hidden_size"),
        ({"num_virtual_tokens": 5}, r"prompt_embeddings \[5, 64\] is expected.*\[4, 64\]"),
    ],
)
def test_broken_configurations_are_refused_by_key(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(model_with(PrefixConfig(LENGTH)), PrefixConfig(LENGTH), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=message):
        open_prefix(tmp_path, LlamaConfig(**SHAPE), "base")


def test_unreadable_folders_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**SHAPE)
    with pytest.raises(FormatError, match="a prefix folder needs it"):
        open_prefix(tmp_path, config, "base")
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(FormatError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(FormatError, match="must hold a JSON object"):
        read_config(tmp_path)
    save(model_with(PrefixConfig(LENGTH)), PrefixConfig(LENGTH), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(FormatError, match="not a valid safetensors file"):
        open_prefix(tmp_path, config, "base")
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"pickled adapter_model\.bin is never opened"):
        open_prefix(tmp_path, config, "base")


def test_unknown_keys_are_kept() -> None:
    values = PeftPrefixConfig(4, 16, 2, 2).to_dict() | {"revision": "main", "init_weights": None}
    assert PeftPrefixConfig.from_dict(values).to_dict() == values


def test_a_resume_with_other_options_is_refused(tmp_path: Path) -> None:
    save(model_with(PrefixConfig(LENGTH)), PrefixConfig(LENGTH), tmp_path)
    for config, option in (
        (PrefixConfig(5), "num_prefix_tokens 4"),
        (PrefixConfig(4, True), "prefix_projection False"),
    ):
        weights = PrefixWeights(model_with(config), config, "base")
        with pytest.raises(FormatError, match=f"trained with --{option}"):
            weights.load(tmp_path)
    network = PrefixConfig(LENGTH, projection=True, projection_size=7)
    save(model_with(network), network, tmp_path / "network")
    wider = PrefixConfig(LENGTH, projection=True)
    with pytest.raises(FormatError, match="--prefix_projection_hidden_size 7, this run has 32"):
        PrefixWeights(model_with(wider), wider, "base").load(tmp_path / "network")
    state = prefix_state(model_with(PrefixConfig(LENGTH)))
    with pytest.raises(FormatError, match=r"the prefix lacks model\.layers\.0"):
        load_prefix_state(model_with(PrefixConfig(LENGTH)), {})
    with pytest.raises(FormatError, match="is it for another base model"):
        load_prefix_state(model_with(PrefixConfig(5)), state)
