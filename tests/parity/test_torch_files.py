"""Files of torch.save, read as data: what torch.load makes of honest ones, and nothing at all of the others."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import sys
import tracemalloc
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arriero.errors import FormatError
from arriero.formats.chunk_writer import ChunkWriter
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.torch_files import read_torch_file
from arriero.formats.torch_writer import TorchFileWriter, write_torch_file

sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))
from torch_archives import pack, unpack


def tied() -> dict[str, Tensor]:
    weight = torch.randn(6, 4)
    return {"embed": weight, "head": weight}


def views() -> dict[str, Tensor]:
    """What Meta's sharded files do: every tensor a piece of one storage."""
    whole = torch.randn(40).half()
    return {"first": whole[:12].view(3, 4), "last": whole[20:40].view(4, 5), "turned": whole[12:18].view(2, 3).t()}


def module() -> dict[str, Tensor]:
    """An OrderedDict with torch's `_metadata`."""
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).state_dict()


HONEST: dict[str, Callable[[], dict[str, Tensor]]] = {
    "dtypes": lambda: {
        name: torch.randn(3, 2).to(getattr(torch, name)) for name in ("float64", "float32", "float16", "bfloat16")
    },
    "scalar": lambda: {"scale": torch.tensor(2.5)},
    "tied": tied,
    "views": views,
    "module": module,
    "parameters": lambda: dict(nn.Linear(3, 4).named_parameters()),
    "many": lambda: collections.OrderedDict((f"layer.{number}", torch.randn(2, 2)) for number in range(300)),
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_files_are_read_as_torch_load_reads_them(kind: str, tmp_path: Path) -> None:
    torch.save(HONEST[kind](), tmp_path / "weights.pth")
    expected = torch.load(tmp_path / "weights.pth", weights_only=True)
    with read_torch_file(tmp_path / "weights.pth") as file:
        assert list(file.tensors) == list(expected)
        for name, tensor in expected.items():
            assert file.tensors[name].dtype == tensor.dtype
            assert file.tensors[name].stride() == tensor.stride()
            assert torch.equal(file.tensors[name], tensor)
        if kind == "tied":
            assert file.tensors["embed"].data_ptr() == file.tensors["head"].data_ptr()


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_a_state_dict_among_other_things_is_found(key: str, tmp_path: Path) -> None:
    state = module()
    torch.save({"epoch": 3, key: state, "loss": 0.5, "names": ["a", "b"]}, tmp_path / "x.pt")
    read = read_torch_file(tmp_path / "x.pt").tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert len(read) == len(state)


def test_the_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "big.pth", {"big": torch.ones(2**22)})
    tracemalloc.start()
    with read_torch_file(tmp_path / "big.pth") as file:
        file.tensors["big"][0] = 5.0  # a private copy of a page: the file stays as it is
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert float(read_torch_file(tmp_path / "big.pth").tensors["big"][0]) == 1.0


# Writing


def test_written_files_are_what_torch_load_and_zip_expect(tmp_path: Path) -> None:
    state = {**HONEST["dtypes"](), **HONEST["scalar"](), "turned": torch.randn(3, 5).t()}
    told: list[tuple[int, int]] = []
    write_torch_file(tmp_path / "x.pth", state, progress=lambda done, total: told.append((done, total)))
    for mapped in (False, True):
        read = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mapped)
        assert list(read) == list(state)
        assert all(
            torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in state.items()
        )
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        assert archive.testzip() is None
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read_torch_file(tmp_path / "x.pth").tensors.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert told[-1] == (size, size)
    assert len(told) == len(state)


def test_sizes_over_four_gigabytes_have_zip64_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # instead of 2^31 - 1
    state = {"small": torch.randn(3), "large": torch.randn(600), "last": torch.randn(5)}
    write_torch_file(tmp_path / "x.pth", state)
    monkeypatch.undo()
    assert b"PK\x06\x07" in (tmp_path / "x.pth").read_bytes()
    read, own = (
        torch.load(tmp_path / "x.pth", weights_only=True, mmap=True),
        read_torch_file(tmp_path / "x.pth").tensors,
    )
    for name, tensor in state.items():
        assert torch.equal(read[name], tensor)
        assert torch.equal(own[name], tensor)


def test_a_tensor_at_a_time_is_made(tmp_path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        assert all(reference() is None for reference in made)
        tensor = torch.ones(8)
        made.append(weakref.ref(tensor))
        return tensor

    write_torch_file(tmp_path / "x.pth", {name: LazyTensor((8,), torch.float32, make) for name in "abc"})
    assert torch.load(tmp_path / "x.pth", weights_only=True)["c"].sum() == 8
    assert len(made) == 3


def test_a_shared_tensor_is_stored_once(tmp_path: Path) -> None:
    layout = {"embed": (torch.float32, (100, 10))}
    with ChunkWriter(0) as chunks, TorchFileWriter(tmp_path / "x.pth", layout, chunks, {"head": "embed"}) as writer:
        writer.write("embed", torch.ones(100, 10))
    read = torch.load(tmp_path / "x.pth", weights_only=True)
    assert read["head"].data_ptr() == read["embed"].data_ptr()
    assert (tmp_path / "x.pth").stat().st_size < 6000


def write_steps(
    path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]], steps: list[tuple[str, Tensor]]
) -> None:
    with ChunkWriter(0) as chunks, TorchFileWriter(path, layout, chunks) as writer:
        for name, tensor in steps:
            writer.write(name, tensor)


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    layout = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    for steps in (
        [("b", torch.ones(2))],
        [("a", torch.ones(3))],
        [("a", torch.ones(2)), ("b", LazyTensor((2,), torch.float32, lambda: torch.ones(3)))],
        [("a", torch.ones(2))],
    ):
        with pytest.raises(FormatError, match="announced"):
            write_steps(tmp_path / "x.pth", layout, steps)
        assert not (tmp_path / "x.pth").exists()
    with pytest.raises(FormatError, match="only floating-point"):
        write_torch_file(tmp_path / "x.pth", {"a": torch.ones(2, dtype=torch.int32)})
    with pytest.raises(FormatError, match="cannot be written"):
        write_torch_file(tmp_path / "nowhere" / "x.pth", {"a": torch.ones(2)})


# Files that are out to harm, or broken


class Runs:
    """A pickle of it runs a shell command when it is loaded as pickles usually are."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_no_code_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "was here"
    for number, bomb in enumerate((Runs(os.system, f"touch '{marker}'"), Runs(eval, f"open({str(marker)!r}, 'w')"))):
        for content in (bomb, {"a": torch.ones(2), "b": bomb}, {"state_dict": {"a": bomb}}):
            torch.save(content, tmp_path / f"{number}.pth")
            with pytest.raises(FormatError, match=r"system|eval"):
                read_torch_file(tmp_path / f"{number}.pth")
    assert not marker.exists()
    torch.load(tmp_path / "0.pth", weights_only=False)  # the trap works
    assert marker.exists()


@pytest.mark.parametrize(
    "bomb",
    [
        Runs(bytearray, 10**11),
        Runs(torch.FloatTensor, 10**11),
        {1, 2},
        torch.Size([1]),
        torch.float16,
        torch.device("cpu"),
    ],
    ids=["bytearray", "FloatTensor", "set", "Size", "dtype", "device"],
)
def test_what_weights_only_would_make_is_not_made(bomb: Any, tmp_path: Path) -> None:
    """torch.load(weights_only=True) allows all of these; the first two ask it for 100 GB and more."""
    torch.save({"a": torch.ones(2), "b": bomb}, tmp_path / "x.pth")
    with pytest.raises(FormatError, match="weights do not need"):
        read_torch_file(tmp_path / "x.pth")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "integers": (lambda: {"a": torch.ones(2), "ids": torch.arange(3)}, "ids is int64"),
    "booleans": (lambda: {"mask": torch.ones(2, dtype=torch.bool)}, "mask is bool"),
    "complex": (lambda: {"a": torch.ones(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
    "quantized": (lambda: {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "qtensor"),
    "sparse": (lambda: {"a": torch.eye(2).to_sparse()}, "sparse"),
    "empty": (lambda: {"a": torch.empty(0, 3)}, "no numbers"),
    "a number among tensors": (lambda: {"a": torch.ones(2), "step": 3}, "'step' is not a tensor but int"),
    "two state dicts": (lambda: {"model": module(), "state_dict": module()}, "'state_dict' and 'model'"),
    "no dict": (lambda: [torch.ones(2)], "no state dict"),
    "nothing": (dict, "no state dict"),
    "expanded": (lambda: {"a": torch.ones(1).expand(100)}, "beyond its 1 stored numbers"),
    "a whole module": (lambda: nn.Linear(2, 2), "weights do not need"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_contents_that_are_no_weights_are_refused(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    torch.save(make(), tmp_path / "x.pth")
    with pytest.raises(FormatError, match=message):
        read_torch_file(tmp_path / "x.pth")


def test_many_views_of_one_storage_are_no_way_to_fill_a_disk(tmp_path: Path) -> None:
    weight = torch.ones(10_000)
    torch.save({f"layer.{number}": weight for number in range(20)}, tmp_path / "x.pth")
    with pytest.raises(FormatError, match="overlap"):
        read_torch_file(tmp_path / "x.pth")


def test_other_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"weights_only=True\) and torch\.save it again"):
        read_torch_file(tmp_path / "old.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "four.pth", pickle_protocol=4)
    with pytest.raises(FormatError, match="protocol 4"):
        read_torch_file(tmp_path / "four.pth")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FormatError, match="not a zip archive"):
        read_torch_file(tmp_path / "plain.bin")
    (tmp_path / "none.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="not a zip archive"):
        read_torch_file(tmp_path / "none.bin")
    with pytest.raises(FormatError, match="cannot be read"):
        read_torch_file(tmp_path / "absent.bin")


@pytest.fixture
def records(tmp_path: Path) -> dict[str, bytes]:
    write_torch_file(tmp_path / "honest.pth", {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)})
    return unpack(tmp_path / "honest.pth")


def test_zip_archives_that_torch_save_never_writes(records: dict[str, bytes], tmp_path: Path) -> None:
    assert set(read_torch_file(pack(tmp_path / "x.pth", records)).tensors) == {"a", "b"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"records": records | {"data/1": b"\0" * 10**7}, "compression": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"records": records | {"../../etc/passwd": b""}}, "none that torch.save writes"),
        ({"records": records | {"data\\0": b""}}, "none that torch.save writes"),
        ({"records": records, "folder": "/"}, "none that torch.save writes"),
        ({"records": records, "folder": ""}, "none that torch.save writes|two archives"),
        ({"records": records | {"code/model.py": b"", "constants.pkl": b""}}, "TorchScript"),
        ({"records": {"xl/workbook.xml": b"<a/>"}}, "some other zip archive"),
        ({"records": records | {"byteorder": b"big"}}, "big-endian"),
        ({"records": {name: value for name, value in records.items() if name != "data/1"}}, "data/1, which is missing"),
        ({"records": records | {"data/1": b"\0" * 12}}, "claims 4 numbers of 4 bytes, but its record has 12"),
        ({"records": records | {"data.pkl": b"\0" * (5 * 2**20)}}, "more than any model's"),
    ]
    for arguments, message in cases:
        with pytest.raises(FormatError, match=message):
            read_torch_file(pack(tmp_path / "x.pth", **arguments))


def test_overlapping_records_are_refused(records: dict[str, bytes], tmp_path: Path) -> None:
    """The zip bomb of Fifield (https://www.bamsoftware.com/hacks/zipbomb/): many entries for the same bytes."""
    content = bytearray(pack(tmp_path / "x.pth", records).read_bytes())
    first, second = (content.rindex(f"archive/data/{key}".encode()) - 46 for key in (0, 1))
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(FormatError, match=r"two headers that differ|overlaps"):
        read_torch_file(tmp_path / "x.pth")
    content[second + 46 : second + 60] = content[first + 46 : first + 60]
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(FormatError, match="overlaps"):
        read_torch_file(tmp_path / "x.pth")


def test_a_wrong_checksum_or_a_cut_file_is_refused(records: dict[str, bytes], tmp_path: Path) -> None:
    content = pack(tmp_path / "x.pth", records).read_bytes()
    at = content.index(b"_rebuild_tensor_v2")
    (tmp_path / "x.pth").write_bytes(content[:at] + b"X" + content[at + 1 :])
    with pytest.raises(FormatError, match="checksum"):
        read_torch_file(tmp_path / "x.pth")
    for length in (4, 21, 22, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "x.pth").write_bytes(content[:length])
        with pytest.raises(FormatError):
            read_torch_file(tmp_path / "x.pth")


def count(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def doubled(times: int) -> bytes:
    """Twice the value on the stack, and twice that, and so on."""
    return b"".join(b"q%ch%c\x86" % (level, level) for level in range(times))


SHAPE = b"(" + count(2) + count(3) + b"t"
STRIDE = b"(" + count(3) + count(1) + b"t"
TEXT = b"X\x01\x00\x00\x00"
PICKLES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "out of bounds": (
        lambda code: code.replace(SHAPE, b"(" + count(3) + count(3) + b"t"),
        "beyond its 6 stored numbers",
    ),
    "far out of bounds": (lambda code: code.replace(STRIDE, b"(" + count(2**31 - 1) + count(1) + b"t"), "beyond its 6"),
    "a negative size": (lambda code: code.replace(SHAPE, b"(" + count(-2) + count(3) + b"t"), "corrupt"),
    "a negative stride": (lambda code: code.replace(STRIDE, b"(" + count(-3) + count(1) + b"t"), "corrupt"),
    "a huge size": (
        lambda code: code.replace(SHAPE, b"(\x8a\x07" + b"\xff" * 6 + b"\x00" + count(3) + b"t"),
        "overlap|corrupt",
    ),
    "more strides": (lambda code: code.replace(STRIDE, b"(" + count(3) * 3 + b"t"), "corrupt"),
    "a huge number": (
        lambda code: code.replace(SHAPE, b"(\x8a\xff" + b"\x7f" * 255 + count(3) + b"t"),
        "an integer of 255 bytes",
    ),
    "twice the same name": (lambda code: code.replace(TEXT + b"b", TEXT + b"a"), "'a' appears twice"),
    "nested for ever": (lambda _: b"\x80\x02)" + b"\x85" * 300_000 + b".", "containers"),
    "nested as a name": (lambda _: b"\x80\x02})" + b"\x85" * 1000 + b"Ns.", "corrupt"),
    "doubled again and again": (lambda _: b"\x80\x02)" + doubled(15) + b".", "the same values again and again"),
    "doubled without end": (lambda _: b"\x80\x02)" + doubled(255) + b".", "more than 16 deep"),
    "remembered twice": (lambda _: b"\x80\x02)q\x00q\x00.", "overwrites a value that it remembered"),
    "a list in itself": (lambda _: b"\x80\x02]q\x00h\x00a.", "more than 16 deep"),
    "a long text": (lambda _: b"\x80\x02X\xff\xff\xff\xff.", "corrupt"),
    "marks alone": (lambda _: b"\x80\x02" + b"(" * 10**5 + b"t.", "thousands of values on the stack"),
    "values on the stack": (lambda _: b"\x80\x02" + b"N" * 10**5 + b".", "thousands of values on the stack"),
    "a value below a mark": (lambda _: b"\x80\x02}(u\x85(\x85.", "a value is missing"),
    "two values": (lambda code: code[:-1] + b"N.", "in the middle of a value"),
    "something behind the end": (lambda code: code + b"N.", "2 bytes follow its end"),
    "opcodes without end": (lambda _: b"\x80\x02]" + b"Na" * 2**18 + b".", "pickle opcodes"),
    "a name as a value": (lambda code: code[:-2] + TEXT + b"cctorch\nFloatStorage\nu.", "a name or a half-made"),
    "a text that is none": (lambda code: code.replace(TEXT + b"b", TEXT + b"\xff"), "not UTF-8"),
    "a key that is none": (lambda code: code.replace(TEXT + b"b", b"N"), "a key that is neither"),
    "a call of what is no function": (lambda code: code[:-1] + b")R.", "no function"),
    "a state for what has none": (lambda _: b"\x80\x02]}b.", "sets the state of an object"),
    "no protocol": (lambda code: code[2:], "does not begin as one"),
    "the protocol again": (lambda code: code[:2] + code, "opcode 0x80"),
    "nothing on the stack": (lambda _: b"\x80\x02R.", "corrupt"),
    "no end": (lambda _: b"\x80\x02}", "corrupt"),
    "an instance": (lambda _: b"\x80\x02(S'ls'\nios\nsystem\n.", "instruction"),
    "protocol 4's name": (lambda _: b"\x80\x02X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "instruction"),
    "an extension": (lambda _: b"\x80\x02\x82\x01.", "instruction"),
    "a storage that is none": (
        lambda code: code.replace(b"ctorch\nFloatStorage", b"ccollections\nOrderedDict"),
        "corrupt",
    ),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_torch_save_never_writes(kind: str, records: dict[str, bytes], tmp_path: Path) -> None:
    make, message = PICKLES[kind]
    changed = make(records["data.pkl"])
    assert changed != records["data.pkl"]
    path = pack(tmp_path / "x.pth", records | {"data.pkl": changed})
    with pytest.raises(FormatError, match=message):
        read_torch_file(path)
