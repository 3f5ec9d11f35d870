"""`arriero download` and `arriero upload` against a Hub on this machine (tests/fixtures/hub_server.py)."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))
from hub_server import HubServer, sha256

from arriero.cli import main
from arriero.data.tokenizer import load_tokenizer
from arriero.formats import hub_files
from arriero.formats.download import resolve_model, resolve_tokenizer
from arriero.formats.hf import load_model
from arriero.formats.receipt import RECEIPT

MEGABYTE = 10**6
CHUNK = constants.DOWNLOAD_CHUNK_SIZE
# How a test calls the command: its arguments, and a token.
Call = Callable[..., "Result"]


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = resolve_model("tiny-random-llama", tmp_path_factory.mktemp("source"))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECEIPT}


@pytest.fixture
def hub(model_files: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("some/model", {**model_files, "LICENSE": b"a licence"})
        server.tokens = {"hf_reads": ("some", "read"), "hf_writes": ("some", "write"), "hf_other": ("other", "write")}
        yield server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, for the Hub's library (which reads its environment when it is imported) and for us."""
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(logging, "raiseExceptions", False)  # the library logs to the standard error of the first test
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 5)
    return tmp_path / "home"


@pytest.fixture
def call(hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """The command, in this process."""

    def run(*arguments: str, token: str = "", endpoint: str = hub.endpoint, offline: bool = False) -> Result:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        capfd.readouterr()
        code = main(list(arguments))
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def folder_of(result: Result) -> Path:
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip().splitlines()[-1])


def line_of(result: Result) -> str:
    """The one line of a refusal."""
    assert result.returncode == 2, result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("arriero: ")
    return line


# Download


def test_model_comes_whole_and_once(hub: HubServer, call: Call, model_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.repositories["some/model"].commit(
        {
            **model_files,
            "LICENSE": b"a licence",
            "pytorch_model.bin": b"\x80\x04.",
            "training_args.bin": b"x",
            "consolidated.safetensors": b"x",
            "onnx/model.onnx": b"x",
            "modeling_evil.py": b"raise SystemExit",
        }
    )
    result = call("download", "some/model")
    folder = folder_of(result)
    assert folder.is_relative_to(tmp_path / "home" / "hub")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {**model_files, "LICENSE": b"a licence"}
    assert "LICENSE" in result.stderr
    load_model(folder)
    (asked,) = hub.transfers()
    assert asked.range is None
    assert asked.sent == len(model_files["model.safetensors"])
    # Unchanged files do not come again; a plain folder can be asked for, and its files are looked at.
    hub.requests.clear()
    folder_of(call("download", "some/model"))
    assert not hub.transfers()
    plain = tmp_path / "plain"
    folder_of(call("download", "some/model", "--output_dir", str(plain)))
    weights = plain / "model.safetensors"
    assert weights.read_bytes() == model_files["model.safetensors"]
    hub.requests.clear()
    folder_of(call("download", "some/model", "--output_dir", str(plain)))
    assert not hub.transfers()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    folder_of(call("download", "some/model", "--output_dir", str(plain)))
    assert weights.read_bytes() == model_files["model.safetensors"]
    # Without the Hub, what the cache holds serves.
    assert folder_of(call("download", "some/model", offline=True)) == folder
    assert folder_of(call("download", "some/model", endpoint="http://127.0.0.1:9")) == folder


def test_new_commit_brings_only_what_changed(hub: HubServer, call: Call, model_files: dict[str, bytes]) -> None:
    first = folder_of(call("download", "some/model"))
    old = hub.repositories["some/model"].branches["main"]
    hub.repositories["some/model"].commit({**model_files, "generation_config.json": b"{}"})
    hub.requests.clear()
    second = folder_of(call("download", "some/model"))
    assert second != first
    assert not hub.transfers()
    assert (second / "generation_config.json").read_bytes() == b"{}"
    assert folder_of(call("download", "some/model", "--revision", old)) == first
    assert "no such revision" in line_of(call("download", "some/model", "--revision", "v9"))


def test_cut_transfer_goes_on_in_the_same_call(hub: HubServer, call: Call, model_files: dict[str, bytes]) -> None:
    """A cut connection is taken up where it stopped (whole chunks are kept)."""
    weights = os.urandom(12 * MEGABYTE)
    hub.add("some/big", {"config.json": model_files["config.json"], "model.safetensors": weights})
    hub.cuts = [11 * MEGABYTE]
    folder = folder_of(call("download", "some/big"))
    first, second = hub.transfers()
    assert first.range is None
    assert second.range == f"bytes={CHUNK}-"
    assert second.sent == len(weights) - CHUNK
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("plain", [False, True])
def test_ended_transfer_goes_on_in_the_next_call(
    hub: HubServer,
    call: Call,
    model_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plain: bool,
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    weights = os.urandom(12 * MEGABYTE)
    hub.add("some/big", {"config.json": model_files["config.json"], "model.safetensors": weights})
    command = ["download", "some/big", *(["--output_dir", str(tmp_path / "plain")] if plain else [])]
    hub.cuts = [11 * MEGABYTE] + [0] * 9
    assert "run it again, what has come so far is kept" in line_of(call(*command))
    hub.cuts = []
    (partial,) = (path for path in tmp_path.rglob("*.incomplete"))
    assert partial.read_bytes() == weights[:CHUNK]
    assert not list(tmp_path.rglob("model.safetensors"))
    hub.requests.clear()
    folder = folder_of(call(*command))
    (asked,) = hub.transfers()
    assert asked.range == f"bytes={CHUNK}-"
    assert asked.sent == len(weights) - CHUNK
    assert (folder / "model.safetensors").read_bytes() == weights
    assert not partial.exists()
    # A partial file that is no beginning of the file is found out.
    (folder / "model.safetensors").resolve().unlink()
    partial.write_bytes(b"x" * MEGABYTE)
    assert "the Hub lists SHA-256" in line_of(call(*command))
    folder = folder_of(call(*command))
    assert (folder / "model.safetensors").read_bytes() == weights
    # A store that knows no ranges sends all of it.
    (folder / "model.safetensors").resolve().unlink()
    partial.write_bytes(weights[:MEGABYTE])
    hub.ranges = False
    assert (folder_of(call(*command)) / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("plain", [False, True])
def test_wrong_content_is_not_kept(
    hub: HubServer, call: Call, model_files: dict[str, bytes], tmp_path: Path, plain: bool
) -> None:
    weights = model_files["model.safetensors"]
    wrong = bytearray(weights)
    wrong[len(wrong) // 2] ^= 1
    hub.falsified = {sha256(weights): bytes(wrong)}
    command = ["download", "some/model", *(["--output_dir", str(tmp_path / "plain")] if plain else [])]
    line = line_of(call(*command))
    assert f"model.safetensors came as {sha256(bytes(wrong))}, but the Hub lists SHA-256 {sha256(weights)}" in line
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert bytes(wrong) not in kept
    hub.falsified = {sha256(weights): weights[:-1]}
    assert "the download failed" in line_of(call(*command))
    hub.falsified = {}
    assert (folder_of(call(*command)) / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("plain", [False, True])
def test_what_the_library_fetches_is_checked_too(
    hub: HubServer,
    call: Call,
    model_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plain: bool,
) -> None:
    """Files that the Hub holds in chunks are left to the Hub's library."""
    monkeypatch.setattr("huggingface_hub.file_download.is_xet_available", lambda: True)
    monkeypatch.setattr("arriero.formats.hub_files._transfer", None)
    hub.names_chunks = True
    weights = model_files["model.safetensors"]
    wrong = bytearray(weights)
    wrong[-1] ^= 1
    hub.falsified = {sha256(weights): bytes(wrong)}
    command = ["download", "some/model", *(["--output_dir", str(tmp_path / "plain")] if plain else [])]
    assert "it was removed, run it again" in line_of(call(*command))
    assert bytes(wrong) not in [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    hub.falsified = {}
    assert (folder_of(call(*command)) / "model.safetensors").read_bytes() == weights
    hub.requests.clear()
    folder_of(call(*command))
    assert not hub.transfers()


def test_a_hub_that_lies_about_hashes(hub: HubServer, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub_server.sha256", lambda _: "../../../../outside")
    assert "no valid SHA-256" in line_of(call("download", "some/model"))


def test_private_and_gated_models_need_a_token(hub: HubServer, call: Call) -> None:
    repository = hub.repositories["some/model"]
    repository.private = True
    assert "log in: HF_TOKEN or `hf auth login`" in line_of(call("download", "some/model"))
    assert "give another token" in line_of(call("download", "some/model", token="hf_other"))
    assert "does not accept the token" in line_of(call("download", "some/model", token="hf_wrong"))
    hub.requests.clear()
    folder_of(call("download", "some/model", token="hf_reads"))
    # The token goes to the Hub alone.
    assert {asked.authorization for asked in hub.requests if asked not in hub.transfers()} == {"Bearer hf_reads"}
    assert [asked.authorization for asked in hub.transfers()] == [None]
    hub.add("gated/model", dict(repository.files), gated=True)
    line = line_of(call("download", "gated/model"))
    assert f"accept its licence at {hub.endpoint}/gated/model and log in" in line
    assert "is gated" in line_of(call("download", "gated/model", token="hf_reads"))
    hub.let_in = {"some"}
    folder_of(call("download", "gated/model", token="hf_reads"))


def test_failures_are_one_line(hub: HubServer, call: Call, model_files: dict[str, bytes]) -> None:
    assert "there is no such model on the Hub" in line_of(call("download", "some/other"))
    assert "cannot be reached" in line_of(call("download", "some/model", endpoint="http://127.0.0.1:9"))
    assert "HF_HUB_OFFLINE" in line_of(call("download", "some/model", offline=True))
    hub.broken = 500
    assert "the download failed" in line_of(call("download", "some/model"))
    hub.broken = 0
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    shards = {"model.safetensors.index.json": index.encode(), "model-00001-of-00002.safetensors": b"x"}
    hub.add("some/half", {"config.json": model_files["config.json"], **shards})
    assert "is not a whole model" in line_of(call("download", "some/half"))
    hub.add("some/code", {"config.json": b"{}", "model.py": b"", "tf_model.h5": b""})
    assert "has no weights of a kind that is read here" in line_of(call("download", "some/code"))
    hub.add("some/weights", {"model.safetensors": b"x"})
    assert "has no config.json" in line_of(call("download", "some/weights"))
    hub.add("some/pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    assert "its adapter is a pickle" in line_of(call("download", "some/pickle"))
    assert not hub.transfers()[1:]  # of the half model alone, nothing is fetched in vain


def test_other_kinds_of_repository(hub: HubServer, call: Call, model_files: dict[str, bytes], tmp_path: Path) -> None:
    side = {name: data for name, data in model_files.items() if not name.endswith(".safetensors")}
    hub.add("some/torch", {**side, "pytorch_model.bin": b"PK", "optimizer.pt": b"x", "training_args.bin": b"x"})
    result = call("download", "some/torch")
    folder = folder_of(result)
    assert {path.name for path in folder.iterdir()} == {*side, "pytorch_model.bin"}
    assert f"has PyTorch weights; make a model folder of them: `arriero convert {folder} OUTPUT`" in result.stderr
    hub.add("some/gguf", {"small.gguf": b"GGUF small", "big.gguf": b"GGUF big", "README.md": b""})
    line = line_of(call("download", "some/gguf"))
    assert "`arriero download some/gguf --file NAME`: big.gguf (0.00 GB), small.gguf" in line
    file = folder_of(call("download", "some/gguf", "--file", "small.gguf"))
    assert file.read_bytes() == b"GGUF small"
    assert [path.name for path in file.parent.iterdir()] == ["small.gguf"]
    file = folder_of(call("download", "some/gguf", "--file", "small.gguf", "--output_dir", str(tmp_path / "out")))
    assert file == tmp_path / "out" / "small.gguf"
    assert file.read_bytes() == b"GGUF small"
    assert "has no file 'smal.gguf'; did you mean small.gguf?" in line_of(
        call("download", "some/gguf", "--file", "smal.gguf")
    )
    assert "give its id owner/name" in line_of(call("download", "tiny-random-llama", "--file", "x.gguf"))
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    hub.add("some/adapter", {**adapter, "README.md": b""})
    folder = folder_of(call("download", "some/adapter"))
    assert {path.name for path in folder.iterdir()} == {*adapter}


def test_the_cache_serves_a_folder_without_the_hub(
    hub: HubServer, call: Call, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    command = ("download", "some/model", "--output_dir", str(plain))
    assert "is not in the local cache" in line_of(call(*command, offline=True))
    folder_of(call("download", "some/model"))
    for more in ({"offline": True}, {"endpoint": "http://127.0.0.1:9"}):
        assert folder_of(call(*command, **more)) == plain
        found = {path.name: path.read_bytes() for path in plain.iterdir() if path.is_file()}
        assert found == {**model_files, "LICENSE": b"a licence"}
        assert not any(path.is_symlink() for path in plain.iterdir())
        load_model(plain)
        (plain / "model.safetensors").write_bytes(b"another")
    one = ("download", "some/model", "--file", "config.json", "--output_dir", str(tmp_path / "one"))
    assert folder_of(call(*one, offline=True)).read_bytes() == model_files["config.json"]
    assert os.listdir(tmp_path / "one") == ["config.json"]


def test_the_cache_serves_only_where_the_hub_is_out_of_reach(hub: HubServer, call: Call, tmp_path: Path) -> None:
    repository = hub.repositories["some/model"]
    served = repository.branches["main"]
    folder = folder_of(call("download", "some/model"))
    repository.commit({**repository.files, "README.md": b"newer"})
    for more, reason in (
        ({"offline": True}, "HF_HUB_OFFLINE is set"),
        ({"endpoint": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ):
        hub_files._tell_served.cache_clear()  # each command is a process of its own
        done = call("download", "some/model", **more)
        assert folder_of(done) == folder
        assert done.stderr.splitlines().count(f"some/model: {reason}; the cache serves commit {served}") == 1
    to_folder = ("download", "some/model", "--output_dir", str(tmp_path / "out"))
    repository.private = True
    for command in (("download", "some/model"), to_folder):
        assert "there is no such model on the Hub, or it is private" in line_of(call(*command))
        assert "does not accept the token" in line_of(call(*command, token="hf_wrong"))
    repository.private, repository.gated = False, True
    assert "is gated" in line_of(call("download", "some/model"))
    repository.gated = False
    assert "no such revision" in line_of(call("download", "some/model", "--revision", "gone"))
    hub.broken = 500
    assert "the download failed" in line_of(call(*to_folder))
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_to_download_into(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for more in ([], ["--file", "config.json"]):
        line = line_of(call("download", "some/model", "--output_dir", str(tmp_path / "file"), *more))
        assert f"{tmp_path / 'file'}: is a file, and a folder is to be written" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["../evil.safetensors", "..\\evil.safetensors", "a/../../evil.safetensors"])
def test_names_that_lead_out_of_the_folder(name: str, hub: HubServer, call: Call, tmp_path: Path) -> None:
    files = hub.repositories["some/model"].files
    hub.add("some/evil", {**files, name: b"x"})
    line = line_of(call("download", "some/evil", "--file", name))
    assert f"--file {name!r} leads out of its folder" in line
    if "/" not in name:  # those in folders are not wanted
        assert "leads out of its folder" in line_of(call("download", "some/evil"))
        assert "leads out" in line_of(call("download", "some/evil", "--output_dir", str(tmp_path / "plain")))
    assert not [path for path in tmp_path.rglob("*") if "evil.safetensors" in path.name]


def test_templates_with_names_come_too(hub: HubServer, call: Call, model_files: dict[str, bytes]) -> None:
    more = {"additional_chat_templates/tool_use.jinja": b"tools", "chat_template.jinja": b"plain"}
    other = {"onnx/config.json": b"{}", "additional_chat_templates/config.json": b"{}", "x/tool_use.jinja": b""}
    hub.add("some/tools", {**model_files, **more, **other})
    for folder in (folder_of(call("download", "some/tools")), resolve_tokenizer("some/tools")):
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert found == {*model_files, *more}
        assert load_tokenizer(folder).tool_template == "tools"
    assert folder_of(call("download", "some/tools", offline=True)) == folder


# Upload


@pytest.fixture
def folder(tmp_path: Path, model_files: dict[str, bytes]) -> Path:
    """A model with everything around it that a run leaves."""
    place = tmp_path / "mine"
    place.mkdir()
    for name, content in model_files.items():
        (place / name).write_bytes(content)
    (place / "LICENSE").write_text("\n   Apache License\n   Version 2.0, January 2004\n")
    for name in (
        "optimizer/state.safetensors",
        "checkpoint-4/model.safetensors",
        "logs/metrics.jsonl",
        "trainer_state.json",
    ):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("{}")
    return place


def test_upload_and_back(
    hub: HubServer, call: Call, folder: Path, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    before = sorted(folder.rglob("*"))
    result = call("upload", str(folder), "some/new", "--private", token="hf_writes")
    assert result.returncode == 0, result.stderr
    repository = hub.repositories["some/new"]
    commit = repository.branches["main"]
    assert result.stdout.strip() == f"{hub.endpoint}/some/new/commit/{commit}"
    assert repository.private
    size = sum(map(len, model_files.values())) + (folder / "LICENSE").stat().st_size
    assert f"some/new: the model, {len(model_files) + 1} files, {size / 1e6:.2f} MB; private, new" in result.stderr
    assert "model.safetensors  " in result.stderr
    published = dict(repository.files)
    card = published.pop("README.md").decode()
    published.pop(".gitattributes")
    assert published == {**model_files, "LICENSE": (folder / "LICENSE").read_bytes()}
    head = yaml.safe_load(card.split("---")[1])
    tags = ["llama", "arriero"]
    expected = {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    assert head == expected
    assert "arriero chat some/new" in card
    assert sorted(folder.rglob("*")) == before
    got = folder_of(call("download", "some/new", token="hf_writes"))
    for name, content in model_files.items():
        assert (got / name).read_bytes() == content
    # What is there already is not sent again; a card of the Hub stays.
    hub.requests.clear()
    repository.commit({**repository.files, "README.md": b"---\nlicense: mit\n---\nmine"})
    (folder / "generation_config.json").write_text("{}")
    assert call("upload", str(folder), "some/new", "--commit_message", "again", token="hf_writes").returncode == 0
    assert not hub.transfers("PUT")
    assert repository.messages[-1] == "again"
    assert repository.files["generation_config.json"] == b"{}"
    assert repository.files["README.md"].endswith(b"mine")


def test_branches_and_pull_requests(hub: HubServer, call: Call, folder: Path) -> None:
    repository = hub.repositories["some/model"]
    main_before = repository.branches["main"]
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmy own card")
    upload = ["upload", str(folder), "some/model"]
    result = call(*upload, "--create_pr", token="hf_writes")
    assert result.stdout.strip() == f"{hub.endpoint}/some/model/discussions/1", result.stderr
    result = call(*upload, "--revision", "next", "--include", "logs/*.jsonl,trainer_state.json", token="hf_writes")
    assert result.returncode == 0, result.stderr
    assert repository.branches["main"] == main_before
    published = repository.commits[repository.branches["next"]]
    assert {"logs/metrics.jsonl", "trainer_state.json"} <= set(published)
    assert published["README.md"].endswith(b"my own card")
    assert "is not on the Hub" in line_of(call("upload", str(folder), "some/none", "--create_pr", token="hf_writes"))


def test_shards_take_the_place_of_what_was_there(hub: HubServer, call: Call, folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    assert main(["convert", str(folder), str(sharded), "--max_shard_size", "1MB"]) == 0
    names = {path.name for path in sharded.glob("model-*.safetensors")}
    assert len(names) > 1
    assert call("upload", str(sharded), "some/model", token="hf_writes").returncode == 0
    files = hub.repositories["some/model"].files
    assert {name for name in files if name.endswith(".safetensors")} == names
    assert files["model.safetensors.index.json"] == (sharded / "model.safetensors.index.json").read_bytes()
    got = folder_of(call("download", "some/model"))
    assert {path.name for path in got.glob("*.safetensors")} == names
    # A shard is missing: nothing is made on the Hub.
    (sharded / min(names)).unlink()
    hub.requests.clear()
    assert f"names the file {min(names)!r}, which is missing" in line_of(
        call("upload", str(sharded), "some/half", token="hf_writes")
    )
    assert not hub.requests


def test_adapters_and_gguf_files(hub: HubServer, call: Call, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    assert "has adapter_config.json and no adapter_model.safetensors" in line_of(
        call("upload", str(adapter), "some/adapter", token="hf_writes")
    )
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    result = call("upload", str(adapter), "some/adapter", "--license", "llama3.2", token="hf_writes")
    assert result.returncode == 0, result.stderr
    head = yaml.safe_load(hub.repositories["some/adapter"].files["README.md"].decode().split("---")[1])
    assert (head["base_model"], head["library_name"], head["license"]) == ("some/model", "peft", "llama3.2")
    got = folder_of(call("download", "some/adapter"))
    assert (got / "adapter_model.safetensors").read_bytes() == b"weights"
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/secret project"}))
    result = call("upload", str(adapter), "some/local", token="hf_writes")
    assert "names a base that is not on the Hub" in result.stderr
    assert b"secret" not in hub.repositories["some/local"].files["README.md"]
    (tmp_path / "m.gguf").write_bytes(b"GGUF and more")
    assert call("upload", str(tmp_path / "m.gguf"), "some/gguf", token="hf_writes").returncode == 0
    files = hub.repositories["some/gguf"].files
    assert set(files) == {".gitattributes", "README.md", "m.gguf"}
    assert b"arriero download some/gguf --file m.gguf" in files["README.md"]
    assert folder_of(call("download", "some/gguf", "--file", "m.gguf")).read_bytes() == b"GGUF and more"


def test_uploads_that_are_refused(hub: HubServer, call: Call, folder: Path, tmp_path: Path) -> None:
    def refused(*arguments: str, token: str = "hf_writes") -> str:
        hub.requests.clear()
        line = line_of(call("upload", *arguments, token=token))
        assert not hub.transfers("PUT")
        assert not any("/commit/" in asked.path for asked in hub.requests)
        return line

    mine = str(folder)
    assert "an upload needs a token; set HF_TOKEN or run `hf auth login`" in refused(mine, "some/new", token="")
    assert "the token 'test' of some may only read" in refused(mine, "some/new", token="hf_reads")
    assert "does not accept the token" in refused(mine, "some/new", token="hf_wrong")
    assert "does not allow this to the token's account" in refused(mine, "some/new", token="hf_other")
    assert "does not allow this to the token's account" in refused(mine, "some/model", token="hf_other")
    assert "is public on the Hub already" in refused(mine, "some/model", "--private")
    assert "is no Hub id" in refused(mine, "new")
    assert "neither a folder nor a .gguf file" in refused(str(tmp_path / "nothing"), "some/new")
    assert "leads out of" in refused(mine, "some/new", "--include", "../*")
    assert "matches no file" in refused(mine, "some/new", "--include", "*.csv")
    assert "no name of a licence" in refused(mine, "some/new", "--license", "My own: [terms]")
    (tmp_path / "x.gguf").write_bytes(b"PK")
    assert "is no GGUF file" in refused(str(tmp_path / "x.gguf"), "some/new")
    (tmp_path / "empty").mkdir()
    assert "is no model and no adapter" in refused(str(tmp_path / "empty"), "some/new")
    assert set(hub.repositories) == {"some/model"}
    hub.broken = 503
    assert "the upload failed" in refused(mine, "some/new")
    hub.broken = 0
    line = line_of(call("upload", mine, "some/new", token="hf_writes", endpoint="http://127.0.0.1:9"))
    assert "cannot be reached" in line


def test_push_at_the_end_of_a_run(hub: HubServer, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"src": "one", "tgt": "two"}\n' * 4)
    train = ["finetune", "--model_name_or_path", "some/model", "--dataset_path", "data", "--max_steps", "1"]
    train += [
        "--report_to",
        "none",
        "--disable_tqdm",
        "True",
        "--lora",
        "--push_to_hub",
        "--hub_model_id",
        "some/tuned",
    ]
    result = call(*train, "--output_dir", "run", "--hub_private_repo", token="hf_writes")
    assert result.returncode == 0, result.stderr
    repository = hub.repositories["some/tuned"]
    assert repository.private
    assert result.stdout.strip().endswith(f"/some/tuned/commit/{repository.branches['main']}")
    assert (
        repository.files["adapter_model.safetensors"] == (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    )
    assert b"base_model: some/model" in repository.files["README.md"]
    assert not any("checkpoint" in name or "log" in name or "state" in name for name in repository.files)
    # Refused before the run.
    more = [*train, "--output_dir", "other"]
    assert "an upload needs a token" in line_of(call(*more))
    assert "may only read" in line_of(call(*more, token="hf_reads"))
    assert "--do_train no" in line_of(call(*more, "--do_train", "no", "--do_eval", token="hf_writes"))
    assert "a whole model" in line_of(call(*more, "--save_sharded_model", token="hf_writes"))
    assert "needs the repository" in line_of(call(*train[:-2], "--output_dir", "other", token="hf_writes"))
    assert not (tmp_path / "other").exists()
    # Failed after it: the model stays.
    line = line_of(call(*train[:-1], "another/name", "--output_dir", "kept", token="hf_writes"))
    assert "does not allow this" in line
    assert "to try again: arriero upload kept another/name" in line
    assert (tmp_path / "kept" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_hub_of_the_environment(hub: HubServer, home: Path, arriero: Callable[..., Any]) -> None:
    """In a process of its own: HF_ENDPOINT and HF_TOKEN name the Hub and the token."""
    hub.repositories["some/model"].private = True
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_reads", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    result = arriero("download", "some/model", **variables)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(home)
