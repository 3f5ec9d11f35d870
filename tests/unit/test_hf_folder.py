"""HF folders: saving whole or not at all, loading without a copy, and what is refused."""

from __future__ import annotations

import builtins
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.data.tokenizer_files import read_tokenizer_files
from arriero.errors import FormatError
from arriero.formats import staging
from arriero.formats.hf import copy_side_files, load_model, load_state, save_model
from arriero.formats.side_files import read_side_files
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    bos_token_id=1,
    eos_token_id=2,
)
TIED = replace(CONFIG, tie_word_embeddings=True)


def make(config: LlamaConfig = CONFIG, seed: int = 0) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config)
    model.init_weights(seed)
    return model


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("size", ["5GB", "12KB"])
def test_round_trip(tmp_path: Path, config: LlamaConfig, size: str) -> None:
    model = make(config)
    save_model(model, config, tmp_path / "m", max_shard_size=size)
    loaded = load_model(tmp_path / "m")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.to_dict() == replace(config, dtype="float32").to_dict()
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == config.tie_word_embeddings
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids), model.eval()(ids))
    assert ("lm_head.weight" in dict(load_state(tmp_path / "m"))) == (not config.tie_word_embeddings)
    mode = (tmp_path / "m" / "config.json").stat().st_mode & 0o777
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {mode}


def test_dtype_casts(tmp_path: Path) -> None:
    save_model(make(), CONFIG, tmp_path / "m", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}
    assert LlamaConfig.from_file(tmp_path / "m").dtype == "bfloat16"
    assert {p.dtype for p in load_model(tmp_path / "m").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path / "m", dtype="float32").parameters()} == {torch.float32}
    with pytest.raises(FormatError, match="int9"):
        load_model(tmp_path / "m", dtype="int9")


def test_mixed_file_follows_the_configuration(tmp_path: Path) -> None:
    state = {name: t.bfloat16() if "norm" not in name else t for name, t in make().state_dict().items()}
    save_model(state, CONFIG, tmp_path / "m")
    assert {p.dtype for p in load_model(tmp_path / "m").parameters()} == {torch.float32}


def test_loading_makes_no_copy(tmp_path: Path) -> None:
    """40 MB of weights add next to nothing to the process's own memory, and every parameter lies in the mapping."""
    config = replace(CONFIG, vocab_size=20_000, hidden_size=256, head_dim=64, tie_word_embeddings=True)
    save_model(make(config), config, tmp_path / "m")
    script = """
import sys, torch
from pathlib import Path
from arriero.formats.hf import load_model
def own():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0])
load_model(sys.argv[2])  # a small one first: libraries, caches
before = own()
model = load_model(sys.argv[1])
size = sum(p.numel() * 4 for p in model.parameters()) // 1024
spans = [tuple(int(x, 16) for x in line.split()[0].split("-"))
         for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("model.safetensors")]
inside = all(any(low <= p.data_ptr() < high for low, high in spans) for p in model.parameters())
print(size, own() - before, inside)
"""
    save_model(make(), CONFIG, tmp_path / "small")
    command = [sys.executable, "-c", script, str(tmp_path / "m"), str(tmp_path / "small")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    size, grown, inside = result.stdout.split()
    assert int(size) > 20_000
    assert int(grown) < int(size) * 0.1
    assert inside == "True"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


def test_saving_over_its_own_source_and_resharding(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_model(make(), CONFIG, folder, max_shard_size="12KB")
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "notes.txt").write_text("mine")
    model = load_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, CONFIG, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_model(folder).state_dict().items())
    save_model(model, CONFIG, folder, max_shard_size="12KB")
    assert not (folder / "model.safetensors").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_model(folder).state_dict().items())


def test_side_files_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    names = ["tokenizer.json", "tokenizer.model", "generation_config.json", "LICENSE", "NOTICE.txt", "USE_POLICY.md"]
    for name in [*names, "pytorch_model.bin", "README.md", "config.json"]:
        (source / name).write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("real")
    (source / "chat_template.jinja").symlink_to(tmp_path / "chat_template.jinja")  # as in the Hub's cache
    save_model(make(), CONFIG, tmp_path / "m", extra_files_from=source)
    found = {path.name for path in (tmp_path / "m").iterdir()}
    assert found == {*names, "chat_template.jinja", "config.json", "model.safetensors"}
    assert not (tmp_path / "m" / "chat_template.jinja").is_symlink()
    assert (tmp_path / "m" / "generation_config.json").read_text() == "{}"
    assert copy_side_files(source, source) == []


def test_chat_templates_with_names_go_along(tmp_path: Path) -> None:
    source, more = tmp_path / "source", "additional_chat_templates"
    (source / more).mkdir(parents=True)
    (source / "chat_template.jinja").write_text("plain")
    (source / "tokenizer_config.json").write_text('{"a": 1}')
    (source / more / "tool_use.jinja").write_text("tools é", encoding="utf-8")
    for _ in range(2):  # into a new folder, and into one that is there
        save_model(make(), CONFIG, tmp_path / "m", extra_files_from=source)
        files = read_tokenizer_files(tmp_path / "m")
        assert (files.chat_template, files.tool_template) == ("plain", "tools é")
        assert [path.name for path in (tmp_path / "m" / more).iterdir()] == ["tool_use.jinja"]
        (tmp_path / "m" / more / "tool_use.jinja").write_text("another")
    # for formats that have no folders, the older way
    read = read_side_files(source)
    assert set(read) == {"tokenizer_config.json"}
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "tokenizer_config.json").write_bytes(read["tokenizer_config.json"])
    files = read_tokenizer_files(tmp_path / "flat")
    assert (files.chat_template, files.tool_template, files.config["a"]) == ("plain", "tools é", 1)
    (source / "chat_template.jinja").unlink()
    assert read_side_files(source) == {"tokenizer_config.json": b'{"a": 1}'}  # which would have no default
    (source / more / "tool_use.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="no text that can be read"):
        read_side_files(source)


def test_a_full_disk_is_the_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`shutil.copyfile` names the source where the disk is full."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")

    def fails(number: int) -> None:
        def copy(read: Path, written: Path) -> None:
            raise OSError(number, os.strerror(number), str(read), None, str(written))

        monkeypatch.setattr("shutil.copyfile", copy)

    fails(errno.ENOSPC)
    with pytest.raises(FormatError) as caught:
        save_model(make(), CONFIG, tmp_path / "m", extra_files_from=source)
    assert str(caught.value).startswith(f"{tmp_path / 'm'}: the disk is full")
    assert not (tmp_path / "m").exists()
    fails(errno.EACCES)
    with pytest.raises(FormatError, match=r"source/tokenizer\.json: cannot be copied"):
        save_model(make(), CONFIG, tmp_path / "m", extra_files_from=source)


# Weights and configuration that do not fit


def edit(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(make(), CONFIG, tmp_path / "m")
    return tmp_path / "m"


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(FormatError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_missing_tensor(folder: Path) -> None:
    edit(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "missing", "model.layers.1.mlp.up_proj.weight")


def test_missing_head_when_untied(folder: Path) -> None:
    edit(folder, lambda state: state.pop("lm_head.weight"))
    refused(folder, "lm_head.weight", "tie_word_embeddings")


def test_unexpected_tensor(folder: Path) -> None:
    edit(folder, lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    refused(folder, "unexpected", "model.layers.0.self_attn.q_proj.bias")


def test_wrong_shape(folder: Path) -> None:
    edit(folder, lambda state: state.update({"model.norm.weight": torch.zeros(31)}))
    refused(folder, "model.norm.weight", "[31]", "[32]")


def test_wrong_dtype(folder: Path) -> None:
    edit(folder, lambda state: state.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}))
    refused(folder, "model.norm.weight", "float16")


def test_old_rotary_frequencies_are_ignored(folder: Path) -> None:
    expected = load_model(folder)(torch.arange(5)[None])
    edit(folder, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), 9.0)}))
    assert torch.equal(load_model(folder)(torch.arange(5)[None]), expected)


def test_tensor_in_two_shards(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model-00001-of-00002.safetensors")
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "model-00002-of-00002.safetensors")
    names = dict.fromkeys(state, "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(folder, "model.norm.weight", "too")


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "not a valid safetensors file")


def test_configuration_missing_or_lacking_a_key(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values.pop("hidden_size")
    (folder / "config.json").write_text(json.dumps(values))
    refused(folder, "hidden_size")
    (folder / "config.json").unlink()
    refused(folder, "config.json")


def test_tokenizer_of_another_model(folder: Path) -> None:
    tokenizer: dict[str, Any] = {"model": {"vocab": {"a": 0, "b": 95}}, "added_tokens": [{"id": 95, "content": "b"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    load_model(folder)
    tokenizer["added_tokens"].append({"id": 96, "content": "c"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(folder, "tokenizer.json", "96")
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "tokenizer.json", "JSON")


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a folder"):
        load_model(tmp_path / "nowhere")


def test_saving_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = dict(make().state_dict())
    with pytest.raises(FormatError, match=r"missing model\.norm\.weight"):
        save_model({k: v for k, v in state.items() if k != "model.norm.weight"}, CONFIG, tmp_path / "m")
    with pytest.raises(FormatError, match="head would be lost"):
        save_model(state, TIED, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# Disks that fail


@pytest.mark.parametrize("existing", [False, True], ids=["new folder", "existing folder"])
@pytest.mark.parametrize("step", ["open", "reserve", "write", "fsync", "replace", "write_text"])
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bool) -> None:
    folder = tmp_path / "m"
    if existing:
        save_model(make(seed=1), CONFIG, folder)
    before = tree(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: Any, **__: Any) -> None:
        raise full

    target = {
        "open": (staging.tempfile, "mkdtemp"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "reserve": (os, "posix_fallocate"),
        "write": (os, "pwrite"),
        "write_text": (Path, "write_text"),
    }[step]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(FormatError, match="disk is full") as caught:
        save_model(make(seed=2), CONFIG, folder, max_shard_size="12KB")
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["m"] if existing else [])


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", stop)
    with pytest.raises(KeyboardInterrupt):
        save_model(make(), CONFIG, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_real_limit_on_file_size(tmp_path: Path) -> None:
    """The kernel itself refuses the write (RLIMIT_FSIZE)."""
    script = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]) / "tests" / "unit"))
from test_hf_folder import CONFIG, make, save_model, FormatError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_model(make(), CONFIG, sys.argv[2])
except FormatError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(Path(__file__).parents[2]), str(tmp_path / "m")]
    result = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=True)
    assert "limit on file sizes" in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_real_full_disk(tmp_path: Path) -> None:
    """A file system of 64 KiB."""
    small = tmp_path / "small"
    small.mkdir()
    if not shutil.which("mount"):
        pytest.skip("no mount command")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        with pytest.raises(FormatError, match="disk is full"):
            save_model(make(), CONFIG, small / "m")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_target_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("x")
    with pytest.raises(FormatError, match="is a file, and a folder"):
        save_model(make(), CONFIG, tmp_path / "m")


def test_no_pickle_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", fail)
    monkeypatch.setattr(pickle, "Unpickler", fail)
    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(builtins, "eval", fail)
    load_model(folder)


def test_two_processes_make_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finishes between our writing and our renaming."""
    folder = tmp_path / "m"
    real, calls = os.replace, 0

    def replace_late(source: Any, destination: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            shutil.copytree(source, folder)
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace_late)
    save_model(make(), CONFIG, folder)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert torch.equal(load_model(folder).model.norm.weight, make().model.norm.weight)


def test_a_mount_point_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume of a container, say: nothing is renamed to it, nor moved there from another file system."""
    mounted, replace_file = tmp_path / "mounted", os.replace
    mounted.mkdir()

    def replace_within(source: Path, target: Path) -> None:
        if Path(target) == mounted:
            raise OSError(errno.EBUSY, "Device or resource busy")
        if Path(target).parent == mounted and mounted not in Path(source).parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", replace_within)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mounted)
    with staging.staged_folder(mounted) as place:
        (place / "config.json").write_text("{}")
    assert [path.name for path in mounted.iterdir()] == ["config.json"]

    def fail() -> None:
        with staging.staged_folder(mounted) as place:
            (place / "half").write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [path.name for path in mounted.iterdir()] == ["config.json"]
