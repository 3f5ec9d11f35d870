"""Whatever bytes a `.pdparams` file holds, it is read or refused with one line: nothing is run, little memory is taken."""

from __future__ import annotations

import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from arriero.errors import FormatError  # noqa: E402
from arriero.formats.paddle.pdparams_pickle import PdParamsPickle  # noqa: E402
from arriero.formats.paddle.pdparams_reader import read_pdparams  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from byte_changes import change_bytes  # noqa: E402

FIXTURES = Path(__file__).parent.parent / "fixtures" / "paddle"
HONEST = [path.read_bytes() for path in sorted(FIXTURES.glob("*.pdparams.bin"))]
FEW, MANY = settings(max_examples=300), settings(max_examples=5000)

watching = False
seen: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event.partition(".")[0] in {
        "import",
        "exec",
        "compile",
        "os",
        "subprocess",
        "pickle",
        "ctypes",
        "socket",
    }:
        seen.append(f"{event} {arguments!r:.200}")


sys.addaudithook(watch)


def load_all(path: Path) -> str:
    """Read everything in it; the reason why not, or nothing."""
    try:
        with read_pdparams(path) as file:
            for tensor in file.tensors.values():
                tensor.load(bfloat16=True)
                tensor.load_box(tuple(slice(0, size // 2) for size in tensor.shape))
    except FormatError as error:
        return str(error)
    return ""


def read_all(content: bytes) -> str:
    global watching
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(content)
        tracemalloc.start()
        begin = time.perf_counter()
        watching = True
        try:
            message = load_all(path)
        finally:
            watching = False
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert time.perf_counter() - begin < 60
    assert peak < 2 * len(content) + 4 * 2**20
    assert "\n" not in message
    assert len(message) < 500
    assert not seen
    return message


def test_running_code_would_be_seen() -> None:
    global watching
    watching = True
    exec("1 + 1")  # noqa: S102
    watching = False
    assert seen
    seen.clear()


def test_the_files_themselves_are_read() -> None:
    for content in HONEST:
        assert read_all(content) == ""
    assert len(HONEST) == 17


PIECES = st.one_of(
    st.integers(0, 255).map(lambda value: bytes([value])),
    st.sampled_from([0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1]).map(lambda value: value.to_bytes(4, "little")),
    st.sampled_from([0, 2**32, 2**40, 2**63 - 1, 2**64 - 1]).map(lambda value: value.to_bytes(8, "little")),
    st.sampled_from([b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nexec\n", b"\x8c\x02os\x8c\x06system\x93"]),
    st.sampled_from(
        [b"}", b"(", b"h\x00", b"h\x05", b")R", b"b", b"0", b"2", b"\x85", b"\x86", b"u", b"s", b"e", b"a"]
    ),
    st.binary(max_size=12),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A changed file of Paddle's."""
    return change_bytes(draw, draw(st.sampled_from(HONEST)), PIECES, HONEST)


ACTIONS = [bytes([code]) for code in PdParamsPickle.actions]
OPERANDS = st.one_of(st.just(b""), st.binary(max_size=2), st.sampled_from([b"\x01\x00\x00\x00", b"numpy\nndarray\n"]))
PROGRAM = st.lists(st.tuples(st.sampled_from(ACTIONS), OPERANDS).map(b"".join), max_size=60).map(b"".join)


@FEW
@given(mutated())
def test_changed_files(content: bytes) -> None:
    read_all(content)


@pytest.mark.peers
@pytest.mark.timeout(1200)
@MANY
@given(mutated())
def test_many_changed_files(content: bytes) -> None:
    read_all(content)


@settings(max_examples=200)
@example(program=b"]\x94h\x00h\x00\x86", protocol=4)
@given(PROGRAM, st.integers(0, 7))
def test_random_programs(program: bytes, protocol: int) -> None:
    read_all(b"\x80" + bytes([protocol]) + program + b".")


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_random_bytes(content: bytes) -> None:
    read_all(content)
    read_all(b"\x80\x04" + content)


def test_every_byte_of_a_file_changed() -> None:
    """The reader notices, or the file still holds arrays; it is neither run nor too much for the memory."""
    content = HONEST[0]
    for at in range(len(content)):
        for value in (0x00, 0x2E, 0x52, 0x62, 0xFF):
            read_all(content[:at] + bytes([value]) + content[at + 1 :])
