"""One weight file a process: what is in them, joining them, and every kind of broken set."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.hf import load_model, load_state, open_state, save_model
from arriero.formats.name_list import listed
from arriero.formats.parts import Placement
from arriero.formats.shard_forward import sharded_logits
from arriero.formats.shard_merging import merge_shards
from arriero.formats.shard_writer import write_shards
from arriero.formats.tensor_shards import ShardedState, is_sharded
from arriero.formats.tiny_model import tiny_tokenizer_files
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from own_memory import growth

# Biases everywhere, fewer key-value heads than processes, a vocabulary and units that four do not divide.
BIASED = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=50,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    attention_bias=True,
    mlp_bias=True,
    bos_token_id=1,
    eos_token_id=2,
)
TIED = replace(BIASED, model_type="qwen3", tie_word_embeddings=True, attention_bias=False, mlp_bias=False)
WINDOW = replace(BIASED, model_type="mistral", attention_bias=False, mlp_bias=False, sliding_window=9, layer_types=())
EMPTY = replace(BIASED, vocab_size=9, intermediate_size=9)  # the last of four processes gets nothing of these
STAGES = [range(1), range(1, 3)]


def make(folder: Path, config: LlamaConfig, dtype: torch.dtype = torch.float32, **files: bytes) -> Path:
    """A model whose every number is random: norms and biases too."""
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    save_model(model, config, folder, dtype=dtype, extra_files=files)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "m", BIASED, LICENSE=b"free\n")


@pytest.fixture
def shards(tmp_path: Path, whole: Path) -> Path:
    write_shards(whole, tmp_path / "shards", 4, STAGES)
    return tmp_path / "shards"


def test_files_hold_what_each_process_holds(shards: Path, whole: Path) -> None:
    expected = load_file(whole / "model.safetensors")
    assert {path.name for path in shards.iterdir()} == {
        "config.json",
        "generation_config.json",
        "LICENSE",
        *(f"model-tp0{tp}-of-04-pp0{pp}-of-02.safetensors" for tp in range(4) for pp in range(2)),
    }
    for rank in range(4):
        first = load_file(shards / f"model-tp0{rank}-of-04-pp00-of-02.safetensors")
        last = load_file(shards / f"model-tp0{rank}-of-04-pp01-of-02.safetensors")
        assert not first.keys() & last.keys()
        assert first.keys() | last.keys() == expected.keys()
        assert {name.split(".")[2] for name in first if ".layers." in name} == {"0"}
        assert "model.embed_tokens.weight" in first
        assert {"model.norm.weight", "lm_head.weight"} <= last.keys()
        rows = slice(25 * rank, 25 * rank + (25, 25, 25, 22)[rank])
        assert torch.equal(first["model.embed_tokens.weight"], expected["model.embed_tokens.weight"][rows])
        assert torch.equal(last["lm_head.weight"], expected["lm_head.weight"][rows])
        units, heads, shared = slice(13 * rank, min(13 * rank + 13, 50)), slice(8 * rank, 8 * rank + 8), rank // 2
        at = "model.layers.1."
        cuts = {
            "self_attn.q_proj.weight": (heads,),
            "self_attn.q_proj.bias": (heads,),
            "self_attn.k_proj.weight": (slice(8 * shared, 8 * shared + 8),),
            "self_attn.v_proj.bias": (slice(8 * shared, 8 * shared + 8),),
            "self_attn.o_proj.weight": (slice(None), heads),
            "self_attn.o_proj.bias": (slice(None),),
            "mlp.gate_proj.weight": (units,),
            "mlp.up_proj.bias": (units,),
            "mlp.down_proj.weight": (slice(None), units),
            "mlp.down_proj.bias": (slice(None),),
            "input_layernorm.weight": (slice(None),),
        }
        for name, cut in cuts.items():
            assert torch.equal(last[at + name], expected[at + name][cut]), name
    with safe_open(shards / "model-tp03-of-04-pp01-of-02.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "tensor_parallel_degree": "4",
            "tensor_parallel_rank": "3",
            "pipeline_parallel_degree": "2",
            "pipeline_parallel_rank": "1",
        }


@pytest.mark.parametrize("config", [BIASED, TIED, WINDOW, EMPTY], ids=["biased", "tied", "window", "empty"])
@pytest.mark.parametrize("stages", [None, STAGES], ids=["pp1", "pp2"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back(
    tmp_path: Path, config: LlamaConfig, stages: list[range] | None, tp: int, dtype: torch.dtype
) -> None:
    folder = make(tmp_path / "m", config, dtype)
    write_shards(folder, tmp_path / "s", tp, stages)
    assert is_sharded(tmp_path / "s")
    assert not is_sharded(folder)
    comparison = merge_shards(tmp_path / "s", tmp_path / "back")
    assert comparison is not None
    assert comparison.difference <= 1e-5 * comparison.largest
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_logits_of_the_shards_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(40)[None] % 97
    for number, config in enumerate((BIASED, TIED, WINDOW)):
        folder = make(tmp_path / f"m{number}", config)
        write_shards(folder, tmp_path / f"s{number}", 4, STAGES)
        logits = sharded_logits(ShardedState(tmp_path / f"s{number}", config), ids)
        with torch.no_grad():
            expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_shards_are_read_wherever_a_model_is(shards: Path, whole: Path, tmp_path: Path) -> None:
    expected = load_file(whole / "model.safetensors")
    state = dict(load_state(shards, dtype="bfloat16"))
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in state.items())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load_model(shards)(ids), load_model(whole)(ids))
    placement = Placement((50, 32), (3, 4), (40, 5))
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(ShardedState(shards, BIASED).read_part(name, placement), expected[name][3:43, 4:9])
    write_shards(shards, tmp_path / "other", 2)  # another degree, straight from the shards
    for path in (tmp_path / "other").glob("*.safetensors"):
        assert "-of-02.safetensors" in path.name
    assert {name: t.shape for name, t in open_state(tmp_path / "other", BIASED).items()} == {
        name: t.shape for name, t in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_state(tmp_path / "other"))


@pytest.mark.parametrize("config", [BIASED, EMPTY], ids=["biased", "empty"])
def test_boxes_are_read_of_the_files_that_hold_them(tmp_path: Path, config: LlamaConfig) -> None:
    """Whatever the run's own layout: any box is that of the whole tensor, and other processes' files are left alone."""
    whole = make(tmp_path / "m", config)
    write_shards(whole, tmp_path / "s", 4, STAGES)
    expected, state = load_file(whole / "model.safetensors"), ShardedState(tmp_path / "s", config)
    generator = torch.Generator().manual_seed(1)
    looked: set[int] = set()
    piece = state.piece
    state.piece = lambda name, rank: looked.add(rank) or piece(name, rank)  # type: ignore[method-assign, func-returns-value]
    for name, tensor in expected.items():
        for _ in range(12):
            ends = [sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist()) for size in tensor.shape]
            box = tuple(slice(*pair) for pair in ends)
            assert torch.equal(state.read(name, box), tensor[box]), (name, box)
    rows = Placement((config.vocab_size, 32), (0, 0), (-(-config.vocab_size // 4), 32))
    looked.clear()
    state.read_part("lm_head.weight", rows)
    assert looked == {0}
    looked.clear()
    state.read_part("model.layers.2.self_attn.o_proj.weight", Placement((32, 32), (0, 16), (32, 8)))
    assert looked == {2}


def test_another_dtype(shards: Path, whole: Path, tmp_path: Path) -> None:
    comparison = merge_shards(shards, tmp_path / "half", dtype="bfloat16", max_shard_size="20KB")
    assert comparison is not None
    found = dict(load_state(tmp_path / "half"))
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) > 2
    assert all(torch.equal(found[name], t.bfloat16()) for name, t in load_file(whole / "model.safetensors").items())
    assert LlamaConfig.from_file(tmp_path / "half").dtype == "bfloat16"


def test_whole_weights_replace_shards_and_the_other_way_round(shards: Path, whole: Path) -> None:
    save_model(dict(load_state(whole)), BIASED, shards)
    assert not list(shards.glob("model-tp*"))
    write_shards(whole, shards, 2)
    assert sorted(path.name for path in shards.glob("model*")) == [
        "model-tp00-of-02.safetensors",
        "model-tp01-of-02.safetensors",
    ]


def test_a_wrong_join_is_found_and_nothing_is_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ShardedState.read

    def swapped(self: ShardedState, name: str) -> Tensor:
        tensor = read(self, name)
        return tensor.roll(13, 1) if name.endswith("1.mlp.down_proj.weight") else tensor

    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(ShardedState, "read", swapped)
        with pytest.raises(FormatError, match="not written, for the merged model is another one: logits differ"):
            merge_shards(shards, tmp_path / "out")
        assert set(tmp_path.iterdir()) == before
        assert merge_shards(shards, tmp_path / "unseen", verify=False) is None
    (shards / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json: cannot be read"):
        merge_shards(shards, tmp_path / "out")


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Write a file anew with other tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata=metadata)


def every_file(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    for path in folder.glob("model-tp*-pp01*"):
        change(path, edit)


def configured(folder: Path, **values: int) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def swap(folder: Path) -> None:
    one, other = (folder / f"model-tp0{rank}-of-04-pp01-of-02.safetensors" for rank in (0, 1))
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


A, B = "model-tp02-of-04-pp00-of-02.safetensors", "model-tp01-of-04-pp01-of-02.safetensors"
NORM, KEYS, HEAD = "model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda f: (f / A).unlink(), f"{A} is missing"),
    "two degrees": (
        lambda f: (f / "model-tp00-of-02.safetensors").write_bytes(b""),
        r"different degrees \(model-tp00-of-02\.safetensors, model-tp0",
    ),
    "rank beyond": (
        lambda f: (f / "model-tp07-of-04-pp00-of-02.safetensors").write_bytes(b""),
        "model-tp07-of-04-pp00-of-02.safetensors is a file of no process of 4 x 2",
    ),
    "vast degree": (
        lambda f: (
            [path.unlink() for path in f.glob("model-tp*")]
            + [(f / "model-tp00-of-99999-pp00-of-99999.safetensors").write_bytes(b"")]
        ),
        "model-tp01-of-99999-pp00-of-99999.safetensors is missing",
    ),
    "renamed": (swap, "says of itself tensor_parallel_rank '1', its name says '0'"),
    "truncated": (lambda f: (f / A).write_bytes((f / A).read_bytes()[:-9]), f"{A}: is not a valid safetensors file"),
    "empty": (lambda f: (f / A).write_bytes(b""), f"{A}: the file is empty"),
    "header bomb": (lambda f: (f / A).write_bytes(b"\xff" * 64), f"{A}: is not a valid safetensors file"),
    "name missing here": (lambda f: change(f / B, lambda t: t.pop(KEYS)), f"{B}: {KEYS} is missing, which model-tp00"),
    "name missing": (lambda f: every_file(f, lambda t: t.pop(NORM)), f"missing {NORM}"),
    "unknown name": (lambda f: every_file(f, lambda t: t.update(x=torch.zeros(2))), "unexpected x; config.json"),
    "double name": (
        lambda f: every_file(f, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(2)})),
        "holds model.embed_tokens.weight, which model-tp00-of-04-pp00-of-02.safetensors holds too",
    ),
    "norms differ": (
        lambda f: change(f / B, lambda t: t[NORM][3:4].mul_(1.0000002)),
        f"{B}: {NORM} differs from that in model-tp00",
    ),
    "shared heads differ": (lambda f: change(f / B, lambda t: t[KEYS].neg_()), f"{B}: {KEYS} differs from that in"),
    "dtype differs": (
        lambda f: change(f / B, lambda t: t.update({HEAD: t[HEAD].half()})),
        f"{B}: {HEAD} is float16 and in another shard float32",
    ),
    "integers": (lambda f: every_file(f, lambda t: t.update({HEAD: t[HEAD].int()})), f"{HEAD} is not a float16"),
    "shape": (
        lambda f: change(f / B, lambda t: t.update({HEAD: t[HEAD][:20].clone()})),
        rf"{B}: {HEAD} has the shape \[20, 32\], config.json asks for \[25, 32\]",
    ),
    "dimensions": (
        lambda f: every_file(f, lambda t: t.update({"model.layers.1.mlp.down_proj.weight": torch.zeros(32)})),
        r"down_proj.weight has the shape \[32\], config.json asks for \[32, 13\]",
    ),
    "many layers": (lambda f: configured(f, num_hidden_layers=9999), "9999 layers are announced"),
    "heads": (
        lambda f: configured(f, num_attention_heads=6, num_key_value_heads=3),
        r"6 heads with 3 key-value heads cannot be shared out among 4 .*possible: 1, 3, 6\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_set_gives_one_line(shards: Path, tmp_path: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(shards)
    before = set(tmp_path.iterdir())
    with pytest.raises(FormatError, match=message) as found:
        merge_shards(shards, tmp_path / "out")
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 600
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(FormatError, match=message):
        load_model(shards)


def test_a_model_that_cannot_be_cut_so(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot be shared out among 3 .*possible: 1, 2, 4\)"):
        write_shards(whole, tmp_path / "s", 3)
    assert not list(tmp_path.iterdir())


MERGE = """
import sys
from arriero.formats.shard_merging import merge_shards
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])
# the first forward pass starts torch's threads and kernels: that is no memory of the merge
merge_shards(sys.argv[3], sys.argv[4])
print(anonymous(), flush=True)
sys.stdin.readline()
merge_shards(sys.argv[1], sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.peers)], ids=str)
def test_memory_stays_within_two_tensors(tmp_path: Path, whole: Path, dtype: torch.dtype) -> None:
    """Peak of the process's own memory (RssAnon: mapped files do not count), the comparison of logits included."""
    config = replace(
        BIASED,
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        head_dim=128,
        layer_types=(),
    )
    make(tmp_path / "m", config, dtype, **tiny_tokenizer_files())
    largest = 16384 * 512 * dtype.itemsize
    assert (tmp_path / "m" / "model.safetensors").stat().st_size > 5 * largest
    write_shards(tmp_path / "m", tmp_path / "s", 2)
    write_shards(whole, tmp_path / "warm", 2)
    folders = [str(tmp_path / name) for name in ("s", "out", "warm", "warmed")]
    used = growth(MERGE, *folders)
    print(f"{used / largest:.2f} of the largest tensor")
    assert 0.9 * largest < used <= 2 * largest  # below, the measurement would have missed the joining
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "m" / "model.safetensors").read_bytes()


@pytest.mark.peers
def test_a_real_model_comes_back_bit_by_bit(smollm2: Path, tmp_path: Path) -> None:
    write_shards(smollm2, tmp_path / "s", 3)
    comparison = merge_shards(tmp_path / "s", tmp_path / "back")
    assert comparison is not None
    assert comparison.difference <= 1e-5 * comparison.largest
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (smollm2 / name).read_bytes(), name


def test_names_of_a_strangers_file_are_shown_in_short() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(["x" * 1000, *"abcdef"]) == f"{'x' * 120}, a, b, c, d and 2 more"
