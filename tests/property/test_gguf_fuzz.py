"""Whatever bytes a GGUF file holds, it is read or refused with one line: never another error, never much memory."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from arriero.errors import FormatError  # noqa: E402
from arriero.formats.gguf.file import GGUFFile  # noqa: E402
from arriero.formats.gguf.model import convert_gguf  # noqa: E402


def sample() -> bytes:
    """A complete one-layer model with a byte-level tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "x.gguf", "llama")
        writer.add_block_count(1)
        writer.add_context_length(16)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(32)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "ab", "<s>"])
        writer.add_token_types([1, 1, 1, 3])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(3)
        writer.add_eos_token_id(3)
        shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
        shapes |= {
            "ffn_gate": (32, 32),
            "ffn_up": (32, 32),
            "ffn_down": (32, 32),
            "attn_norm": (32,),
            "ffn_norm": (32,),
        }
        writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
        writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.0.{name}.weight", np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(folder) / "x.gguf").read_bytes()


SAMPLE = sample()
HEADER = SAMPLE.index(b"blk.0.ffn_norm.weight") + 60


def read_all(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(content)
        message = ""
        try:
            with GGUFFile(path) as file:
                for name in file.tensors:
                    file.dequantize(name)
            convert_gguf(path, Path(folder) / "out")
        except FormatError as error:
            message = str(error)
        assert "\n" not in message
        assert (Path(folder) / "out").exists() == (message == "")
        assert {entry.name for entry in Path(folder).iterdir()} <= {"x.gguf", "out"}


def test_the_sample_itself_is_converted() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.gguf").write_bytes(SAMPLE)
        convert_gguf(Path(folder) / "x.gguf", Path(folder) / "out")
        assert (Path(folder) / "out" / "model.safetensors").exists()


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_random_bytes(content: bytes) -> None:
    read_all(content)


@settings(max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_random_bytes_after_a_good_start(content: bytes, tensors: int, entries: int) -> None:
    read_all(b"GGUF" + struct.pack("<IQQ", 3, tensors % 5, entries % 5) + content)
    read_all(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + content)


@settings(max_examples=300)
@example(changes=[(175, 91)])  # a hidden size whose square overflows
@given(st.lists(st.tuples(st.integers(0, HEADER), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_of_a_header(changes: list[tuple[int, int]]) -> None:
    content = bytearray(SAMPLE)
    for at, value in changes:
        content[at] = value
    read_all(bytes(content))


@settings(max_examples=100)
@given(st.integers(0, HEADER), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
def test_extreme_numbers_anywhere(at: int, value: int) -> None:
    read_all(SAMPLE[:at] + struct.pack("<Q", value) + SAMPLE[at + 8 :])


@settings(max_examples=100)
@given(st.integers(0, len(SAMPLE) - 1))
def test_truncated(length: int) -> None:
    read_all(SAMPLE[:length])
