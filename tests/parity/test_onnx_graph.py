"""ONNX graphs against transformers, and against ONNX Runtime's own reading of their blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as native

from arriero.errors import ConfigError, FormatError, GenerationError
from arriero.export import onnx_graph
from arriero.export.block_weights import BlockFormat, BlockWeight, from_integers, quantize
from arriero.export.bundle import open_bundle
from arriero.export.kinds import open_runner
from arriero.export.onnx_export import OnnxOptions, export_onnx
from arriero.export.onnx_session import OnnxSession
from arriero.export.self_check import Step
from arriero.export.slot_runner import MAX_TOKENS, SlotRunner
from arriero.formats.gguf.k_quants import pack_q4_k
from arriero.formats.hf import load_model, save_model
from arriero.formats.quantized import file_state, with_scheme
from arriero.models.config import LlamaConfig
from arriero.quantization.block_levels import fit_levels
from arriero.quantization.integers import IntegerScheme
from arriero.quantization.schemes import IntegerWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from bundle_families import FAMILIES
from program_runs import expected, live, saved, sequence
from twin_models import VOCAB

SOURCE = Path(__file__).parents[2] / "src"


def runner(folder: Path, slots: int = 4) -> SlotRunner:
    return SlotRunner(OnnxSession(open_bundle(folder).graph, slots, threads=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder, theirs = saved(tmp_path / "hf", **FAMILIES[family])
    bundle = export_onnx(folder, tmp_path / "onnx", OnnxOptions())
    sequences = [sequence(seed, length) for seed, length in enumerate((40, 3, 90, 17, 60, 1, 33))]
    found = live(runner(bundle.folder), sequences, seed=1)
    for ids, logits in zip(sequences, found, strict=True):
        torch.testing.assert_close(logits, expected(theirs, ids), rtol=0, atol=1e-4)


def test_steps_of_many_lives_change_nothing(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "hf")
    given = runner(export_onnx(folder, tmp_path / "onnx", OnnxOptions()).folder, slots=5)
    sequences = [sequence(seed, 1 + seed * 7 % 50) for seed in range(12)]
    wanted = [expected(theirs, ids) for ids in sequences]
    for seed in range(8):
        for one, other in zip(live(given, sequences, seed), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_long_prompt_and_few_logits(tmp_path: Path) -> None:
    length = 2 * MAX_TOKENS + 30
    folder, theirs = saved(tmp_path / "hf", max_position_embeddings=length)
    given = runner(export_onnx(folder, tmp_path / "onnx", OnnxOptions()).folder, slots=2)
    ids = sequence(3, length)
    wanted = expected(theirs, ids)
    none = given.run([Step(ids[:10], 0, [0], 0)])
    assert none.shape == (0, VOCAB)
    logits = given.run([Step(ids, 0, [1], 40), Step(ids[10:11], 10, [0], 1)])
    torch.testing.assert_close(logits, np.concatenate((wanted[-40:], wanted[10:11])), rtol=0, atol=1e-4)


def test_what_does_not_fit_a_slot(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "hf")
    given = runner(export_onnx(folder, tmp_path / "onnx", OnnxOptions(context=20)).folder)
    assert (given.block_size, given.context) == (20, 20)
    for step in (Step([1] * 5, 16, [0], 1), Step([1], 0, [0, 1], 1), Step([], 0, [0], 0), Step([1], 0, [0], 2)):
        with pytest.raises(GenerationError, match="do not fit a slot of 20"):
            given.run([step])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_read_alike_by_the_operators(bits: int, block_size: int, symmetric: bool) -> None:
    rows, columns = 40, 96  # of which blocks of 64 and 128 leave a part
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight = quantize(matrix, BlockFormat(bits, block_size, symmetric))
    x = np.eye(columns, dtype=np.float32)
    product = multiplied(weight, x)
    np.testing.assert_allclose(product.T, weight.dequantize(), rtol=0, atol=1e-6)
    theirs, ours = rounded_by_onnxruntime(matrix.numpy(), bits, block_size, symmetric), weight.dequantize()
    errors = [float(np.square(rounded.astype(np.float64) - matrix.numpy()).sum()) for rounded in (ours, theirs)]
    assert errors[0] <= errors[1] * (1 + 1e-5)  # of 8 bits they are the same but for the last bit of a scale


def multiplied(weight: BlockWeight, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """x times a stored weight, by the operator."""
    stored = {"packed": weight.packed, "scales": weight.scales}
    if weight.zero_points is not None:
        stored["zero_points"] = weight.zero_points
    size = (weight.scales.shape[0], weight.in_features)
    form = weight.format
    node = helper.make_node(
        "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", N=size[0], K=size[1], bits=form.bits,
        block_size=form.block_size, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", size[0]])],
        [numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in stored.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    found: np.ndarray[Any, Any] = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    return found


def rounded_by_onnxruntime(
    matrix: np.ndarray[Any, Any], bits: int, block_size: int, symmetric: bool
) -> np.ndarray[Any, Any]:
    """A matrix rounded to blocks by ONNX Runtime's own quantizer."""
    form = BlockFormat(bits, block_size, symmetric)
    rows, columns = matrix.shape
    blocks = form.blocks(columns)
    packed = np.zeros((rows, blocks, block_size * bits // 8), np.uint8)
    scales, zeros = np.zeros((rows * blocks,), np.float32), np.zeros((rows, -(-blocks * bits // 8)), np.uint8)
    rounding = {4: native.quantize_matmul_4bits, 8: native.quantize_matmul_8bits}[bits]
    transposed = np.ascontiguousarray(matrix.T)
    rounding(packed, transposed, scales, zeros.reshape(-1), block_size, rows, columns, symmetric)
    zero_points = None if symmetric else zeros
    return BlockWeight(form, columns, packed, scales.reshape(rows, blocks), zero_points).dequantize()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int8"},
        {"weights": "int4", "symmetric": True},
        {"weights": "int4", "block_size": 16, "symmetric": False},
        {"weights": "int4", "block_size": 32},  # of which rows of 80 leave a part
    ],
)
def test_rounded_weights_make_the_logits_that_they_should(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    folder, theirs = saved(tmp_path / "hf", tie_word_embeddings=tied, intermediate_size=80, attention_bias=True)
    chosen = OnnxOptions(**options, accuracy_level=0)
    given = runner(export_onnx(folder, tmp_path / "onnx", chosen).folder)
    form = chosen.form()
    assert form.layers is not None
    assert form.head is not None
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() == 2:
                blocks = form.head if "embed" in name or "lm_head" in name else form.layers
                parameter.copy_(torch.from_numpy(quantize(parameter, blocks).dequantize()))
    ids = sequence(0, 50)
    torch.testing.assert_close(live(given, [ids], seed=0)[0], expected(theirs, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_blocks_that_ggml_rounded_keep_their_numbers(kind: str) -> None:
    """What it rounded is not rounded once more, but for the offsets."""
    rows, columns = 24, 512
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).numpy() * 0.02
    known = gguf.GGMLQuantizationType[kind]
    raw = pack_q4_k(matrix) if kind == "Q4_K" else gguf.quants.quantize(matrix, known)  # gguf only reads Q4_K
    stored = gguf.quants.dequantize(raw, known).reshape(rows, columns)
    blocks = torch.from_numpy(stored).view(rows, -1, 32)
    integers, step, low = fit_levels(blocks, 4)
    again = integers.float() * step[..., None] + low[..., None]
    torch.testing.assert_close(again, blocks, rtol=0, atol=1e-6 * float(blocks.abs().max()))
    assert integers.max() <= 15
    weight = quantize(torch.from_numpy(stored), BlockFormat(4, 32, symmetric=False, offsets=True))
    own = float(np.square(weight.dequantize() - stored).mean()) ** 0.5
    theirs = float(np.square(stored - matrix).mean()) ** 0.5
    assert own < theirs / 8  # what ggml lost, and an offset of half a step in 4 bits


@pytest.mark.parametrize(
    ("options", "kept", "offsets"),
    [
        ({}, False, True),
        ({"block_size": 64}, False, True),
        ({"block_size": 128}, False, False),
        ({"block_size": 128, "symmetric": False}, False, True),
        ({"symmetric": True}, False, False),
        ({}, True, False),
        ({"weights": "int8", "symmetric": False}, False, False),
    ],
)
def test_which_blocks_have_offsets(options: dict[str, Any], kept: bool, offsets: bool) -> None:
    form = OnnxOptions(**{"weights": "int4"} | options).form(kept)
    assert form.layers is not None
    assert form.layers.offsets is offsets
    assert form.layers.symmetric is (not offsets and options.get("symmetric") is not False)


@pytest.mark.parametrize(
    ("options", "facts", "blocks"),
    [
        ({"weights": "int8"}, {}, (64, 64)),
        ({"weights": "int8"}, {"kept": True}, (32, 32)),
        ({"weights": "int8"}, {"blocks_of_32": True}, (32, 32)),  # a GGUF file's own
        ({"weights": "int4"}, {}, (32, 64)),
        ({"weights": "int4"}, {"kept": True}, (32, 32)),
        ({"weights": "int4", "head_bits": 4}, {}, (32, 32)),
        ({"weights": "int8", "block_size": 32}, {}, (32, 32)),
        ({"weights": "int4", "block_size": 128}, {}, (128, 128)),
    ],
)
def test_sizes_of_blocks(options: dict[str, Any], facts: dict[str, bool], blocks: tuple[int, int]) -> None:
    form = OnnxOptions(**options).form(**facts)
    assert form.layers is not None
    assert form.head is not None
    assert (form.layers.block_size, form.head.block_size) == blocks


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_offsets_lose_less_than_whole_zero_points(shift: float) -> None:
    """Also where a block lies far from zero, alone in its row."""
    matrix = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    matrix[::3, 64:96] = matrix[::3, 64:96] * 0.01 + shift
    matrix[5, 32:64] = 0.25  # a block of one value
    matrix[7] = 0
    errors = {}
    for offsets in (False, True):
        weight = quantize(matrix, BlockFormat(4, 32, symmetric=False, offsets=offsets))
        errors[offsets] = (torch.from_numpy(weight.dequantize()) - matrix).square().sum(1)
    assert (errors[True] <= errors[False] * 1.05).all()
    assert errors[True].sum() < 0.9 * errors[False].sum()
    assert not errors[True][7]


def test_eight_bit_inputs_stay_near(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "hf")
    check = export_onnx(folder, tmp_path / "onnx", OnnxOptions(weights="int4", accuracy_level=4)).manifest.check
    assert 1e-4 < check["relative_difference"] < 0.05  # rounded, and to no less than 8 bits


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, None)])
def test_a_quantized_folder_keeps_its_integers(tmp_path: Path, bits: int, group: int | None) -> None:
    plain, _ = saved(tmp_path / "plain")
    scheme = IntegerWeights(IntegerScheme(bits, group))
    model = load_model(plain, torch.float32, scheme=scheme)
    save_model(file_state(model, torch.float32), with_scheme(model.config, scheme), tmp_path / "hf")
    options = OnnxOptions(weights=f"int{bits}", block_size=16, accuracy_level=0, head_bits=8)
    given = runner(export_onnx(tmp_path / "hf", tmp_path / "onnx", options).folder)
    ids = sequence(0, 30)
    reference = load_model(tmp_path / "hf", torch.float32)
    with torch.inference_mode():
        for weight in (reference.lm_head.weight, reference.model.embed_tokens.weight):
            weight.copy_(torch.from_numpy(quantize(weight, BlockFormat(8, 16)).dequantize()))
        wanted = reference(torch.tensor([ids]))[0].numpy()
    torch.testing.assert_close(live(given, [ids], seed=0)[0], wanted, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match=f"int{bits} already"):
        export_onnx(tmp_path / "hf", tmp_path / "other", OnnxOptions(weights=f"int{12 - bits}"))
    if group is not None:
        with pytest.raises(ConfigError, match="use --format onnx with --block_size 32, or --weights fp32"):
            export_onnx(tmp_path / "hf", tmp_path / "other", OnnxOptions(weights="int4", block_size=64))
    assert not (tmp_path / "other").exists()


def test_half_of_the_bytes_in_fp16(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "hf", tie_word_embeddings=True)
    wide = export_onnx(folder, tmp_path / "fp32", OnnxOptions())
    half = export_onnx(folder, tmp_path / "fp16", OnnxOptions(weights="fp16"))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.half())
    ids = sequence(0, 50)
    torch.testing.assert_close(live(runner(half.folder), [ids], seed=0)[0], expected(theirs, ids), rtol=0, atol=1e-4)
    matrices = sum(p.numel() for p in theirs.parameters() if p.dim() == 2)
    sizes = [(bundle.folder / "weights.bin").stat().st_size for bundle in (wide, half)]
    assert sizes[0] - sizes[1] == pytest.approx(2 * matrices, abs=4096 * 20)


def test_it_runs_where_torch_and_the_models_cannot_be_imported(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "hf")
    export_onnx(folder, tmp_path / "onnx", OnnxOptions())
    prompt = sequence(5, 9)
    program = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "transformers") or name.startswith("arriero.models"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import json
from types import SimpleNamespace as Step
from arriero.export.bundle import open_bundle
from arriero.export.kinds import open_runner
from arriero.export.onnx_session import OnnxSession
from arriero.export.slot_runner import SlotRunner
runner = SlotRunner(OnnxSession(open_bundle(sys.argv[1]).graph, 2))
tokens, done = json.loads(sys.argv[2]), 0
while len(tokens) < 9 + 40:
    logits = runner.run([Step(tokens=tokens[done:], start=done, blocks=[1], logits=1, salt=b"")])
    done = len(tokens)
    tokens.append(int(logits[0].argmax()))
print(json.dumps(tokens))
"""
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "onnx"), json.dumps(prompt)],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    wanted = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert json.loads(told.stdout) == wanted[0].tolist()


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {},
            "rope type 'dynamic' cannot be exported to onnx",
        ),
        ({"head_dim": 8}, {}, "a head_dim of 8 cannot be exported to onnx"),
        ({}, {"context": 97}, "a context of 97 cannot be exported: from 2 to the model.s 96 positions can"),
        ({}, {"weights": "int3"}, "of the kind 'int3' are not known"),
        ({}, {"weights": "int4", "block_size": 48}, "blocks of 48 are not supported"),
        ({}, {"weights": "int4", "accuracy_level": 2}, "an accuracy level of 2 is not supported"),
        ({}, {"weights": "int4", "head_bits": 5}, "weights of 5 bits are not supported"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], text: str) -> None:
    folder, _ = saved(tmp_path / "hf", **changes)
    with pytest.raises(ConfigError, match=text):
        export_onnx(folder, tmp_path / "onnx", OnnxOptions(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_graph_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved(tmp_path / "hf")
    config = LlamaConfig.from_file(folder)
    tables = onnx_graph.rope_tables(config, 96)
    monkeypatch.setattr(onnx_graph, "rope_tables", lambda *_: (tables[0], tables[1] * 1.01))
    with pytest.raises(FormatError, match="its logits differ from the model's"):
        export_onnx(folder, tmp_path / "onnx", OnnxOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_graph_of_another_manifest(tmp_path: Path) -> None:
    bundle = export_onnx(saved(tmp_path / "hf")[0], tmp_path / "onnx")
    for changes in ({"context": 90}, {"config": {**bundle.manifest.config, "vocab_size": 299}}):
        with pytest.raises(FormatError, match="is of another model or context than the manifest says"):
            open_runner(replace(bundle, manifest=replace(bundle.manifest, **changes)), slots=1)
    with pytest.raises(FormatError, match=r"GB for keys and values of 10{17} sequences of 96 tokens cannot be had"):
        open_runner(bundle, slots=10**17)


def test_a_graph_that_cannot_be_computed(tmp_path: Path) -> None:
    bundle = export_onnx(saved(tmp_path / "hf")[0], tmp_path / "onnx")
    graph = onnx.load(bundle.graph, load_external_data=False)
    next(
        value for value in graph.graph.input if value.name == "logits_at"
    ).type.tensor_type.elem_type = TensorProto.INT32
    bundle.graph.write_bytes(graph.SerializeToString())
    session = SlotRunner(OnnxSession(bundle.graph, 1, threads=1))
    with pytest.raises(FormatError, match=r"model\.onnx: ONNX Runtime cannot compute it"):
        session.run([Step([1, 2], 0, [0], 1)])


def test_a_number_that_json_does_not_have(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "hf")
    (folder / "generation_config.json").write_text('{"temperature": Infinity}')
    with pytest.raises(FormatError, match="has NaN or Infinity as a number"):
        export_onnx(folder, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_blocks_that_divide_the_groups(tmp_path: Path) -> None:
    """Of integers with a scale for 16 inputs, which blocks of 32 cannot hold."""
    weights = torch.randint(-7, 8, (24, 48), dtype=torch.int8)
    scales = torch.rand(24, 3) + 0.1
    form = OnnxOptions("int4").form(kept=True, group=16).layers
    assert form is not None
    stored = from_integers(weights, scales, form).dequantize()
    np.testing.assert_array_equal(stored, (weights * scales.repeat_interleave(16, 1)).numpy())
    with pytest.raises(ConfigError, match=r"a scale for 16 inputs .* 32: use --format onnx with --block_size 16, or"):
        from_integers(weights, scales, BlockFormat(4, 32))
    with pytest.raises(ConfigError, match=r"a scale for 8 inputs .* 32: use --weights fp32, which dequantizes them"):
        from_integers(weights, torch.rand(24, 6), BlockFormat(4, 32))
