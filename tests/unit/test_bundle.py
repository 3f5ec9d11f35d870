"""A bundle is opened only as it was written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import FormatError
from arriero.export.bundle import MANIFEST, Manifest, new_bundle, open_bundle, write_manifest

RUNTIME = "1.32.0"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the version of ONNX Runtime that is installed."""

    def install(version: str) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)

    install(RUNTIME)
    return install


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "kind": "onnx",
        "graph": "model.onnx",
        "weights": "fp32",
        "context": 64,
        "config": {"vocab_size": 61},
        "generation": {"eos_token_id": 2},
        "check": {"largest_difference": 1e-6},
        "versions": {"onnxruntime": RUNTIME},
    }
    return Manifest(**values | changes)


def write(folder: Path, **changes: Any) -> Path:
    with new_bundle(folder) as staging:
        (staging / "model.onnx").write_bytes(b"graph")
        (staging / "weights.bin").write_bytes(b"weights")
        (staging / "config.json").write_text("{}")
        write_manifest(staging, manifest(**changes))
    return folder


@pytest.fixture
def bundle(tmp_path: Path, installed: Callable[[str], None]) -> Path:
    return write(tmp_path / "bundle")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, text: str) -> None:
    with pytest.raises(FormatError, match=text) as error:
        open_bundle(folder)
    assert "\n" not in str(error.value)


def test_it_opens_as_written(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.graph == bundle / "model.onnx"
    assert (opened.manifest.config, opened.manifest.context) == ({"vocab_size": 61}, 64)
    assert set(opened.manifest.files) == {"model.onnx", "weights.bin", "config.json"}
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]  # nothing temporary is left


def test_what_a_killed_export_left_is_removed(tmp_path: Path, installed: Callable[[str], None]) -> None:
    place = tmp_path / "bundle"
    killed = (
        "import os, sys\nfrom arriero.export.bundle import new_bundle\n"
        "with new_bundle(sys.argv[1]) as staging:\n    (staging / 'weights.bin').touch()\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", killed, str(place)], check=False)
    assert done.returncode == -9
    other = tmp_path / ".bundle-2.abcdefgh.tmp"  # of another place
    other.mkdir()
    with new_bundle(place) as alive:
        for folder in tmp_path.iterdir():
            os.utime(folder, (0, 0))
        write(place)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, alive.name, "bundle"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "bundle"]


def test_the_hashes_are_those_of_sha256sum(bundle: Path) -> None:
    told = subprocess.run(["sha256sum", str(bundle / "weights.bin")], capture_output=True, text=True, check=True)
    known = told.stdout.split()[0]
    assert json.loads((bundle / MANIFEST).read_text())["files"]["weights.bin"] == {"size": 7, "sha256": known}


def test_a_missing_folder_or_manifest(bundle: Path) -> None:
    refused(bundle / "nowhere", "is not a folder")
    (bundle / MANIFEST).unlink()
    refused(bundle, "manifest.json: cannot be read .* interrupted")


def test_a_missing_file(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    refused(bundle, "weights.bin: is missing")


def test_a_shorter_file(bundle: Path) -> None:
    (bundle / "weights.bin").write_bytes(b"weight")
    refused(bundle, "weights.bin: has 6 bytes, and 7 were written")


def test_an_edited_file(bundle: Path) -> None:
    (bundle / "weights.bin").write_bytes(b"Weights")
    refused(bundle, "weights.bin: is not what was written")


def test_an_extra_file(bundle: Path) -> None:
    (bundle / "more.bin").write_bytes(b"")
    refused(bundle, "more.bin is not part of the bundle")


def test_a_link_even_to_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "weights.bin", tmp_path / "outside.bin")
    os.symlink(tmp_path / "outside.bin", bundle / "weights.bin")
    refused(bundle, "weights.bin: is no regular file")


def test_a_pipe_is_not_read(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    os.mkfifo(bundle / "weights.bin")
    refused(bundle, "weights.bin: is no regular file")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0b", "x" * 300, MANIFEST])
def test_a_name_that_is_not_a_plain_one(bundle: Path, name: str) -> None:
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit(bundle, files={**files, name: {"size": 1, "sha256": "0" * 64}})
    refused(bundle, "only plain names")


def test_a_graph_that_is_not_among_the_files(bundle: Path) -> None:
    edit(bundle, graph="../model.onnx")
    refused(bundle, "which is not among its files")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "tensorrt"}, "the kind 'tensorrt' is not known"),
        ({"kind": None}, "the kind 'None' is not known"),
        ({"format": 2}, "is of format 2, and this version of arriero reads 1"),
        ({"context": "64"}, "context must be a whole number"),
        ({"context": True}, "context must be a whole number"),
        ({"config": []}, "config must be a JSON object"),
        ({"files": None}, "files must be a JSON object"),
        ({"files": {"model.onnx": {"size": 5}}}, "lacks the size or SHA-256 of model.onnx"),
        ({"versions": {}}, "does not say which version of onnxruntime"),
        ({"versions": {"onnxruntime": "new"}}, "does not say which version of onnxruntime"),
        ({"isa": "vax"}, "of the kind vax"),
    ],
)
def test_a_manifest_that_says_something_else(bundle: Path, changes: dict[str, Any], text: str) -> None:
    edit(bundle, **changes)
    refused(bundle, text)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1', "[" * 100_000])
def test_a_manifest_that_is_none(bundle: Path, content: str) -> None:
    (bundle / MANIFEST).write_text(content)
    refused(bundle, "manifest.json: (is not valid JSON|must hold a JSON object)")


@pytest.mark.parametrize(
    ("version", "opens"), [("1.32.5", True), ("1.40.0", True), ("1.31.9", False), ("2.0.0", False)]
)
def test_another_runtime(bundle: Path, installed: Callable[[str], None], version: str, opens: bool) -> None:
    installed(version)
    if opens:
        open_bundle(bundle)
    else:
        refused(bundle, rf"is made for onnxruntime 1.32.0, and {version} is installed: pip install")


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match="holds other files"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_older_bundle_is_replaced_whole(bundle: Path) -> None:
    with new_bundle(bundle) as staging:
        (staging / "model.onnx").write_bytes(b"new")
        write_manifest(staging, manifest())
    assert sorted(path.name for path in bundle.iterdir()) == [MANIFEST, "model.onnx"]
    open_bundle(bundle)


def fail_half_way(folder: Path) -> None:
    with new_bundle(folder) as staging:
        (staging / "model.onnx").write_bytes(b"half")
        raise RuntimeError("stop")


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
