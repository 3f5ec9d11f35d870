"""Dequantisation against ggml's block layouts, written out here value by value from ggml-quants.c / ggml-common.h."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from arriero.errors import FormatError  # noqa: E402
from arriero.formats.gguf.file import GGUFFile  # noqa: E402

Types = gguf.GGMLQuantizationType


def half(raw: bytes) -> float:
    return struct.unpack("<e", raw)[0]


def f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def q4_0(b: bytes) -> list[float]:
    d, q = half(b[:2]), b[2:]
    return [d * ((x & 15) - 8) for x in q] + [d * ((x >> 4) - 8) for x in q]


def q4_1(b: bytes) -> list[float]:
    d, m, q = half(b[:2]), half(b[2:4]), b[4:]
    return [f32(d * (x & 15)) + m for x in q] + [f32(d * (x >> 4)) + m for x in q]


def q5_0(b: bytes) -> list[float]:
    d, (high,), q = half(b[:2]), struct.unpack("<I", b[2:6]), b[6:]
    low = [d * (((x & 15) | (high >> i & 1) << 4) - 16) for i, x in enumerate(q)]
    return low + [d * (((x >> 4) | (high >> (i + 16) & 1) << 4) - 16) for i, x in enumerate(q)]


def q5_1(b: bytes) -> list[float]:
    d, m, (high,), q = half(b[:2]), half(b[2:4]), struct.unpack("<I", b[4:8]), b[8:]
    low = [f32(d * ((x & 15) | (high >> i & 1) << 4)) + m for i, x in enumerate(q)]
    return low + [f32(d * ((x >> 4) | (high >> (i + 16) & 1) << 4)) + m for i, x in enumerate(q)]


def q8_0(b: bytes) -> list[float]:
    d = half(b[:2])
    return [d * x for x in struct.unpack("<32b", b[2:])]


def scale_min(j: int, q: bytes) -> tuple[int, int]:
    """get_scale_min_k4: eight 6-bit scales and eight 6-bit minima in 12 bytes."""
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4


def q4_k(b: bytes) -> list[float]:
    d, dmin, scales, q = half(b[:2]), half(b[2:4]), b[4:16], b[16:]
    out = []
    for group in range(8):
        s, m = scale_min(group, scales)
        for x in q[group // 2 * 32 :][:32]:
            out.append(f32(f32(d * s) * (x >> 4 if group % 2 else x & 15)) - f32(dmin * m))
    return out


def q5_k(b: bytes) -> list[float]:
    d, dmin, scales, high, q = half(b[:2]), half(b[2:4]), b[4:16], b[16:48], b[48:]
    out = []
    for group in range(8):
        s, m = scale_min(group, scales)
        for i, x in enumerate(q[group // 2 * 32 :][:32]):
            value = (x >> 4 if group % 2 else x & 15) + (16 if high[i] >> group & 1 else 0)
            out.append(f32(f32(d * s) * value) - f32(dmin * m))
    return out


def q6_k(b: bytes) -> list[float]:
    low, high, scales, d = b[:128], b[128:192], struct.unpack("<16b", b[192:208]), half(b[208:])
    out = [0.0] * 256
    for n in range(2):
        for i in range(32):
            base_low, base_high = low[n * 64 :], high[n * 32 :]
            values = (
                (base_low[i] & 15) | (base_high[i] & 3) << 4,
                (base_low[i + 32] & 15) | (base_high[i] >> 2 & 3) << 4,
                (base_low[i] >> 4) | (base_high[i] >> 4 & 3) << 4,
                (base_low[i + 32] >> 4) | (base_high[i] >> 6 & 3) << 4,
            )
            for part, value in enumerate(values):
                scale = scales[n * 8 + i // 16 + 2 * part]
                out[n * 128 + part * 32 + i] = f32(d * scale) * (value - 32)
    return out


def q2_k(b: bytes) -> list[float]:
    scales, q, d, dmin = b[:16], b[16:80], half(b[80:82]), half(b[82:])
    out = []
    for n in range(2):
        for shift in range(4):
            for part in range(2):
                s = scales[n * 8 + shift * 2 + part]
                for x in q[n * 32 + part * 16 :][:16]:
                    out.append(f32(f32(d * (s & 15)) * (x >> 2 * shift & 3)) - f32(dmin * (s >> 4)))
    return out


def bf16(b: bytes) -> list[float]:
    return [struct.unpack("<f", b"\0\0" + b[i : i + 2])[0] for i in range(0, len(b), 2)]


def f16(b: bytes) -> list[float]:
    return [half(b[i : i + 2]) for i in range(0, len(b), 2)]


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def iq4_nl(b: bytes) -> list[float]:
    d = half(b[:2])
    return [d * IQ4_VALUES[x & 15] for x in b[2:]] + [d * IQ4_VALUES[x >> 4] for x in b[2:]]


def mxfp4(b: bytes) -> list[float]:
    scale = math.ldexp(1.0, b[0] - 127)
    return [scale * FP4_VALUES[x & 15] for x in b[1:]] + [scale * FP4_VALUES[x >> 4] for x in b[1:]]


CLOSED_FORMS: dict[str, Callable[[bytes], list[float]]] = {
    "F16": f16,
    "BF16": bf16,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "MXFP4": mxfp4,
}
# Where the fp16 scales lie in a block: kept to ordinary numbers, so that exact equality means something.
SCALES = {"Q2_K": (80, 82), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """(rows, bytes of a row) of random content with sensible scales."""
    generator = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[Types[kind]]
    raw = generator.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    scale = np.frombuffer(generator.normal(0, 0.05, len(raw) * 2).astype(np.float16).tobytes(), np.uint8)
    if kind in ("F16", "BF16"):
        numbers = generator.normal(0, 1, raw.shape[0]).astype(np.float32)
        half_or_brain = numbers.astype(np.float16) if kind == "F16" else (numbers.view(np.uint32) >> 16).astype("<u2")
        raw = np.frombuffer(half_or_brain.tobytes(), np.uint8).reshape(-1, 2).copy()
    elif kind == "MXFP4":
        raw[:, 0] = generator.integers(110, 140, len(raw))
    else:
        for number, at in enumerate(SCALES.get(kind, (0,))):
            raw[:, at : at + 2] = scale.reshape(2, -1, 2)[number]
    return raw.reshape(rows, -1)


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, rows) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=Types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", CLOSED_FORMS)
def test_closed_form(tmp_path: Path, kind: str) -> None:
    raw = random_blocks(kind, 3, 512)
    path = write(tmp_path / "x.gguf", {"before": ("F16", random_blocks("F16", 1, 7)), "x.weight": (kind, raw)})
    with GGUFFile(path) as file:
        found = file.dequantize("x.weight")
        assert file.tensors["x.weight"].shape == (3, 512)
    size = gguf.GGML_QUANT_SIZES[Types[kind]][1]
    flat = raw.tobytes()
    expected = [value for at in range(0, len(flat), size) for value in CLOSED_FORMS[kind](flat[at : at + size])]
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.array_equal(found.ravel(), np.array(expected, dtype=np.float32))


DEQUANTISABLE = [kind.name for kind in gguf.quants._type_traits] + ["F32", "F16"]


@pytest.mark.parametrize("kind", sorted(set(DEQUANTISABLE)))
def test_every_type_of_the_gguf_package(tmp_path: Path, kind: str) -> None:
    """Ours reads header, offset and shape; `GGUFReader` reads them its own way. The values must be the same bits."""
    block, size = gguf.GGML_QUANT_SIZES[Types[kind]]
    if kind == "F32":
        raw = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
    elif kind == "F16":
        raw = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float16)
    else:
        try:
            numbers = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
            raw = gguf.quants.quantize(numbers, Types[kind])
        except NotImplementedError:
            raw = np.random.default_rng(0).integers(0, 120, (5, 256 // block * size), dtype=np.uint8)
    path = write(tmp_path / "x.gguf", {"a": (kind, raw), "b": (kind, raw[:2])})
    reader = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found = file.dequantize(tensor.name)
            assert found.shape == tuple(reversed([int(n) for n in tensor.shape]))
            assert np.array_equal(found.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@pytest.mark.parametrize("kind", ["I8", "I32", "F64", "Q8_K"])
def test_types_without_a_dequantiser_are_refused(tmp_path: Path, kind: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[Types[kind]]
    raw = np.zeros((2, 256 // block * size), dtype=np.uint8)
    with GGUFFile(write(tmp_path / "x.gguf", {"a": (kind, raw)})) as file, pytest.raises(FormatError, match=kind):
        file.dequantize("a")


def test_arrays_outlive_the_file(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
    with GGUFFile(write(tmp_path / "x.gguf", {"a": ("F32", numbers)})) as file:
        found = file.dequantize("a")
    assert np.array_equal(found, numbers)
    found[0] = 1.0
