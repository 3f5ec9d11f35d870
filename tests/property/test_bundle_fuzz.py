"""Manifests with any values: a bundle opens as it was written, or says in one line why not."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from arriero.bundles.inspecting import inspect_bundle
from arriero.bundles.running import default_length
from arriero.commands.inspect import InspectOptions
from arriero.commands.inspect import run as run_inspect
from arriero.errors import ArrieroError
from arriero.export.bundle import MANIFEST, Manifest, new_bundle, open_bundle, write_manifest
from arriero.formats.bundle_folder import is_bundle

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["onnx", "any", "..", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    with new_bundle(folder) as staging:
        (staging / "model.onnx").write_bytes(b"graph")
        (staging / "weights.bin").write_bytes(b"weights")
        manifest = Manifest(
            kind="onnx",
            graph="model.onnx",
            weights="fp32",
            context=64,
            config={"vocab_size": 61},
            generation={"max_new_tokens": 9},
            check={},
            versions={"onnxruntime": "1.32.0"},
        )
        write_manifest(staging, manifest)
    return folder


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is, at any depth."""
    for key in list(values) if isinstance(values, dict) else ():
        yield (*path, key)
        yield from places(values[key], (*path, key))


def changed(values: dict[str, Any], where: tuple[Any, ...], what: Any, how: str) -> dict[str, Any]:
    """A value replaced, removed, or under another name."""
    new = copy.deepcopy(values)
    inner = new
    for key in where[:-1]:
        inner = inner[key]
    if how == "replace":
        inner[where[-1]] = what
    elif how == "remove":
        del inner[where[-1]]
    else:
        inner[str(what)] = inner.pop(where[-1])
    return new


@given(data=st.data())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values(bundle: Path, data: st.DataObject) -> None:
    original = (bundle / MANIFEST).read_text()
    values = json.loads(original)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(sorted(places(values), key=str)))
        how = data.draw(st.sampled_from(["replace", "remove", "rename"]))
        values = changed(values, where, data.draw(JSON), how)
        if not values:
            break
    read(bundle, json.dumps(values).encode(), original)


@given(content=st.binary(max_size=40))
@example(b"")
@example(b"\xff\xfe")
@example(b"[" * 100_000)
@example(b'{"kind": "onnx", "files": {}, "format": 1}')
@example(b'{"format": 1e999, "kind": NaN}')
@example(b'{"kind": "onnx", "format": 1, "files": {"a": {"size": ' + b"9" * 10_000 + b"}}}")
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(bundle: Path, content: bytes) -> None:
    read(bundle, content, (bundle / MANIFEST).read_text())


def read(bundle: Path, content: bytes, original: str) -> None:
    """It is refused, or nothing that counts was changed."""
    said = ""
    try:
        (bundle / MANIFEST).write_bytes(content)
        is_bundle(bundle)
        opened = open_bundle(bundle)
        assert opened.graph.is_file()
        assert opened.graph.parent == bundle
        assert set(opened.manifest.files) == {"model.onnx", "weights.bin"}
        assert 0 <= opened.manifest.prefix_length < opened.manifest.context
        assert default_length(opened) >= 1
        assert inspect_bundle(bundle).facts["bundle"]["unusable"] is None
    except ArrieroError as error:
        said = str(error)
    try:
        if is_bundle(bundle):  # whatever is wrong with it, it can be looked at, or is refused
            run_inspect(InspectOptions(path=str(bundle)))
            run_inspect(InspectOptions(path=str(bundle), json=True))
    except ArrieroError as error:
        said = max(said, str(error), key=len)
    finally:
        (bundle / MANIFEST).write_text(original)
    assert len(said) < 1000


@given(name=st.text(max_size=12) | st.sampled_from(["../x", "/etc/passwd", "a/b", "..", ".", "a\0b", "\ud800"]))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_leads_out_of_the_folder(bundle: Path, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    values = json.loads((bundle / MANIFEST).read_text())
    values["files"][name] = values["files"].pop("weights.bin")
    copy_of = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("copy") / "bundle"))
    (copy_of / MANIFEST).write_text(json.dumps(values))
    if name != "weights.bin":
        with pytest.raises(ArrieroError):
            open_bundle(copy_of)
