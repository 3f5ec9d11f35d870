"""Folders of Meta's: their own model, written down here from its sources, gives the logits of ours; both ways.

The reference runs every rank of model parallelism as fairscale's layers do (column-parallel, row-parallel, the two parallel
embeddings) and rotates neighbouring pairs as complex numbers, as llama/model.py does.
"""

from __future__ import annotations

import base64
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

regex = pytest.importorskip("regex")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
convert_slow_tokenizer = pytest.importorskip("transformers.convert_slow_tokenizer")


from arriero.errors import FormatError  # noqa: E402
from arriero.formats.meta import tokenizer as meta_tokenizer  # noqa: E402
from arriero.formats.meta.names import ROWS  # noqa: E402
from arriero.formats.meta.params import params_of, read_params  # noqa: E402
from arriero.formats.meta.reader import open_meta  # noqa: E402
from arriero.formats.meta.writer import write_meta  # noqa: E402
from arriero.formats.safe_tensors import LazyTensor  # noqa: E402
from arriero.formats.source import ModelSource  # noqa: E402
from arriero.formats.tokenizer_json import LLAMA3_SPLIT  # noqa: E402
from arriero.models.config import LlamaConfig  # noqa: E402
from arriero.models.llama import LlamaForCausalLM  # noqa: E402

SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SENTENCEPIECE = {"tokenizer.model": b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"}


def config_of(**changes: Any) -> LlamaConfig:
    values = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 300,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float64",
    }
    return LlamaConfig.from_dict(values | changes)


def random_model(config: LlamaConfig) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model.eval()


def source_of(model: LlamaForCausalLM, files: dict[str, bytes] | None = None) -> ModelSource:
    state = dict(model.state_dict().items())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return ModelSource(Path("here"), "hf", model.config, state, files or {})


def load(value: Tensor | LazyTensor) -> Tensor:
    return value.load() if isinstance(value, LazyTensor) else value


# Meta's model


def frequencies(params: dict[str, Any]) -> Tensor:
    """`precompute_freqs_cis`, and `apply_scaling` where params.json asks for it."""
    dim = params["dim"] // params["n_heads"]
    found = 1.0 / (params.get("rope_theta", 10000.0) ** (torch.arange(0, dim, 2).float() / dim))
    if params.get("use_scaled_rope"):
        scaled = []
        for frequency in found.tolist():
            wavelength = 2 * torch.pi / frequency
            smooth = (8192 / wavelength - 1) / (4 - 1)
            if wavelength > 8192:
                scaled.append(frequency / 8)
            elif wavelength < 8192 / 4:
                scaled.append(frequency)
            else:
                scaled.append((1 - smooth) * frequency / 8 + smooth * frequency)
        found = torch.tensor(scaled)
    return found


def rotated(states: Tensor, angles: Tensor) -> Tensor:
    """Heads (tokens, heads, head_dim): neighbouring pairs as complex numbers, turned by each position's angles."""
    pairs = torch.view_as_complex(states.reshape(*states.shape[:-1], -1, 2))
    turned = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.view_as_real(turned).flatten(2)


def norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps) * weight


def meta_logits(folder: Path, tokens: Tensor) -> Tensor:
    params = json.loads((folder / "params.json").read_text())
    ranks = [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]
    count, eps = len(ranks), params["norm_eps"]
    head_dim = params["dim"] // params["n_heads"]
    heads, kv_heads = params["n_heads"] // count, params.get("n_kv_heads", params["n_heads"]) // count
    angles = torch.outer(torch.arange(len(tokens)).double(), frequencies(params).double())

    def every(name: str) -> list[Tensor]:
        return [rank[name] for rank in ranks]

    if ranks[0]["tok_embeddings.weight"].shape[1] == params["dim"]:  # VocabParallelEmbedding: each rank knows its ids
        rows = params["vocab_size"] // count
        states = torch.zeros(len(tokens), params["dim"], dtype=torch.float64)
        for number, weight in enumerate(every("tok_embeddings.weight")):
            mine = (tokens >= number * rows) & (tokens < (number + 1) * rows)
            states[mine] = weight[tokens[mine] - number * rows]
    else:  # ParallelEmbedding: each rank knows its dimensions
        states = torch.cat([weight[tokens] for weight in every("tok_embeddings.weight")], dim=-1)
    mask = torch.full((len(tokens), len(tokens)), float("-inf"), dtype=torch.float64).triu(1)
    for layer in range(params["n_layers"]):
        at = f"layers.{layer}."
        inputs = norm(states, ranks[0][at + "attention_norm.weight"], eps)
        attended = torch.zeros_like(states)
        for rank in ranks:
            query, key, value = (
                (inputs @ rank[f"{at}attention.{name}.weight"].T).view(len(tokens), number, head_dim)
                for name, number in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads))
            )
            query, key = rotated(query, angles), rotated(key, angles)
            key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query, key) / head_dim**0.5 + mask
            output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
            attended = attended + output @ rank[at + "attention.wo.weight"].T
        states = states + attended
        inputs = norm(states, ranks[0][at + "ffn_norm.weight"], eps)
        states = states + sum(
            (
                functional.silu(inputs @ rank[at + "feed_forward.w1.weight"].T)
                * (inputs @ rank[at + "feed_forward.w3.weight"].T)
            )
            @ rank[at + "feed_forward.w2.weight"].T
            for rank in ranks
        )
    states = norm(states, ranks[0]["norm.weight"], eps)
    return torch.cat([states @ weight.T for weight in every("output.weight")], dim=-1)


KINDS: dict[str, tuple[dict[str, Any], dict[str, bytes], int]] = {
    "llama2": ({}, SENTENCEPIECE, 1),
    "llama2-2ranks": ({"num_key_value_heads": 8}, SENTENCEPIECE, 2),
    "llama3-4ranks": ({"rope_theta": 500000.0}, {}, 4),
    "llama31-2ranks": ({"rope_theta": 500000.0, "rope_scaling": SCALED}, {}, 2),
    "tied": ({"tie_word_embeddings": True}, {}, 1),
    "tied-2ranks": ({"tie_word_embeddings": True}, {}, 2),
    "tied-columns": ({"tie_word_embeddings": True}, SENTENCEPIECE, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_metas_model_gives_the_logits_of_ours(kind: str, tmp_path: Path) -> None:
    changes, files, ranks = KINDS[kind]
    model = random_model(config_of(**changes))
    write_meta(source_of(model, files), tmp_path / "meta", model_parallel_size=ranks)
    tokens = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = model(tokens[None])[0], meta_logits(tmp_path / "meta", tokens)
    assert float((ours - theirs).abs().max()) <= 5e-5 * float(theirs.abs().max())  # angles are fp32 in both


@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_back(kind: str, tmp_path: Path) -> None:
    changes, files, ranks = KINDS[kind]
    model = random_model(config_of(**changes))
    source = source_of(model, {**files, "LICENSE": b"free"})
    told: list[tuple[int, int]] = []
    write_meta(source, tmp_path / "meta", model_parallel_size=ranks, progress=lambda *now: told.append(now))
    assert told[-1][0] == told[-1][1]
    with open_meta(tmp_path / "meta") as back:
        assert back.config == model.config
        assert back.format == "meta"
        assert back.about == ()
        assert list(back.tensors) == list(source.tensors)
        for name, value in source.tensors.items():
            assert tuple(back.tensors[name].shape) == tuple(value.shape)
            assert torch.equal(load(back.tensors[name]), load(value)), name
        assert {**files, "LICENSE": b"free"}.items() <= back.files.items()


def meta_folder(
    folder: Path, params: dict[str, Any], state: dict[str, Tensor], ranks: int = 1, columns: bool = False
) -> None:
    """A folder as Meta publishes them: no config.json, RoPE frequencies among the weights."""
    folder.mkdir(parents=True)
    cuts = {row.meta.rpartition("N.")[2]: row.cut for row in ROWS}
    for rank in range(ranks):
        own: dict[str, Tensor] = {"rope.freqs": torch.ones(4).bfloat16()}
        for name, tensor in state.items():
            cut = cuts[name.split(".", 2)[2] if name.startswith("layers.") else name]
            cut = 1 if columns and name == "tok_embeddings.weight" else cut
            own[name] = tensor.chunk(ranks, cut)[rank].clone() if cut is not None else tensor
        torch.save(own, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))


PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "multiple_of": 176,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}


def random_state(params: dict[str, Any], width: int = 176, vocabulary: int = 96) -> dict[str, Tensor]:
    dim, layers = params["dim"], params["n_layers"]
    kv = dim // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocabulary, dim), "norm.weight": (dim,)}
    shapes["output.weight"] = (vocabulary, dim)
    for layer in range(layers):
        shapes_of_layer = {
            "attention.wq": (dim, dim),
            "attention.wk": (kv, dim),
            "attention.wv": (kv, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (width, dim),
            "feed_forward.w2": (dim, width),
            "feed_forward.w3": (width, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }
        for name, shape in shapes_of_layer.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2
        for name, shape in sorted(shapes.items())
    }


@pytest.mark.parametrize(("ranks", "columns"), [(1, False), (2, True), (4, False)])
def test_a_folder_of_metas_gives_its_logits_here(ranks: int, columns: bool, tmp_path: Path) -> None:
    params = PARAMS | {"vocab_size": 96} | ({} if columns else {"rope_theta": 500000.0, "use_scaled_rope": True})
    meta_folder(tmp_path / "meta", params, random_state(params), ranks, columns)
    tokens = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(2))
    with open_meta(tmp_path / "meta") as source:
        assert any("context length" in line for line in source.about)
        model = LlamaForCausalLM(source.config).double()
        model.load_state_dict({name: load(value) for name, value in source.tensors.items()})
        with torch.no_grad():
            ours, theirs = model.eval()(tokens[None])[0], meta_logits(tmp_path / "meta", tokens)
    assert float((ours - theirs).abs().max()) <= 5e-5 * float(theirs.abs().max())


def test_more_ranks_than_key_value_heads(tmp_path: Path) -> None:
    """Llama 3.1 405B on 16 ranks: two ranks in a row have the same key-value head."""
    params = PARAMS | {"vocab_size": 96, "n_kv_heads": 2}
    state = random_state(params)
    meta_folder(tmp_path / "one", params, state)
    doubled = {
        name: tensor.view(2, 8, 64).repeat_interleave(2, 0).reshape(32, 64)
        if ".wk." in name or ".wv." in name
        else tensor
        for name, tensor in state.items()
    }
    meta_folder(tmp_path / "four", params, doubled, 4)
    with open_meta(tmp_path / "one") as one, open_meta(tmp_path / "four") as four:
        assert all(torch.equal(load(one.tensors[name]), load(four.tensors[name])) for name in one.tensors)
    doubled["layers.1.attention.wv.weight"][9] += 1
    meta_folder(tmp_path / "torn", params, doubled, 4)
    with open_meta(tmp_path / "torn") as torn, pytest.raises(FormatError, match=r"v_proj\.weight should be the same"):
        load(torn.tensors["model.layers.1.self_attn.v_proj.weight"])


def test_a_head_that_is_the_embedding_is_tied(tmp_path: Path) -> None:
    state = random_state(PARAMS)
    for name, ranks, columns in (("one", 1, False), ("rows", 2, False), ("columns", 2, True)):
        state["output.weight"] = state["tok_embeddings.weight"].clone()
        meta_folder(tmp_path / name / "tied", PARAMS, state, ranks, columns)
        state["output.weight"][-1, -1] += 1e-9
        meta_folder(tmp_path / name / "untied", PARAMS, state, ranks, columns)
        for kind in ("tied", "untied"):
            with open_meta(tmp_path / name / kind) as source:
                assert source.config.tie_word_embeddings == (kind == "tied")
                assert ("lm_head.weight" in source.tensors) == (kind == "untied")
    del state["output.weight"]
    meta_folder(tmp_path / "none", PARAMS, state)
    assert open_meta(tmp_path / "none").config.tie_word_embeddings


# params.json of the published models (download pages of LLaMA to Llama 3.3) and the widths in their config.json on the Hub.
PUBLISHED = {
    "llama-7b": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, "vocab_size": -1},
        11008,
        2048,
    ),
    "llama-2-13b": (
        {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-5, "vocab_size": -1},
        13824,
        4096,
    ),
    "llama-2-70b": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80}
        | {"norm_eps": 1e-5, "vocab_size": -1},
        28672,
        4096,
    ),
    "codellama-34b": (
        {"dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 256, "ffn_dim_multiplier": 1.0}
        | {"norm_eps": 1e-5, "rope_theta": 1000000},
        22016,
        16384,
    ),
    "llama-3-8b": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024}
        | {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0},
        14336,
        8192,
    ),
    "llama-3.1-405b": (
        {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 4096}
        | {"ffn_dim_multiplier": 1.2, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
        53248,
        131072,
    ),
    "llama-3.2-1b": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256}
        | {"ffn_dim_multiplier": 1.5, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
        8192,
        131072,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params(name: str, tmp_path: Path) -> None:
    values, width, context = PUBLISHED[name]
    (tmp_path / "params.json").write_text(json.dumps(values))
    params = read_params(tmp_path / "params.json")
    assert params.intermediate_size == width
    assert params.context == context


@pytest.mark.parametrize(
    ("dim", "width"), [(64, 176), (576, 1536), (2048, 5632), (64, 96), (4096, 11009), (6, 1), (10, 3)]
)
def test_every_width_can_be_said(dim: int, width: int, tmp_path: Path) -> None:
    config = config_of(hidden_size=dim * 8, intermediate_size=width)
    (tmp_path / "params.json").write_text(json.dumps(params_of(config, sentencepiece=False)))
    assert read_params(tmp_path / "params.json").intermediate_size == width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "qwen2"}, "attention_bias.* to hf, gguf or paddle"),
        ({"model_type": "qwen3", "head_dim": 8}, "norms of queries.* to hf or gguf instead"),
        ({"model_type": "mistral", "sliding_window": 16}, r"sliding window \(16 tokens\).* to hf, gguf or paddle"),
        (
            {"model_type": "mistral", "sliding_window": 16, "tie_word_embeddings": True},
            "window.* to hf or gguf instead",
        ),
        ({"head_dim": 16}, "head_dim of 16.* to hf or gguf instead"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear.* to hf, gguf or paddle"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic.* to hf or paddle"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
            "yarn.* to hf or gguf instead",
        ),
        ({"rope_scaling": SCALED | {"factor": 16.0}}, r"16\.0"),
        ({"rope_scaling": SCALED, "tie_word_embeddings": True}, "RoPE scaling"),  # 32 is what Meta's tied models have
    ],
)
def test_what_metas_format_has_no_word_for_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = config_of(**changes)
    with pytest.raises(FormatError, match=f"no word for.*{message}"):
        write_meta(ModelSource(Path("x"), "hf", config, {}), tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


def test_ranks_that_cannot_share_are_refused(tmp_path: Path) -> None:
    source = source_of(random_model(config_of()))
    for ranks, message in (
        (8, "num_key_value_heads is 4"),
        (3, "hidden_size is 64"),
        (0, "from 1 to"),
        (5000, "from 1 to"),
    ):
        with pytest.raises(FormatError, match=message):
            write_meta(source, tmp_path / "meta", model_parallel_size=ranks)
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 60}, "dim 60 is not a multiple of n_heads 8"),
        ({"dim": None}, "has no dim"),
        ({"n_layers": 10**9}, "1000000000 layers, the files only"),
        ({"n_layers": 3}, r"layers\.2\.attention_norm\.weight is missing"),
        ({"n_layers": 1}, "unexpected"),
        ({"n_layers": True}, "n_layers must be a whole number"),
        ({"norm_eps": "small"}, "norm_eps must be a positive number"),
        ({"multiple_of": 256}, r"a feed-forward width of 256, but layers\.0\.feed_forward\.w1\.weight has 176"),
        ({"vocab_size": 100}, r"vocab_size of params\.json is 100, but tok_embeddings\.weight has 96"),
        ({"n_kv_heads": 8}, r"k_proj\.weight has the shape \[32, 64\]"),
        ({"moe": {"num_experts": 8}}, "'moe' belongs to a kind of model that is not supported"),
        ({"quantization_args": {"scheme": "int4"}}, "'quantization_args'"),
        ({"vision_chunk_size": 448}, "'vision_chunk_size'"),
    ],
)
def test_params_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    meta_folder(tmp_path / "meta", PARAMS | changes, random_state(PARAMS))
    with pytest.raises(FormatError, match=message):
        open_meta(tmp_path / "meta")


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no consolidated\.00\.pth"):
        open_meta(tmp_path)
    folder = tmp_path / "meta"
    meta_folder(folder, PARAMS, random_state(PARAMS), 4)
    (folder / "consolidated.02.pth").rename(folder / "kept")
    with pytest.raises(FormatError, match=r"consolidated\.02\.pth is missing"):
        open_meta(folder)
    state = torch.load(folder / "kept")
    for changed, message in (
        ({**state, "layers.0.attention.wq.bias": torch.ones(8)}, r"'layers\.0\.attention\.wq\.bias' is in only one"),
        ({**state, "norm.weight": torch.ones(65).double()}, r"norm\.weight has another shape"),
        ({**state, "norm.weight": state["norm.weight"].half()}, r"norm\.weight has another shape or dtype"),
    ):
        torch.save(changed, folder / "consolidated.02.pth")
        with pytest.raises(FormatError, match=message):
            open_meta(folder)
    torch.save({**state, "norm.weight": state["norm.weight"] + 1}, folder / "consolidated.02.pth")
    with open_meta(folder) as source, pytest.raises(FormatError, match=r"model\.norm\.weight should be the same"):
        load(source.tensors["model.norm.weight"])
    for path in folder.glob("consolidated.*"):
        torch.save({**torch.load(path), "layers.0.attention.lora_a.weight": torch.ones(2)}, path)
    with pytest.raises(FormatError, match="no model in Meta's format has"):
        open_meta(folder)


def test_a_config_beside_that_disagrees_is_refused(tmp_path: Path) -> None:
    model = random_model(config_of())
    write_meta(source_of(model), tmp_path / "meta")
    changed = replace(model.config, rope_theta=77.0)
    (tmp_path / "meta" / "config.json").write_text(json.dumps(changed.to_dict()))
    with pytest.raises(FormatError, match=r"rope_theta is 77\.0 in config\.json but 10000\.0"):
        open_meta(tmp_path / "meta")
    (tmp_path / "meta" / "config.json").unlink()
    assert open_meta(tmp_path / "meta").config.max_position_embeddings == 4096  # as Llama 2


def test_a_cast_and_a_name_that_was_there_before(tmp_path: Path) -> None:
    model = random_model(config_of())
    write_meta(source_of(model), tmp_path / "meta", model_parallel_size=2)
    write_meta(source_of(model), tmp_path / "meta", dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.glob("meta/*.pth")] == ["consolidated.00.pth"]
    with open_meta(tmp_path / "meta") as source:
        assert source.config.dtype == "bfloat16"
        for name, tensor in model.state_dict().items():
            assert torch.equal(load(source.tensors[name]), tensor.bfloat16())


# Tokenizers


@pytest.fixture(scope="module")
def tiktoken_bytes() -> bytes:
    """A small file of tiktoken: all bytes, then what a BPE trainer joins in the licence's text."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([text], trainer)
    spelled = {character: byte for byte, character in convert_slow_tokenizer.bytes_to_unicode().items()}
    tokens = [
        bytes(spelled[character] for character in token)
        for token in sorted(trained.get_vocab(), key=trained.token_to_id)
    ]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def ranks_of(content: bytes) -> dict[bytes, int]:
    return {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in content.splitlines()}


def tiktoken_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken does: a piece that is a token is one; else neighbours are joined, the lowest rank first."""
    found: list[int] = []
    for piece in regex.findall(LLAMA3_SPLIT, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while piece.encode() not in ranks and len(parts) > 1:
            joined = [ranks.get(left + right, 1 << 30) for left, right in itertools.pairwise(parts)]
            at = min(range(len(joined)), key=joined.__getitem__)
            if joined[at] == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += [ranks[piece.encode()]] if piece.encode() in ranks else [ranks[part] for part in parts]
    return found


TEXTS = [
    "Hello world's  12345 words\n\n\tand naïve 日本語 🎉\r\n",
    "",
    " ",
    "a" * 50,
    "THE SOFTWARE IS PROVIDED 'AS IS', don't",
]


def test_a_tiktoken_file_gives_the_ids_of_tiktoken_and_of_transformers(tiktoken_bytes: bytes, tmp_path: Path) -> None:
    files = meta_tokenizer.hf_files(meta_tokenizer.read_tiktoken(tiktoken_bytes, "x"), llama31=True, context=100)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    special = meta_tokenizer.special_tokens(llama31=True)

    class Converter(convert_slow_tokenizer.TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:  # instead of the tiktoken package's
            return ranks_of(tiktoken_bytes)

    theirs = Converter("x", extra_special_tokens=special).converted()
    texts = [*TEXTS, *(Path(__file__).parents[2] / "README.md").read_text().splitlines()]
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == tiktoken_ids(text, ranks_of(tiktoken_bytes)) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
    assert json.loads(files["tokenizer.json"])["model"] == json.loads(theirs.to_str())["model"]
    first = len(ranks_of(tiktoken_bytes))
    assert ours.encode("<|eot_id|>") == [first, first + 9]
    assert ours.bos_token_id == first
    assert ours.eos_token_id == first + 1


def test_special_tokens_have_metas_ids() -> None:
    """Places after the last rank (128000) in the tokenizers of Llama 3 and 3.1 on the Hub."""
    for llama31, known in (
        (False, {0: "<|begin_of_text|>", 5: "<|reserved_special_token_3|>", 8: "<|reserved_special_token_4|>"}),
        (
            True,
            {4: "<|finetune_right_pad_id|>", 5: "<|reserved_special_token_2|>", 8: "<|eom_id|>", 10: "<|python_tag|>"},
        ),
    ):
        tokens = meta_tokenizer.special_tokens(llama31=llama31)
        assert len(tokens) == len(set(tokens)) == 256
        expected = known | {1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
        assert {place: tokens[place] for place in expected} == expected
        assert tokens[-1] == f"<|reserved_special_token_{247 if llama31 else 250}|>"


def test_a_llama3_tokenizer_goes_round(tiktoken_bytes: bytes, tmp_path: Path) -> None:
    size = len(ranks_of(tiktoken_bytes)) + 256
    params = PARAMS | {"vocab_size": size, "rope_theta": 500000.0}
    meta_folder(tmp_path / "meta", params, random_state(params, vocabulary=size))
    (tmp_path / "meta" / "tokenizer.model").write_bytes(tiktoken_bytes)
    with open_meta(tmp_path / "meta") as source:
        assert "tokenizer.model" not in source.files  # an HF folder's would be SentencePiece's
        assert source.config.bos_token_id == size - 256
        assert source.config.eos_token_id == [size - 255, size - 247]
        write_meta(source, tmp_path / "again")
        with open_meta(tmp_path / "again") as again:
            assert again.files == source.files
            assert again.config == source.config
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == tiktoken_bytes


def test_other_tokenizers_stand_beside(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "src/arriero/formats/assets/tiny_tokenizer.json"
    files = {"tokenizer.json": path.read_bytes(), "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "tokenizer.model").write_bytes(b"of another model")
    (note,) = write_meta(source_of(random_model(config_of()), files), tmp_path / "meta")
    assert "splits or changes text otherwise than Llama 3" in note
    assert not (tmp_path / "meta" / "tokenizer.model").exists()
    assert open_meta(tmp_path / "meta").files == files


def test_a_tokenizer_that_tiktoken_cannot_say_is_recognised(tiktoken_bytes: bytes) -> None:
    content = meta_tokenizer.hf_files(meta_tokenizer.read_tiktoken(tiktoken_bytes, "x"), llama31=False, context=1)
    honest = json.loads(content["tokenizer.json"])
    assert meta_tokenizer.tiktoken_file(json.dumps(honest).encode()) == (tiktoken_bytes, "")
    as_texts = json.loads(json.dumps(honest))
    as_texts["model"]["merges"] = [" ".join(pair) for pair in as_texts["model"]["merges"]]  # as tokenizers before 0.20
    assert meta_tokenizer.tiktoken_file(json.dumps(as_texts).encode()) == (tiktoken_bytes, "")

    def reason(change: Any) -> str:
        changed = json.loads(json.dumps(honest))
        change(changed)
        written, why = meta_tokenizer.tiktoken_file(json.dumps(changed).encode())
        assert written == b""
        return why

    assert "merges" in reason(lambda body: body["model"]["merges"].pop())
    assert "merges" in reason(lambda body: body["model"].update(ignore_merges=False))
    assert "splits" in reason(lambda body: body.update(normalizer={"type": "NFC"}))
    assert "special tokens" in reason(lambda body: body["added_tokens"].pop())
    assert "special tokens" in reason(lambda body: body["added_tokens"][0].update(content="<s>"))
    assert "vocabulary" in reason(lambda body: body["model"]["vocab"].update({"€€": 3}))
    assert "no byte-level BPE" in reason(lambda body: body["model"].update(type="Unigram"))
    assert "not that of" in meta_tokenizer.tiktoken_file(b"[]")[1]


def test_sentencepiece_models_pass(tmp_path: Path) -> None:
    meta_folder(tmp_path / "7B", PARAMS, random_state(PARAMS), columns=True)
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE["tokenizer.model"])  # beside the folder, as LLaMA 1 had it
    with open_meta(tmp_path / "7B") as source:
        assert source.files["tokenizer.model"] == SENTENCEPIECE["tokenizer.model"]
        assert json.loads(source.files["tokenizer_config.json"])["add_bos_token"] is True
        assert (source.config.bos_token_id, source.config.eos_token_id) == (1, 2)
        assert any(str(tmp_path / "tokenizer.model") in line for line in source.about)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:5], b"???? 5", *lines[6:]], "line 6 "),
        (lambda lines: [*lines[:5], b"QQ==", *lines[6:]], "line 6 "),
        (lambda lines: [*lines[:5], lines[4], *lines[6:]], "line 6 "),
        (lambda lines: [*lines, b"QUJDREVGR0g= 5"], "line 901 "),
        (lambda lines: [*lines, base64.b64encode(b"x" * 300) + b" 900"], "line 901 "),
        (lambda lines: lines[:200], "has no token for the byte"),
    ],
)
def test_broken_tiktoken_files_are_refused(change: Any, message: str, tiktoken_bytes: bytes) -> None:
    content = b"\n".join(change(tiktoken_bytes.splitlines()))
    with pytest.raises(FormatError, match=message):
        meta_tokenizer.read_tiktoken(content, "x")
