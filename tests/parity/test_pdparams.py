"""`.pdparams` files against their two other readers and writers: Paddle itself, and Python's own pickle.

The files in tests/fixtures/paddle were written by Paddle 3.3.1 (`make_pdparams.py` there).
"""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats import chunk_writer
from arriero.formats.paddle import pdparams_writer
from arriero.formats.paddle.pdparams_reader import STRUCTURED_NAMES, read_pdparams
from arriero.formats.paddle.pdparams_writer import write_pdparams
from arriero.formats.paddle.stored_array import StoredArray
from arriero.formats.safe_tensors import LazyTensor

FIXTURES = Path(__file__).parent.parent / "fixtures" / "paddle"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FIXTURES / "expected.json").read_text())
FILES = sorted(path.name.removesuffix(".pdparams.bin") for path in FIXTURES.glob("*.pdparams.bin"))
NAMES = ["layer.weight", "layer.half", "layer.brain", "layer.bytes", "layer.one_byte", "layer.long", "layer.double"]
NAMES += ["layer.flags", "layer.scale", "layer.deep", "layer.empty"]


def fixture(name: str) -> Path:
    return FIXTURES / f"{name}.pdparams.bin"


def check_values(tensors: dict[str, StoredArray], prefix: str = "") -> None:
    """All tensors are what Paddle says of them."""
    assert set(tensors) == {prefix + name for name in NAMES}
    for name, expected in EXPECTED.items():
        loaded = tensors[prefix + name].load(bfloat16=True)
        dtype = getattr(torch, expected["dtype"])
        assert loaded.dtype == dtype
        assert list(loaded.shape) == expected["shape"]
        values = torch.tensor(expected["values"], dtype=torch.float64)
        assert loaded.equal(values.to(dtype).reshape(expected["shape"])), name


class OnlyArrays(pickle.Unpickler):
    """Python's machine, for files whose writer is known."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module.split(".")[0], name) in {
            ("numpy", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy", "scalar"),
            ("numpy", "_frombuffer"),
            ("_codecs", "encode"),
            ("builtins", "bytes"),
            ("builtins", "tuple"),
            ("__builtin__", "bytes"),
            ("__builtin__", "tuple"),
            ("collections", "OrderedDict"),
        }, (module, name)
        return super().find_class(module, name)


def check_same(ours: Any, theirs: Any) -> int:
    """The same tree, every array bit for bit; how many arrays there are."""
    if isinstance(theirs, np.ndarray):
        assert isinstance(ours, StoredArray)
        loaded = ours.load().numpy()
        assert (loaded.dtype, loaded.shape) == (theirs.dtype, theirs.shape)
        assert loaded.tobytes() == theirs.tobytes()
        return 1
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        return sum(check_same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        assert isinstance(ours, type(theirs))
        assert len(ours) == len(theirs)
        return sum(check_same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours == theirs
    assert type(ours) is type(theirs) or isinstance(theirs, str | np.generic)
    return 0


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_paddle_as_python_reads_it(name: str) -> None:
    theirs = OnlyArrays(io.BytesIO(fixture(name).read_bytes())).load()
    with read_pdparams(fixture(name)) as file:
        assert check_same(file.tree, theirs) >= 1


def test_the_fixtures_are_all_there() -> None:
    assert len(FILES) == 5 * 3 + 2


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_state_dict(protocol: int) -> None:
    with read_pdparams(fixture(f"plain_p{protocol}")) as file:
        assert list(file.tensors) == NAMES
        check_values(file.tensors)
        assert file.tensors["layer.brain"].dtype == torch.uint16
        assert file.tensors["layer.brain"].load().dtype == torch.uint16


@pytest.mark.parametrize("protocol", [2, 3])
def test_sliced_arrays_are_joined(protocol: int) -> None:
    with read_pdparams(fixture(f"sliced_p{protocol}")) as file:
        assert "layer.weight@@.0" in file.tree
        check_values(file.tensors)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_tensors_deeper_in_a_file(protocol: int) -> None:
    with read_pdparams(fixture(f"nested_p{protocol}")) as file:
        check_values(file.tensors, "model.")
        rest = {key: value for key, value in file.tree.items() if key != "model"}
        assert rest == {"step": 3, "rate": 1e-3, "betas": (0.9, 0.999), "note": None, "on": [True]}
    with read_pdparams(fixture(f"tensor_p{protocol}")) as file:
        assert [array.shape for array in file.tensors.values()] == [(3, 5)]
        assert list(file.tensors) == [file.tree[0]]
    with read_pdparams(fixture(f"list_p{protocol}")) as file:
        assert list(file.tensors) == ["0", "1.again"]
    with read_pdparams(fixture(f"numpy_p{protocol}")) as file:
        assert list(file.tensors) == ["columns", "tied"]
        assert file.tensors["columns"].fortran_order
        assert file.tree["loss"] == 0.5


@pytest.mark.parametrize("name", ["plain_p2", "plain_p4", "sliced_p2", "sliced_p3", "numpy_p2", "numpy_p4"])
def test_boxes(name: str) -> None:
    random = np.random.default_rng(0)
    with read_pdparams(fixture(name)) as file:
        for array in file.tensors.values():
            whole = array.load(bfloat16=True)
            for _ in range(20):
                box = tuple(slice(*sorted(random.integers(0, size + 1, 2).tolist())) for size in array.shape)
                part = array.load_box(box, bfloat16=True)
                assert part.dtype == whole.dtype
                assert part.equal(whole[box]), (name, box)
            with pytest.raises(IndexError):
                array.load_box((*box, slice(0, 1)))
            with pytest.raises(IndexError):
                array.load_box(tuple(slice(0, size, 2) for size in array.shape) or (slice(0, 1),))


def test_tensors_outlive_the_file_and_writing_to_them_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.pdparams"
    for length in range(1, 6):  # names of different lengths, so that some arrays lie aligned and some do not
        write_pdparams(path, {"x" * length: torch.arange(20_000.0)})
        content = path.read_bytes()
        with read_pdparams(path) as file:
            (array,) = file.tensors.values()
            tensor = array.load()
            tensor[0] = 7.0
        del file, array
        assert tensor.sum() == torch.arange(20_000.0).sum() + 7
        assert path.read_bytes() == content


@pytest.mark.parametrize("order", ["C", "F"])
def test_protocol_5_which_newer_pythons_write_on_some_systems(tmp_path: Path, order: Any) -> None:
    value = {"a": np.arange(6, dtype=np.float32).reshape(2, 3, order=order), "b": np.zeros((2, 0), np.int8)}
    value["read_only"] = value["a"].copy()
    value["read_only"].flags.writeable = False
    (tmp_path / "x").write_bytes(pickle.dumps(value, 5))
    with read_pdparams(tmp_path / "x") as file:
        assert check_same(file.tree, value) == 3


def test_a_file_larger_than_the_memory_is_not_read(tmp_path: Path) -> None:
    path, size = tmp_path / "x.pdparams", 2**36
    head, tail = pickle.dumps({"w": np.zeros(2**17, np.float32)}, 4).split(b"B" + (2**19).to_bytes(4, "little"))
    begin = head.replace(b"J" + (2**17).to_bytes(4, "little"), b"\x8a\x05" + (size // 4).to_bytes(5, "little"))
    frame = (int.from_bytes(begin[3:11], "little") + 2).to_bytes(8, "little")
    begin = begin[:3] + frame + begin[11:] + b"\x8e" + size.to_bytes(8, "little")
    with path.open("wb") as stream:  # 64 GiB, of which the disk holds two pages
        stream.write(begin)
        stream.seek(size - 4, io.SEEK_CUR)
        stream.write(np.float32(2.5).tobytes() + tail[2**19 :])
    tracemalloc.start()
    with read_pdparams(path) as file:
        last = file.tensors["w"].load_box((slice(size // 4 - 3, None),))
        assert last.tolist() == [0, 0, 2.5]
        assert file.tensors["w"].nbytes == size
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# Writing


@pytest.fixture
def as_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the one name that differs between the versions of NumPy as this one does."""
    monkeypatch.setattr(pdparams_writer, "MULTIARRAY_MODULE", "numpy._core.multiarray")


@pytest.mark.usefixtures("as_numpy_2")
def test_the_bytes_are_those_that_paddle_writes(tmp_path: Path) -> None:
    with read_pdparams(fixture("plain_p4")) as file:
        tensors: dict[str, Tensor | LazyTensor] = {n: a.load(bfloat16=True) for n, a in file.tensors.items()}
        tensors["layer.weight"] = LazyTensor((3, 5), torch.float32, file.tensors["layer.weight"].load)
        write_pdparams(tmp_path / "x", tensors, structured_names=file.tree[STRUCTURED_NAMES])
    assert (tmp_path / "x").read_bytes() == fixture("plain_p4").read_bytes()


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "one": [(3, 2)],
    "a number": [()],
    "nothing in it": [(0, 3)],
    "many dimensions": [(1, 2, 3, 4, 5)],
    "sizes": [(255,), (256,), (65_535,), (65_536, 0), (2**33, 0)],
    "payloads": [(63,), (64,), (65,), (16_383,), (16_384,), (5,), (16_385,)],
    "frames": [(n,) for n in range(8_000, 16_500, 500)],
    **{f"{count} tensors": [(i % 7,) for i in range(count)] for count in (0, 2, 999, 1000, 1001, 2000)},
}


@pytest.mark.usefixtures("as_numpy_2")
@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_the_bytes_are_those_that_pickle_writes(tmp_path: Path, shapes: list[tuple[int, ...]], table: bool) -> None:
    random = np.random.default_rng(0)
    dtypes = (np.float32, np.float16, np.float64, np.int8, np.int64)
    arrays = {
        f"layers.{i}.weight": np.asarray(random.standard_normal(shape) * 9).astype(dtypes[i % 5])
        for i, shape in enumerate(shapes)
    }
    state: dict[str, Any] = {**arrays, STRUCTURED_NAMES: {name: name for name in arrays}} if table else arrays
    stream = io.BytesIO()
    pickle.Pickler(stream, 4).dump(state)
    write_pdparams(tmp_path / "x", {n: torch.from_numpy(a) for n, a in arrays.items()}, structured_names=table)
    assert (tmp_path / "x").read_bytes() == stream.getvalue()
    with read_pdparams(tmp_path / "x") as file:
        assert check_same(file.tree, state) == len(shapes)


def test_what_is_written_can_be_read_with_every_numpy(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    write_pdparams(tmp_path / "x", tensors)
    assert b"numpy.core.multiarray" in (tmp_path / "x").read_bytes()  # there is no numpy._core before 1.26
    loaded = OnlyArrays(io.BytesIO((tmp_path / "x").read_bytes())).load()
    assert list(loaded) == ["a", "b", STRUCTURED_NAMES]
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor.numpy())


def test_casts_views_and_progress(tmp_path: Path) -> None:
    matrix, steps = torch.randn(6, 4), []
    tensors = {
        "transposed": matrix.t(),
        "slice": matrix[::2, 1:3],
        "learned": torch.nn.Parameter(matrix),
        "count": torch.arange(3),
        "brain": matrix.bfloat16(),
    }
    write_pdparams(tmp_path / "x", tensors, dtype=torch.bfloat16, progress=lambda *step: steps.append(step))
    total = 2 * 24 + 2 * 6 + 2 * 24 + 8 * 3 + 2 * 24
    assert steps == [(48, total), (60, total), (108, total), (132, total), (total, total)]
    with read_pdparams(tmp_path / "x") as file:
        for name, tensor in tensors.items():
            wanted = tensor if name == "count" else tensor.bfloat16()
            assert file.tensors[name].load(bfloat16=True).equal(wanted), name
        assert file.tensors["brain"].dtype == torch.uint16


def test_large_tensors_are_cast_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_writer, "_CHUNK", 1000)
    tensors = {"a": torch.randn(200, 90).t(), "b": torch.randn(70_000, 3), "c": torch.randn(99)}
    tensors |= {"d": torch.randn(90, 1).t(), "e": torch.randn(3, 40, 50).transpose(0, 2), "f": torch.randn(99)[::3]}
    for dtype in (torch.float16, torch.float32):
        write_pdparams(tmp_path / "x", tensors, dtype=dtype)
        with read_pdparams(tmp_path / "x") as file:
            for name, tensor in tensors.items():
                assert file.tensors[name].load().equal(tensor.to(dtype))


BAD: list[tuple[str, Callable[[], dict[str, Tensor | LazyTensor]], dict[str, Any], str]] = [
    (
        "float8",
        lambda: {"w": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        {},
        "float8_e4m3fn, which Paddle files do not",
    ),
    ("a name", lambda: {"wé": torch.zeros(2)}, {}, "not short ASCII text"),
    ("a long name", lambda: {"w" * 600: torch.zeros(2)}, {}, "not short ASCII text"),
    ("an empty name", lambda: {"": torch.zeros(2)}, {}, "not short ASCII text"),
    ("a name of Paddle's", lambda: {STRUCTURED_NAMES: torch.zeros(2)}, {}, "something else in Paddle files"),
    (
        "another shape",
        lambda: {"w": LazyTensor((3,), torch.float32, lambda: torch.zeros(2))},
        {},
        r"announced .* \(3,\)",
    ),
    ("a table", lambda: {"w": torch.zeros(2)}, {"structured_names": {"v": "w"}}, "the table of Paddle's names"),
]


@pytest.mark.parametrize(("make", "options", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_what_cannot_be_written(
    tmp_path: Path, make: Callable[[], dict[str, Tensor | LazyTensor]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        write_pdparams(tmp_path / "x", make(), **options)
    assert "\n" not in str(caught.value)


# Paddle itself

PEERS_PYTHON = Path(__file__).parent.parent.parent / ".venv-peers" / "bin" / "python"

LOAD_WITH_PADDLE = """
import sys, numpy as np, paddle
loaded = paddle.load(sys.argv[1])
names = {name: tensor.name for name, tensor in loaded.items()}
assert names == {name: name for name in loaded}, names
bits = {name: tensor.numpy() for name, tensor in loaded.items()}
np.savez(sys.argv[2], **bits)
model = paddle.nn.Linear(4, 6)
model.set_state_dict(loaded)
np.testing.assert_array_equal(model.weight.numpy(), bits["weight"])
"""


def run_paddle(*arguments: str | Path) -> None:
    if not PEERS_PYTHON.is_file():
        pytest.fail(f"{PEERS_PYTHON} is missing: `make test-peers` makes it and installs Paddle there")
    done = subprocess.run(
        [PEERS_PYTHON, *map(str, arguments)], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.peers
def test_paddle_writes_the_fixtures_again(tmp_path: Path) -> None:
    run_paddle(FIXTURES / "make_pdparams.py", tmp_path)
    for name in FILES:
        theirs = OnlyArrays(io.BytesIO((tmp_path / f"{name}.pdparams.bin").read_bytes())).load()
        with read_pdparams(tmp_path / f"{name}.pdparams.bin") as file:
            check_same(file.tree, theirs)
        assert (tmp_path / f"{name}.pdparams.bin").read_bytes() == fixture(name).read_bytes()


@pytest.mark.peers
def test_paddle_loads_what_we_write(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"weight": torch.randn(4, 6), "bias": torch.randn(6), "half": torch.randn(300, 500).half()}
    tensors |= {"brain": torch.randn(33, 3).bfloat16(), "bytes": torch.arange(-128, 127).to(torch.int8)}
    tensors |= {"scale": torch.tensor(0.5), "empty": torch.zeros(0, 3), "flags": torch.tensor([True, False])}
    write_pdparams(tmp_path / "x.pdparams", tensors)
    run_paddle("-c", LOAD_WITH_PADDLE, tmp_path / "x.pdparams", tmp_path / "loaded.npz")
    loaded = np.load(tmp_path / "loaded.npz")
    assert set(loaded.files) == set(tensors)
    for name, tensor in tensors.items():
        wanted = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(loaded[name], wanted.numpy())
