"""Programs of 8- or 4-bit levels, beside gguf's numbers, NumPy's, and a model of transformers with the same rounding."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from arriero.errors import ConfigError
from arriero.export import native_code
from arriero.export.aoti_export import export_aoti
from arriero.export.aoti_runner import open_runner
from arriero.export.integer_tiles import FACTORS, LEVELS, STEPS, Levels, levels_of, tile_shapes, tiles, untiled
from arriero.export.native_operators import cached_attention, integer_product
from arriero.export.slot_runner import SlotRunner
from arriero.export.torch_export import TorchOptions
from arriero.export.torch_session import TorchSession
from arriero.export.torch_trace import trace_rows, trace_step
from arriero.export.torch_weights import MatrixForm, program_weights
from arriero.export.weight_source import WeightSource, integer_source
from arriero.formats.download import resolve_model
from arriero.formats.hf_source import open_hf
from arriero.formats.quantized import QuantizedFolder
from arriero.models.config import LlamaConfig
from arriero.processor_info import features

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from bundle_families import FAMILIES
from program_runs import CONTEXT, flat, live, saved, sequence
from twin_models import VOCAB

NATIVE = Path(native_code.__file__).parent / "native"
PARTS = (LEVELS, STEPS, FACTORS)


class OneMatrix(WeightSource):
    """A source that has one matrix."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix, self._bits, self._updates, self.layers = matrix, {}, {}, frozenset()

    def load(self, name: str) -> Tensor:
        return self._matrix


def random_levels(outputs: int, inputs: int, bits: int) -> Levels:
    """With steps and lows that fp16 has."""
    shape = (outputs, -(-inputs // 32))
    values = torch.randint(0, 1 << bits, (*shape, 32), dtype=torch.uint8)
    steps = (torch.rand(shape) * 0.01 + 1e-3).half().float()
    return Levels(values, steps, -(steps * torch.randint(0, 1 << bits, shape)).half().float(), bits)


def rounded(x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Each block of 32 of the last dimension in 8 bits; what is short of a block is filled up."""
    filled = np.pad(np.asarray(x, np.float64), [*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % 32)])
    blocks = filled.reshape(*x.shape[:-1], -1, 32)
    unit = np.abs(blocks).max(-1, keepdims=True) / 127
    whole = np.rint(np.divide(blocks, unit, out=np.zeros_like(blocks), where=unit > 0)) * unit
    return whole.reshape(filled.shape)[..., : x.shape[-1]]


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1])
def test_what_ggml_rounded_is_kept_as_it_is(kind: gguf.GGMLQuantizationType) -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 96).numpy() * 0.03
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    parts = tiles(levels_of(OneMatrix(torch.from_numpy(theirs)), ["w"], 4))
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == tile_shapes(50, 96, 4)
    np.testing.assert_allclose(untiled(parts)[:50].numpy(), theirs, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.5 / 127), (4, 0.5 / 15)])
@pytest.mark.parametrize("size", [1.0, 1e-6, 3e4])
def test_other_weights_are_near(bits: int, largest: float, size: float) -> None:
    """Of any size, though steps are in fp16: no further than half a step of the whole range of a block, or little more."""
    torch.manual_seed(1)
    weight = torch.randn(33, 70) * size
    found = untiled(tiles(levels_of(OneMatrix(weight), ["w"], bits)))[:33, :70]
    blocks = torch.nn.functional.pad(weight, (0, 26)).view(33, -1, 32)
    span = 2 * blocks.abs().amax(-1) if bits == 8 else blocks.amax(-1) - blocks.amin(-1)
    error = (torch.nn.functional.pad(found - weight, (0, 26))).view(33, -1, 32).square().mean(-1).sqrt()
    assert (error / span).max() < largest


@pytest.mark.parametrize("bits", [4, 8])
def test_levels_of_tiles(bits: int) -> None:
    levels = random_levels(40, 70, bits)
    parts = tiles(levels)
    np.testing.assert_array_equal(untiled(parts)[:40, :70].double().numpy(), levels.dequantized(70).numpy())


def test_integers_of_a_quantized_folder_are_kept(tmp_path: Path, in_process: Callable[..., Any]) -> None:
    folder, _ = saved(tmp_path / "hf", vocab_size=2048)
    for path in resolve_model("__internal_testing__/tiny-random-llama", tmp_path / "cache", lambda _: None).glob(
        "tok*"
    ):
        shutil.copy(path, folder)
    name = "model.layers.0.mlp.down_proj"
    told = in_process(
        "quantize", "--model_name_or_path", str(folder), "--output_path", str(tmp_path / "q"), "--quant_type", "int4",
        "--group_size", "32",
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    stored = QuantizedFolder(tmp_path / "q", LlamaConfig.from_file(tmp_path / "q"))
    with open_hf(tmp_path / "q") as opened:
        source = integer_source(opened, tmp_path / "q")
        found = levels_of(source, [f"{name}.weight"], 4)
        wanted = source.load(f"{name}.weight")
    assert stored.layers
    np.testing.assert_allclose(found.dequantized(wanted.shape[1]).numpy(), wanted.double().numpy(), rtol=1e-3, atol=0)


VARIANTS = {"": (), **native_code._VARIANTS}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Of a variant its function, for 4 bits and for 8."""
    folder = tmp_path_factory.mktemp("native")

    def library(variant: str) -> Any:
        path = folder / f"lib{variant or 'plain'}.so"
        if not path.exists():
            calls = "\n".join(
                f'extern "C" void product_{bits}(const float* x, const uint8_t* l, const uint16_t* s, const float* f, float* y,'
                f" int64_t r, int64_t i, int64_t o) {{ arriero::integer_product<{bits}>(x, l, s, f, y, r, i, o); }}"
                for bits in (4, 8)
            )
            source = folder / f"{variant or 'plain'}.cpp"
            macro = f"#define {variant}\n" if variant else ""
            source.write_text(f'{macro}#include "{NATIVE / "integer_product.h"}"\n{calls}\n')
            command = [
                "g++",
                "-O2",
                "-std=c++20",
                "-Wall",
                "-Werror",
                "-Wno-maybe-uninitialized",
                "-fopenmp",
                "-shared",
                "-fPIC",
                str(source),
            ]
            subprocess.run([*command, "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))

    return library


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_native_product(compiled: Callable[[str], Any], variant: str, bits: int) -> None:
    """Every variant that this processor has: as many rows as share a loop, and more, sizes that fill nothing up."""
    if not features().issuperset(VARIANTS[variant]):
        pytest.skip(f"this processor has no {variant}")
    product = getattr(compiled(variant), f"product_{bits}")
    rng = np.random.default_rng(bits)
    for rows, outputs, inputs in ((1, 16, 32), (1, 50, 70), (3, 31, 96), (8, 16, 64), (13, 100, 33), (23, 48, 160)):
        torch.manual_seed(rows)
        levels = random_levels(outputs, inputs, bits)
        parts = [np.ascontiguousarray(tiles(levels)[part].numpy()) for part in PARTS]
        x = rng.standard_normal((rows, inputs), np.float32) * rng.choice([1e-3, 1, 50], (rows, 1)).astype(np.float32)
        x[0, : inputs // 2] = 0
        y = np.full((rows, outputs), np.nan, np.float32)
        product(
            *[array.ctypes.data_as(ctypes.c_void_p) for array in (x, *parts, y)],
            *map(ctypes.c_int64, (rows, inputs, outputs)),
        )
        wanted = rounded(x) @ levels.dequantized(inputs).numpy().T
        # a number just between two integers may be rounded to either
        scale = np.abs(x).max(1, keepdims=True) * np.abs(levels.dequantized(inputs).numpy()).max()
        assert np.abs(y - wanted).max(1).max() <= (2e-5 * scale * inputs + scale / 127).max()
        assert np.median(np.abs(y - wanted) / scale) < 1e-5
        reference = integer_product(*map(torch.from_numpy, (x, *parts)), outputs).numpy()
        assert np.median(np.abs(y - reference) / scale) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_no_number_stays_none(compiled: Callable[[str], Any], variant: str) -> None:
    if not features().issuperset(VARIANTS[variant]):
        pytest.skip(f"this processor has no {variant}")
    parts = [np.ascontiguousarray(tiles(random_levels(16, 64, 4))[part].numpy()) for part in PARTS]
    x = np.ones((4, 64), np.float32)
    x[0, 40], x[1, 3], x[2] = np.nan, np.inf, 1e-40
    y = np.zeros((4, 16), np.float32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, *parts, y)]
    compiled(variant).product_4(*pointers, *map(ctypes.c_int64, (4, 64, 16)))
    reference = integer_product(*map(torch.from_numpy, (x, *parts)), 16).numpy()
    for found in (y, reference):
        assert np.isnan(found[:2]).all()
        assert (found[2] == 0).all()
        assert np.isfinite(found[3]).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1.0, 1e-8, 1e-12])
def test_flat_blocks_leave_the_others_alone(bits: int, size: float) -> None:
    """Of zeros, or of one number: their step is no measure for the rest of the output."""
    torch.manual_seed(2)
    weight = torch.randn(8, 96) * size
    weight[:, :32], weight[3, :32] = 0.0, 0.7 * size
    found = untiled(tiles(levels_of(OneMatrix(weight), ["w"], bits)))[:8]
    assert (found[:3, :32] == 0).all()
    apart = ((found - weight)[:, 32:].square().mean() / weight[:, 32:].square().mean()).sqrt()
    assert apart < (0.1 if bits == 4 else 0.01)
    torch.testing.assert_close(found[3, :32], weight[3, :32], rtol=0.01, atol=0)


@pytest.mark.slow
def test_parts_of_a_tensor_are_multiplied_where_they_lie() -> None:
    """A kernel of the compiler's is given the memory of the whole."""
    torch.manual_seed(3)
    parts = [tiles(random_levels(32, 64, 4))[part] for part in PARTS]

    def call(x: Tensor, *own: Tensor) -> tuple[Tensor, Tensor]:
        return integer_product((x * 2)[2:5], *own, 32), integer_product(x[1:], *own, 32)

    torch._dynamo.reset()
    x = torch.randn(6, 64)
    with native_code.native_operators():
        found = torch.compile(call, options={"epilogue_fusion": False, "fx_graph_cache": False})(x, *parts)
    for one, other in zip(found, call(x, *parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def attention(query: Tensor, cache: Tensor, starts: Tensor, window: int, scale: float) -> Tensor:
    """In fp64, in words."""
    rows, heads, _ = query.shape
    kv = cache.shape[1] // 2
    found = torch.empty(query.shape, dtype=torch.float64)
    for row in range(rows):
        end = int(starts[row]) + 1
        seen = slice(max(0, end - window) if window else 0, end)
        for head in range(heads):
            own = head // (heads // kv)
            keys, values = cache[row, own, seen].double(), cache[row, kv + own, seen].double()
            found[row, head] = (keys @ query[row, head].double() * scale).softmax(0) @ values
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv", "size", "window"), [(6, 1, 24, 0), (10, 2, 64, 5), (3, 3, 100, 40)])
def test_the_native_attention(heads: int, kv: int, size: int, window: int) -> None:
    torch.manual_seed(heads)
    torch._dynamo.reset()  # else it takes what differs between these tests for open sizes

    def call(query: Tensor, cache: Tensor, starts: Tensor) -> Tensor:
        return cached_attention(query, cache, starts, window, size**-0.5) + 1

    with native_code.native_operators():
        function = torch.compile(call, options={"epilogue_fusion": False, "fx_graph_cache": False})
        for rows in (4, 2, 7):
            query, cache = torch.randn(rows, heads, size) * 3, torch.randn(rows, 2 * kv, 90, size)
            starts = torch.tensor([0, 89, 17, 40, 3, 33, 64][:rows])
            if rows == 4:
                torch._dynamo.mark_dynamic(query, 0)
                torch._dynamo.mark_dynamic(cache, 0)
                torch._dynamo.mark_dynamic(starts, 0)
            wanted = attention(query, cache, starts, window, size**-0.5)
            torch.testing.assert_close(function(query, cache, starts).double() - 1, wanted, rtol=0, atol=2e-5)
            torch.testing.assert_close(call(query, cache, starts).double() - 1, wanted, rtol=0, atol=2e-5)


def with_rounding(theirs: Any, weights: Callable[[str], Tensor]) -> None:
    """Give a model of transformers the stored weights, and let its linear layers round their inputs."""

    def round_inputs(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (torch.from_numpy(rounded(inputs[0].numpy())).float(),)

    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(weights(name)[: parameter.shape[0], : parameter.shape[1]])
    for module in theirs.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(round_inputs)


def assert_near(given: Any, theirs: Any, seed: int) -> None:
    """Logits of sequences at any pace; here and there an input is just between two integers, and rounded to the other."""
    sequences = [sequence(seed + number, length) for number, length in enumerate((40, 3, 90, 17, 60, 1, 33))]
    apart, own = [], []
    for ids, logits in zip(sequences, live(given, sequences, seed), strict=True):
        with torch.inference_mode():
            wanted = theirs(torch.tensor([ids])).logits[0].numpy()
        apart.append(np.abs(logits - wanted).max(1))
        own.append(np.abs(wanted).max())
    found = np.concatenate(apart)
    assert np.median(found) < 1e-4 * max(own)
    assert found.max() < 0.02 * max(own)


FORMS = [(FAMILIES["mistral"], 4, 8), ({"tie_word_embeddings": True, "attention_bias": True}, 8, 8), ({}, 4, 4)]


@pytest.mark.parametrize(("changes", "bits", "head_bits"), FORMS)
def test_logits_of_programs(tmp_path: Path, changes: dict[str, Any], bits: int, head_bits: int) -> None:
    """As they are traced, by the operators in words."""
    folder, theirs = saved(tmp_path / "hf", **changes)
    with open_hf(folder) as opened:
        source, form = integer_source(opened, folder), MatrixForm(bits=bits, head_bits=head_bits)
        weights, config = program_weights(source, form), opened.config
        own = [weights[name].load() for name in sorted(weights)]
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        programs = [trace_step(config, CONTEXT, weights), trace_rows(config, CONTEXT, weights)]
        step, rows = (flat(program) for program in programs)
        session = TorchSession(step, {}, own, shape, CONTEXT, VOCAB, rows=5, one_token=rows)
        with_rounding(theirs, lambda name: untiled(tiles(levels_of(source, [name], form.bits_of(name) or 0))))
        assert_near(SlotRunner(session), theirs, seed=2)


@pytest.mark.slow
def test_a_bundle_of_native_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, with a window, biases and a head of its own, whose sizes fill nothing up."""
    changes = {"model_type": "mistral", "sliding_window": 30, "attention_bias": True, "num_hidden_layers": 1}
    folder, theirs = saved(tmp_path / "hf", **changes)
    bundle = export_aoti(folder, tmp_path / "aoti", TorchOptions("int4"))
    assert bundle.manifest.weights.startswith("int4, blocks of 32 with steps and lows; head and embedding int8")
    assert set(native_code.needed_features()) <= set(bundle.manifest.isa.split())
    assert 0 < bundle.manifest.check["relative_difference"] < 0.1
    with open_hf(folder) as opened:
        source = integer_source(opened, folder)
        with_rounding(
            theirs, lambda name: untiled(tiles(levels_of(source, [name], MatrixForm(bits=4).bits_of(name) or 0)))
        )
    for seed in (1, 2):
        assert_near(open_runner(bundle, slots=5), theirs, seed)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": "int4", "head_bits": 5}, "--head_bits 5: 8 or 4"),
        ({"weights": "int3"}, "'int3' are none of fp32, fp16, bf16, int8, int4"),
    ],
)
def test_what_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TorchOptions(**options)


def test_int4_of_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arriero.export.torch_export.gpus", lambda: 1)
    with pytest.raises(ConfigError, match="--weights int4 is for CPUs"):
        TorchOptions("int4", device="cuda")
