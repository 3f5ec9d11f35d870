"""Adapters of a 4-bit model in bundles of 4 bits, beside a model of transformers whose weights are gguf's plus theirs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arriero.adapters.lora_config import LoRAConfig
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.engine.export_source import export_source
from arriero.export.block_weights import BlockFormat
from arriero.export.kinds import open_runner
from arriero.export.onnx_export import OnnxOptions, export_onnx
from arriero.export.slot_runner import SlotRunner
from arriero.export.torch_session import TorchSession
from arriero.export.torch_trace import trace_rows, trace_step
from arriero.export.torch_weights import MatrixForm, program_weights
from arriero.export.weight_source import integer_source
from arriero.formats.conversion import convert_model
from arriero.formats.detection import detect
from arriero.formats.hf_source import open_hf
from arriero.formats.lost_changes import distance_from_levels, kept_share, nearness_warning
from arriero.formats.low_rank import LowRank, stacked
from arriero.formats.opening import Writing
from arriero.formats.source import ModelSource

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_models import VOCABULARY
from byte_tokenizer import write_byte_tokenizer
from program_runs import CONTEXT, expected, flat, live, saved, sequence
from random_adapter import write_adapter

IDS = sequence(0, 50)
ADAPTERS = {
    "lora": LoRAConfig(rank=2),
    "some layers": LoRAConfig(rank=4, target_modules=("q_proj", "v_proj", "down_proj")),
    "dora": LoRAConfig(rank=2, use_dora=True),
    "pissa": LoRAConfig(rank=2, pissa=True),
}


def on_levels(folder: Path) -> tuple[Path, Any]:
    """A model whose layers are what ggml's Q4_1 holds."""
    base, theirs = saved(folder, vocab_size=VOCABULARY, tie_word_embeddings=True)
    write_byte_tokenizer(base)
    kind = gguf.GGMLQuantizationType.Q4_1
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)))
    theirs.save_pretrained(base)
    return base, theirs


def merged(theirs: Any, adapter: Path, config: LoRAConfig, base: Path) -> Any:
    """The model of transformers with PEFT's formulas written out, in fp64."""
    if config.pissa:  # a start of its own, which PEFT keeps in another file: what arriero merges, tested elsewhere
        with export_source(
            ModelOptions(model_name_or_path=str(base)), AdapterPathOptions(lora_path=str(adapter))
        ) as source:
            assert isinstance(source, ModelSource)
            theirs.load_state_dict(dict(source.tensors), strict=False)
            return theirs.eval()
    return peft.PeftModel.from_pretrained(theirs, str(adapter)).merge_and_unload().eval()


def given(kind: str, source: ModelSource, folder: Path) -> Any:
    if kind == "onnx":
        bundle = export_onnx(source, folder, OnnxOptions("int4", accuracy_level=0))
        assert "an adapter of rank" in bundle.manifest.weights
        return open_runner(bundle, slots=4, threads=1)
    numbers = integer_source(source, source)
    config, weights = source.config, program_weights(numbers, MatrixForm(bits=4))
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    programs = [flat(trace(config, CONTEXT, weights)) for trace in (trace_step, trace_rows)]
    own = [weights[name].load() for name in sorted(weights)]
    return SlotRunner(TorchSession(programs[0], {}, own, shape, CONTEXT, VOCABULARY, rows=4, one_token=programs[1]))


@pytest.mark.parametrize("kind", ["onnx", "program"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_stays_beside_four_bits(tmp_path: Path, kind: str, name: str) -> None:
    """Most of what it adds is less than a step, and would be rounded away with the weights."""
    config = ADAPTERS[name]
    base, theirs = on_levels(tmp_path / "base")
    write_adapter(base, tmp_path / "adapter", config, size=0.02, name=str(base))
    before = expected(theirs, IDS)
    options = ModelOptions(model_name_or_path=str(base))
    with export_source(options, AdapterPathOptions(lora_path=str(tmp_path / "adapter"))) as source:
        assert isinstance(source, ModelSource)
        assert len(source.updates) in (14, 6)
        found = live(given(kind, source, tmp_path / "bundle"), [IDS], seed=0)[0]
    wanted = expected(merged(theirs, tmp_path / "adapter", config, base), IDS)
    change = np.float64(wanted - before)
    assert np.abs(change).max() > 0.02
    # besides: the head in 8 bits, offsets or steps in fp16, inputs of 8 bits (program), factors in 4 bits (graph)
    projected = float((np.float64(found - before) * change).sum() / np.square(change).sum())
    assert 0.9 < projected < 1.1


def test_a_large_rank_is_rounded_with_the_weights_in_eight_bits(tmp_path: Path) -> None:
    base, _ = on_levels(tmp_path / "base")
    config = LoRAConfig(rank=24, target_modules=("gate_proj", "up_proj"))
    write_adapter(base, tmp_path / "adapter", config, size=0.02, name=str(base))
    options = ModelOptions(model_name_or_path=str(base))
    with export_source(options, AdapterPathOptions(lora_path=str(tmp_path / "adapter"))) as source:
        assert isinstance(source, ModelSource)
        numbers = integer_source(source, source)
        gate, both = (
            "model.layers.0.mlp.gate_proj.weight",
            [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")],
        )
        assert numbers.wider([gate])
        stored = numbers.blocks(both, BlockFormat(4, 32, False, True))
        whole = torch.cat([source.tensors[name] for name in both])  # type: ignore[misc]
        assert stored.format.bits == 8
        assert float((torch.from_numpy(stored.dequantize()) - whole).norm() / whole.norm()) < 0.01


@pytest.mark.parametrize(("out", "rank", "columns"), [(40, 3, 64), (8, 16, 32), (5, 2, 300)])
def test_balanced_factors_are_the_same_matrix(out: int, rank: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(out)
    up, down = torch.randn(out, rank, generator=generator) * 1e-3, torch.randn(rank, columns, generator=generator) * 30
    found = LowRank(up, down).balanced()
    assert found.rank == min(out, rank)
    torch.testing.assert_close(found.whole().double(), up.double() @ down.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.up.t() @ found.up, torch.eye(found.rank), rtol=0, atol=1e-5)


def test_factors_of_nothing_and_side_by_side() -> None:
    none = LowRank(torch.zeros(4, 2), torch.ones(2, 6)).balanced()
    assert none.rank == 0
    assert stacked([none, None], [4, 3]) is None
    one, other = LowRank(torch.randn(4, 2), torch.randn(2, 6)), LowRank(torch.randn(3, 1), torch.randn(1, 6))
    found = stacked([one, None, other], [4, 2, 3])
    assert found is not None
    torch.testing.assert_close(found.whole(), torch.cat((one.whole(), torch.zeros(2, 6), other.whole())))


def changed(base: Path, folder: Path, change: Any) -> Path:
    """The model with other weights in its layers."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state: Mapping[str, Tensor] = load_file(base / "model.safetensors")
    save_file(
        {name: change(value).contiguous() if "_proj" in name else value for name, value in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def test_who_is_warned_that_a_training_would_be_lost(tmp_path: Path) -> None:
    base, _ = on_levels(tmp_path / "base")
    other, _ = saved(tmp_path / "other")
    torch.manual_seed(0)
    folders = {
        "as it was": (base, False),
        "ordinary": (other, False),
        "trained": (changed(base, tmp_path / "trained", lambda w: w + 0.002 * w.std() * torch.randn_like(w)), True),
        "in bf16": (changed(base, tmp_path / "half", lambda w: w.bfloat16()), True),
        "far away": (changed(base, tmp_path / "far", lambda w: w + 0.2 * w.std() * torch.randn_like(w)), False),
    }
    for name, (folder, warned) in folders.items():
        with open_hf(folder) as source:
            assert (nearness_warning(source, "") is not None) == warned, (name, distance_from_levels(source))
    with open_hf(folders["trained"][0]) as source:
        assert "0.19% of their norm" in str(nearness_warning(source, ""))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_an_adapter_that_a_file_keeps(tmp_path: Path, share: float) -> None:
    base, _ = on_levels(tmp_path / "base")
    torch.manual_seed(0)
    with open_hf(base) as source:
        whole = {name: value if isinstance(value, Tensor) else value.load() for name, value in source.tensors.items()}
        updates = {
            name: LowRank(torch.randn(len(value), 2) * 1e-3, torch.randn(2, value.shape[1]))
            for name, value in whole.items()
            if "_proj" in name
        }
        added = {name: updates[name].whole() if name in updates else torch.zeros(1) for name in whole}
        noise = {name: value + share * added[name] + 0.01 * torch.randn_like(value) for name, value in whole.items()}
        sums = ModelSource(base, "hf", source.config, {name: value + added[name] for name, value in whole.items()})
        written = ModelSource(base, "hf", source.config, noise)
        assert kept_share(sums, written, updates) == pytest.approx(share, abs=0.2)


def test_the_command_says_what_becomes_of_an_adapter(tmp_path: Path, in_process: Any) -> None:
    base, _ = on_levels(tmp_path / "base")
    write_adapter(base, tmp_path / "adapter", LoRAConfig(rank=2), size=0.003, name=str(base))
    words = ["export", "--model_path", str(base), "--weights", "int4", "--context", "64"]
    run = in_process(*words, "--lora_path", str(tmp_path / "adapter"), "--output_path", str(tmp_path / "bundle"))
    assert run.returncode == 0, run.stderr
    assert "beside 14 matrices an adapter of rank 2" in run.stdout
    assert "warning" not in run.stderr
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert "adapter of rank 2" in manifest["weights"]
    run = in_process(
        "merge",
        "--model_name_or_path",
        str(base),
        "--lora_path",
        str(tmp_path / "adapter"),
        "--output_path",
        str(tmp_path / "merged"),
    )
    assert run.returncode == 0, run.stderr
    words[2] = str(tmp_path / "merged")
    run = in_process(*words, "--output_path", str(tmp_path / "other"))
    assert run.returncode == 0, run.stderr
    assert "what a training changed is lost" in run.stderr


@pytest.mark.parametrize(
    ("kind", "told"), [("q4_0", True), ("q4_1", True), ("q4_k_m", False), ("q8_0", False), ("f16", False)]
)
def test_a_conversion_to_gguf_says_so_too(tmp_path: Path, kind: str, told: bool) -> None:
    """q4_k_m needs rows of 256: these become q5_0."""
    base, _ = on_levels(tmp_path / "base")
    torch.manual_seed(0)
    trained = changed(base, tmp_path / "trained", lambda w: w + 0.002 * w.std() * torch.randn_like(w))
    writing = Writing("gguf", gguf_kind=kind)
    notes = convert_model(detect(trained), tmp_path / "out.gguf", writing, verify=False).notes
    assert any("what a training changed is lost" in note for note in notes) == told
    notes = convert_model(detect(base), tmp_path / "base.gguf", writing, verify=False).notes
    assert not any("is lost" in note for note in notes)
