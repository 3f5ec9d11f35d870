"""Whatever the files of a model or an adapter hold, they are read or refused with one line, for every format."""

from __future__ import annotations

import copy
import io
import json
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from byte_changes import change_bytes  # noqa: E402
from format_files import FORMATS  # noqa: E402
from watched_reading import read_watched  # noqa: E402

FEW, MANY = 150, 5000
NUMBERS = [0, 1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1]
STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**40, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "x", "../secret", "/etc/passwd", "a" * 3000, "é\n", "(a+)+$", "(", ".*", "float8_e4m3fn", "bfloat16", "LORA"),
    *([], {}, [None], [[1, 2], [3]], {"a": 1}, [2**40, 2**40], [-1], ["q_proj", 3], {"rope_type": "yarn"}, [[]] * 50),
]
PIECES = st.one_of(
    st.integers(0, 255).map(lambda value: bytes([value])),
    st.sampled_from(NUMBERS[:9]).map(lambda value: struct.pack("<I", value)),
    st.sampled_from(NUMBERS).map(lambda value: struct.pack("<Q", value)),
    st.sampled_from(
        [b"cos\nsystem\n", b"cbuiltins\neval\n", b")R", b"b", b"\x81", b"{", b"}", b"[" * 2000, b'"', b"\n"]
    ),
    st.sampled_from([b"-1", b"1e999", b"9" * 5000, b"null", b"../", b"PK\x05\x06", b"PK\x01\x02"]),
    st.binary(max_size=12),
)


@cache
def honest(kind: str) -> dict[str, bytes]:
    """The files of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        FORMATS[kind].make(Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def opened(content: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """What a container describes itself with, and how to put a changed one into its place, lengths and checksums right."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        described = next(data for name, data in members if name.endswith("/data.pkl"))
    except (zipfile.BadZipFile, StopIteration, NotImplementedError, ValueError, EOFError):
        pass
    else:

        def zipped(inner: bytes) -> bytes:
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w") as archive:
                for name, data in members:
                    archive.writestr(name, inner if name.endswith("/data.pkl") else data)
            return stream.getvalue()

        return described, zipped
    length = int.from_bytes(content[:8], "little")
    if 2 <= length <= len(content) - 8 and content[8:9] == b"{":
        return content[8 : 8 + length], lambda inner: struct.pack("<Q", len(inner)) + inner + content[8 + length :]
    return content, lambda inner: inner


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree of JSON."""
    found: list[tuple[Any, Any]] = []
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        found.append((value, key))
        found += places(value[key])
    return found


def change_json(draw: st.DrawFn, content: bytes) -> bytes:
    """Valid JSON that says something else."""
    tree = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        slots = places(tree)
        if not slots:
            break
        holder, key = slots[draw(st.integers(0, len(slots) - 1))]
        match draw(st.sampled_from(["strange", "strange", "delete", "other", "number", "rename"])):
            case "strange":
                holder[key] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
            case "delete":
                del holder[key]
            case "other":
                other, at = slots[draw(st.integers(0, len(slots) - 1))]
                holder[key] = json.loads(json.dumps(other[at]))
            case "number":
                holder[key] = draw(st.one_of(st.sampled_from(NUMBERS), st.integers(-20, 20)))
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(["x", "", "model.layers.1e9.x", "../x", "r", "head_dim"]))] = holder.pop(
                    key
                )
    return json.dumps(tree).encode()


def is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def mutated(draw: st.DrawFn, kind: str) -> dict[str, bytes]:
    """The files of a folder, one to three of them changed, deleted or with their names swapped."""
    files = dict(honest(kind))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(files)))
        action = draw(st.sampled_from(["inside"] * 6 + ["bytes"] * 4 + ["delete", "swap", "empty"]))
        if action == "inside":
            inner, closed = opened(files[name])
            if is_json(inner) and draw(st.booleans()):
                files[name] = closed(change_json(draw, inner))
            else:
                files[name] = closed(change_bytes(draw, inner, PIECES, list(files.values())))
        elif action == "bytes":
            files[name] = change_bytes(draw, files[name], PIECES, list(files.values()))
        elif action == "delete" and len(files) > 1:
            del files[name]
        elif action == "swap":
            other = draw(st.sampled_from(sorted(files)))
            files[name], files[other] = files[other], files[name]
        elif action == "empty":
            files[name] = b""
    return files


def check(kind: str, files: dict[str, bytes]) -> str:
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "folder"
        folder.mkdir()
        (Path(outer) / "secret").write_bytes(b"secret")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        message = read_watched(FORMATS[kind].read, folder)
        assert {path.name for path in folder.iterdir()} == set(files)
        assert {path.name for path in Path(outer).iterdir()} == {"folder", "secret"}
    assert message == "" or any(name in message for name in (str(folder), *files)), message
    return message


@pytest.mark.parametrize("kind", FORMATS)
def test_the_files_themselves_are_read(kind: str) -> None:
    assert check(kind, honest(kind)) == ""


def fuzz(kind: str, examples: int) -> None:
    check(kind, honest(kind))  # what is imported late is imported now

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(kind, mutated(data.draw, kind))

    run()


@pytest.mark.parametrize("kind", FORMATS)
def test_changed_files(kind: str) -> None:
    fuzz(kind, FEW)


@pytest.mark.peers
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", FORMATS)
def test_many_changed_files(kind: str) -> None:
    fuzz(kind, MANY)
