"""Paddle model folders: the round trip through every way of cutting them, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.paddle import checkpoint
from arriero.formats.paddle.config import paddle_config, paddle_config_of
from arriero.formats.paddle.names import FUSED_ROWS, TENSOR_ROWS, places
from arriero.formats.paddle.pdparams_reader import read_pdparams
from arriero.formats.paddle.pdparams_writer import write_pdparams
from arriero.formats.paddle.reader import is_paddle_folder, open_paddle
from arriero.formats.paddle.writer import write_paddle
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.source import ModelSource
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import weight_shapes

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}


def config_of(**changes: Any) -> LlamaConfig:
    values = SMALL | changes
    return LlamaConfig(**values, attention_bias=values.get("model_type") == "qwen2")


def source_of(config: LlamaConfig, dtype: torch.dtype = torch.float32, **more: Any) -> ModelSource:
    torch.manual_seed(0)
    state = {name: torch.randn(shape).to(dtype) for name, shape in weight_shapes(config).items()}
    return ModelSource(Path("memory"), "hf", config, state, **more)


def load(folder: Path) -> dict[str, Tensor]:
    with open_paddle(folder) as source:
        return {name: lazy.load().clone() for name, lazy in source.tensors.items() if isinstance(lazy, LazyTensor)}


def written(tmp_path: Path, *, config: LlamaConfig | None = None, **options: Any) -> Path:
    write_paddle(source_of(config or config_of()), tmp_path / "model", **options)
    return tmp_path / "model"


def stored_state(config: LlamaConfig, **fused: bool) -> dict[str, Tensor]:
    """Tensors of the right names and shapes for a Paddle checkpoint."""
    found = {place.stored.name: place.stored for place in places(config, **fused).values()}
    return {name: torch.randn(stored.shape) for name, stored in found.items()}


def folder_of(tmp_path: Path, files: dict[str, dict[str, Tensor]], config: LlamaConfig | None = None) -> Path:
    for name, state in files.items():
        write_pdparams(tmp_path / name, state)
    (tmp_path / "config.json").write_text(json.dumps(paddle_config(config or config_of(), "float32")))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_shard_size": 2500},
        {"tensor_parallel_degree": 2},
        {"tensor_parallel_degree": 4},  # more processes than key-value heads: each holds them all
        {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 3},
        {"pipeline_parallel_degree": 2},
    ],
)
def test_every_way_of_cutting_comes_back_bit_for_bit(
    tmp_path: Path, options: dict[str, int], dtype: torch.dtype
) -> None:
    source = source_of(config_of(tie_word_embeddings=dtype == torch.float16), dtype)
    steps: list[tuple[int, int]] = []
    write_paddle(source, tmp_path / "model", progress=lambda done, total: steps.append((done, total)), **options)
    found = load(tmp_path / "model")
    assert list(found) == list(source.tensors)
    for name, tensor in source.tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


def test_tensors_are_joined_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SLAB_BYTES", 200)  # three rows of a matrix; a bias in one go
    config = config_of(model_type="qwen2")
    folder = written(tmp_path, config=config, tensor_parallel_degree=2)
    found = load(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in source_of(config).tensors.items())


@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_other_families_have_the_same_layout(tmp_path: Path, model_type: str) -> None:
    config = config_of(model_type=model_type)
    folder = written(tmp_path, config=config, tensor_parallel_degree=2)
    with open_paddle(folder) as source:
        assert source.config.model_type == model_type
        assert source.config.attention_bias == config.attention_bias
    found = load(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in source_of(config).tensors.items())


def test_the_configuration_comes_back(tmp_path: Path) -> None:
    config = config_of(rope_theta=5e5, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=3)
    with open_paddle(written(tmp_path, config=config)) as source:
        assert source.config.to_dict() == config.to_dict() | {"torch_dtype": "float32"}


def test_a_cast_is_announced_in_the_configuration(tmp_path: Path) -> None:
    folder = written(tmp_path, dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    source, found = source_of(config_of()), load(folder)
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in source.tensors.items())


def test_a_vocabulary_that_cannot_be_cut_stays_whole(tmp_path: Path) -> None:
    config = config_of(vocab_size=33)
    found = load(written(tmp_path, config=config, tensor_parallel_degree=2))
    assert all(torch.equal(found[name], tensor) for name, tensor in source_of(config).tensors.items())


def test_a_rewritten_folder_has_no_stale_weights(tmp_path: Path) -> None:
    written(tmp_path, tensor_parallel_degree=2)
    folder = written(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model_state.pdparams"]


def test_tokenizer_files_change_their_names(tmp_path: Path) -> None:
    files = {"tokenizer.model": b"\n\x0esentencepiece", "tokenizer_config.json": b"{}", "LICENSE": b"free"}
    write_paddle(source_of(config_of(), files=files), tmp_path / "model")
    assert (tmp_path / "model" / "sentencepiece.bpe.model").read_bytes() == files["tokenizer.model"]
    assert not (tmp_path / "model" / "tokenizer.model").exists()
    with open_paddle(tmp_path / "model") as source:
        assert source.files == files
    tiktoken = {"tokenizer.model": b"IQ== 0\nIg== 1\n"}
    write_paddle(source_of(config_of(), files=tiktoken), tmp_path / "llama3")
    assert (tmp_path / "llama3" / "tokenizer.model").read_bytes() == tiktoken["tokenizer.model"]


def test_a_chat_template_of_paddlenlp_is_left_out_and_said(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "chat_template.json").write_text(json.dumps({"system": "You are", "query": "{{query}}"}))
    with open_paddle(folder) as source:
        assert "chat_template.json" not in source.files
        assert any("chat_template.json" in line for line in source.about)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    with open_paddle(folder) as source:
        assert "chat_template.json" in source.files


def test_a_unified_checkpoint_is_told_from_an_hf_folder(tmp_path: Path) -> None:
    config = config_of()
    state = stored_state(config, fused_attention=True, fused_ffn=True)
    folder = folder_of(tmp_path, {}, config)
    save_file(state, folder / "model.safetensors", {"format": "np"})
    assert is_paddle_folder(folder)
    found = load(folder)
    fused = state["llama.layers.1.mlp.gate_up_fused_proj.weight"]
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], fused[:, 24:].t())
    qkv = state["llama.layers.2.self_attn.qkv_proj.weight"]  # for each of two groups: two queries, a key, a value
    assert torch.equal(found["model.layers.2.self_attn.k_proj.weight"], torch.cat([qkv[:, 8:12], qkv[:, 24:28]], 1).t())
    save_file(dict(source_of(config).tensors), folder / "model.safetensors")
    assert not is_paddle_folder(folder)


opened: list[str] | None = None


def record_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event == "open":
        opened.append(str(arguments[0]))


def test_pickles_of_the_trainer_are_never_opened(tmp_path: Path) -> None:
    global opened
    folder = written(tmp_path, tensor_parallel_degree=2)
    others = ("training_args.bin", "optimizer.pdopt", "optimizer.tp00.pdopt", "scheduler.pdparams", "rng_state.pth")
    for name in (*others, "scaler.pdparams", "master_weights.pdparams"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    sys.addaudithook(record_opened)
    opened = []
    load(folder)
    names, opened = {Path(name).name for name in opened if name.startswith(str(folder))}, None
    assert names == {"config.json", "model_state.tp00.pdparams", "model_state.tp01.pdparams"}


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob(name)).unlink()


def edit_index(change: dict[str, str]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model_state.pdparams.index.json"
        index = json.loads(path.read_text())
        first = index["weight_map"]["llama.embed_tokens.weight"]
        index["weight_map"] |= {name: file or first for name, file in change.items()}
        path.write_text(json.dumps(index))

    return edit


NORM = "llama.norm.weight"


@pytest.mark.parametrize(
    ("options", "break_it", "message"),
    [
        ({}, remove("config.json"), r"config\.json: cannot be read .*a Paddle model folder needs it"),
        ({}, remove("model_state.pdparams"), "holds no model_state.pdparams"),
        (
            {"tensor_parallel_degree": 4},
            remove("model_state.tp01.pdparams"),
            r"model_state\.tp01\.pdparams: is missing",
        ),
        (
            {"tensor_parallel_degree": 4},
            remove("model_state.tp03.pdparams"),
            r"model_state\.tp03\.pdparams: is missing",
        ),
        (
            {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 3},
            remove("model_state.tp00_pp01.pdparams"),
            r"model_state\.tp00_pp01\.pdparams: is missing",
        ),
        ({"pipeline_parallel_degree": 3}, remove("model_state.pp02.pdparams"), "missing llama.layers.2"),
        ({"max_shard_size": 2500}, edit_index({NORM: "../x.pdparams"}), r"names the file '\.\./x\.pdparams'"),
        ({"max_shard_size": 2500}, edit_index({NORM: "/etc/passwd"}), "names the file '/etc/passwd'"),
        ({"max_shard_size": 2500}, edit_index({NORM: "lost.pdparams"}), "lost.pdparams', which is missing"),
        (
            {"max_shard_size": 2500},
            edit_index({"more": ""}),
            "says that more is in",
        ),
        (
            {"max_shard_size": 2500},
            remove("model_state-00002-of-*.pdparams"),
            r"model_state-00002-of-.*\.pdparams', which is missing",
        ),
    ],
)
def test_incomplete_folders_are_refused(
    tmp_path: Path, options: dict[str, int], break_it: Callable[[Path], None], message: str
) -> None:
    folder = written(tmp_path, **options)
    break_it(folder)
    with pytest.raises(FormatError, match=message) as error:
        open_paddle(folder)
    assert "\n" not in str(error.value)


def test_a_lone_file_of_a_process_says_what_is_missing(tmp_path: Path) -> None:
    folder = written(tmp_path, tensor_parallel_degree=2)
    (folder / "model_state.tp01.pdparams").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if "parallel" not in key}))
    with pytest.raises(FormatError, match=r"it is cut for 2 processes and 1 of their files are here"):
        open_paddle(folder)


def test_odd_tensors_are_refused_by_name(tmp_path: Path) -> None:
    state = stored_state(config_of())
    cases: list[tuple[dict[str, Tensor], str]] = [
        (state | {NORM: torch.ones(15)}, r"llama\.norm\.weight has the shape \[15\], config.json asks for \[16\]"),
        (state | {"llama.extra": torch.ones(1)}, "unexpected llama.extra"),
        (state | {NORM: torch.ones(16, dtype=torch.int8)}, "norm.weight has the dtype int8; quantized Paddle weights"),
        ({name: state[name] for name in state if name != NORM}, "missing llama.norm.weight"),
        ({name.removeprefix("llama."): state[name] for name in state}, "the decoder alone was saved, without its head"),
    ]
    for number, (changed, message) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        folder = folder_of(tmp_path / str(number), {"model_state.pdparams": changed})
        with pytest.raises(FormatError, match=message):
            open_paddle(folder)


def test_what_carries_nothing_is_dropped(tmp_path: Path) -> None:
    config = config_of(tie_word_embeddings=True)
    state = stored_state(config) | {"llama.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    state["lm_head.weight"] = state["llama.embed_tokens.weight"]
    folder = folder_of(tmp_path, {"model_state.pdparams": state}, config)
    assert list(load(folder)) == list(weight_shapes(config))


def test_processes_that_differ_where_they_should_not_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, tensor_parallel_degree=4)
    for name in ("llama.norm.weight", "llama.layers.1.self_attn.k_proj.weight"):
        (tmp_path / name).mkdir()
        with open_paddle(folder) as source:
            write_paddle(source, tmp_path / name / "model", tensor_parallel_degree=4)
        path = tmp_path / name / "model" / "model_state.tp02.pdparams"
        with read_pdparams(path) as file:
            state = {key: array.load().clone() for key, array in file.tensors.items()}
        state[name].view(-1)[3] += 1
        write_pdparams(path, state)
        with pytest.raises(FormatError, match=f"tp02.*{name} differs"):
            load(path.parent)


def test_two_stages_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    state = stored_state(config_of())
    files = {"model_state.pp00.pdparams": state, "model_state.pp01.pdparams": {NORM: state[NORM]}}
    with pytest.raises(FormatError, match=r"pp01.*holds llama.norm.weight, which model_state.pp00.pdparams holds too"):
        open_paddle(folder_of(tmp_path, files))


def test_processes_with_other_names_are_refused(tmp_path: Path) -> None:
    state = stored_state(config_of())
    files = {"model_state.tp00.pdparams": state, "model_state.tp01.pdparams": {NORM: state[NORM]}}
    with pytest.raises(FormatError, match=r"model_state.tp01.pdparams: .* is not in the files of all processes"):
        open_paddle(folder_of(tmp_path, files))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_degree": 3}, "3 does not divide num_attention_heads 4"),
        ({"tensor_parallel_degree": 0}, "must be at least 1"),
        ({"pipeline_parallel_degree": 4}, "at most the number of layers, 3"),
    ],
)
def test_impossible_degrees_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        written(tmp_path, **options)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**SMALL, attention_bias=True), "has no biases"),
        (LlamaConfig(**SMALL, model_type="qwen3"), "no model of the type 'qwen3'"),
        (config_of(head_dim=8), "head_dim is 8 here"),
        (config_of(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "no RoPE of the type 'yarn'"),
        (config_of(model_type="mistral", tie_word_embeddings=True), "no tied head"),
        (config_of(model_type="mistral", rope_scaling={"rope_type": "linear", "factor": 2.0}), "no RoPE of the type"),
    ],
)
def test_models_that_paddlenlp_cannot_compute_are_refused(tmp_path: Path, config: LlamaConfig, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        written(tmp_path, config=config)


def test_absent_keys_mean_the_defaults_of_paddlenlp() -> None:
    found = paddle_config_of({"architectures": ["LlamaForCausalLM"]}).model
    assert (found.vocab_size, found.hidden_size, found.intermediate_size) == (32000, 4096, 11008)
    assert (found.num_hidden_layers, found.num_attention_heads, found.num_key_value_heads) == (32, 32, 32)
    assert (found.max_position_embeddings, found.rms_norm_eps, found.rope_theta) == (2048, 1e-6, 10000.0)
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 2)
    assert found.dtype == "float32"
    qwen = paddle_config_of({"model_type": "qwen2"}).model
    assert (qwen.vocab_size, qwen.intermediate_size, qwen.bos_token_id) == (151936, 22016, 151643)
    mistral = paddle_config_of({"architectures": ["MistralForCausalLM"]}).model
    assert (mistral.num_key_value_heads, mistral.intermediate_size, mistral.sliding_window) == (8, 14336, 4096)


def test_older_keys_and_the_class_of_a_pipeline_are_understood() -> None:
    values = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96, "n_positions": 128, "hidden_size": 1}
    found = paddle_config_of({"architectures": ["LlamaForCausalLMPipe"], **values, "tensor_parallel_degree": -1})
    model = found.model
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (64, 3, 4)
    assert (model.intermediate_size, model.max_position_embeddings) == (96, 128)
    assert found.tensor_parallel_degree == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alibi": True}, "alibi is true"),
        ({"use_long_sequence_strategies": True}, "use_long_sequence_strategies"),
        ({"architectures": ["BloomForCausalLM"]}, "'BloomForCausalLM' of Paddle is not supported"),
        ({"architectures": ["LlamaModel"]}, "decoder without a head"),
        ({"model_type": "chatglm"}, "model_type 'chatglm' is not supported"),
        ({"rope_scaling_type": "su"}, "rope_scaling_type 'su' is not supported"),
        ({"rope_scaling_type": "linear", "rope_scaling_factor": 1e300}, "rope_scaling_factor must be"),
        ({"rope_scaling": 4}, "rope_scaling must be an object"),
        ({"num_attention_heads": 0}, "no multiple of num_attention_heads 0"),
        ({"num_attention_heads": 3}, "no multiple of num_attention_heads 3"),
        ({"hidden_size": "big"}, "hidden_size must be a whole number"),
        ({"dtype": 3}, "dtype must be a name"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        ({"eos_token_id": "x"}, "eos_token_id must be"),
    ],
)
def test_configurations_that_are_none_of_ours_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        paddle_config_of(values)


def test_a_hostile_number_of_layers_builds_nothing(tmp_path: Path) -> None:
    folder = written(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9999}))
    with pytest.raises(FormatError, match="9999 layers are announced, but there are only 30 tensors"):
        open_paddle(folder)


def test_the_table_of_names_has_every_tensor_once() -> None:
    assert len({row.hf for row in TENSOR_ROWS}) == len(TENSOR_ROWS)
    known = {row.hf[0] for row in TENSOR_ROWS}
    assert all(set(row.hf) <= known for row in FUSED_ROWS)
    for config in (config_of(), config_of(model_type="qwen2"), config_of(model_type="mistral")):
        assert set(places(config)) == set(weight_shapes(config))
