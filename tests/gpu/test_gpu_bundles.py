"""Bundles for a GPU against transformers.

On a CPU the same programs run: half precision in products, keys and values, and lengths in steps of 64.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.bundles.running import bundle_engine
from arriero.cli import main
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import FormatError
from arriero.export import aoti_export, torch_export, torch_target
from arriero.export.aoti_export import export_aoti
from arriero.export.bundle import Bundle, Manifest, open_bundle
from arriero.export.captured_steps import CapturedSteps
from arriero.export.kinds import open_runner
from arriero.export.self_check import Step
from arriero.export.torch_export import TorchOptions, export_torch
from arriero.export.torch_session import on_device
from arriero.export.torch_target import Target, check_gpus, target_of

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from bundle_families import FAMILIES
from byte_models import likeliest, save_byte_model
from recorded_steps import RecordedOperations
from twin_models import VOCAB, their_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 192}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def pretend(patched: pytest.MonkeyPatch) -> None:
    """That there is a GPU, which is the CPU."""
    patched.setattr(Target, "of", lambda _, matrices: Target(torch.device("cpu"), matrices, 64))
    patched.setattr(torch_target, "gpus", lambda: 1)
    patched.setattr(torch_export, "gpus", lambda: 1)
    patched.setattr(torch_target, "capability", lambda _: "")


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    chosen = torch.device(request.param)
    if chosen.type == "cpu":
        pretend(monkeypatch)
    return chosen


def saved(folder: Path, **changes: Any) -> tuple[Path, Any]:
    theirs = their_model(**SIZES | changes)
    theirs.save_pretrained(folder)  # type: ignore[operator]
    return folder, theirs


def rounded(theirs: Any, dtype: torch.dtype) -> Any:
    """The model as a bundle stores it, in fp64."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.to(dtype))
    return theirs.double()


def export(kind: str, folder: Path, target: Path, weights: str, context: int | None = None, **more: Any) -> Bundle:
    options = TorchOptions(weights, context, "cuda")
    if kind == "torch":
        return export_torch(folder, target, options, **more)
    return export_aoti(folder, target, options, decode_rows=(), **more)


def check(bundle: Bundle, theirs: Any, weights: str) -> None:
    """Long and short prompts, and then both go on, in one step."""
    runner, generator = open_runner(bundle, slots=4), torch.Generator().manual_seed(1)
    ids = [torch.randint(VOCAB, (size,), generator=generator).tolist() for size in (192, 9, 33)]
    found: list[list[Any]] = [[], [], []]
    for begin, ends in ((0, (140, 3, 20)), (None, (141, 4, 21)), (None, (192, 9, 33))):
        starts = [0, 0, 0] if begin == 0 else [sum(len(part) for part in parts) for parts in found]
        work = [Step(ids[s][starts[s] : ends[s]], starts[s], [s], ends[s] - starts[s]) for s in range(3)]
        logits, at = torch.as_tensor(runner.run(work)), 0
        assert str(logits.device).partition(":")[0] == torch.device(runner.device).type
        for s in range(3):
            count = ends[s] - starts[s]
            found[s].append(logits[at : at + count].double().cpu())
            at += count
    for own, parts in zip(ids, found, strict=True):
        with torch.inference_mode():
            wanted = theirs(torch.tensor([own])).logits[0]
        apart: Tensor = torch.cat(parts) - wanted
        if weights == "fp32":
            assert float(apart.abs().max()) <= 1e-4
        else:
            assert float(apart.norm() / wanted.norm()) <= {"fp16": 0.003, "bf16": 0.02}[weights]


@devices
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_logits_are_those_of_transformers(tmp_path: Path, device: torch.device, family: str, weights: str) -> None:
    folder, theirs = saved(tmp_path / "hf", **FAMILIES.get(family, {}))
    bundle = export("torch", folder, tmp_path / "torch", weights)
    check(bundle, rounded(theirs, DTYPES[weights]), weights)


@devices
def test_steps_that_are_repeated(tmp_path: Path, device: torch.device) -> None:
    """Over the border of two lengths, some rows of all at a time; rows that change places, and others that come to them."""
    folder, theirs = saved(tmp_path / "hf", max_position_embeddings=600)
    runner: Any = open_runner(export("torch", folder, tmp_path / "torch", "fp32"), slots=3)
    session, capture = runner._session, RecordedOperations()
    if device.type == "cpu":
        session._captured = CapturedSteps(session._step, session._weights, session._caches, session._span, capture)
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(VOCAB, (290,), generator=generator).tolist() for _ in range(4)]
    lengths, slots, found = [250, 20, 254, 7], {0: 0, 1: 1, 2: 2}, [[], [], [], []]
    for begin in (0, 1, 2):
        runner.run([Step(ids[begin][: lengths[begin]], 0, [slots[begin]], 0)])
    for turn in range(24):
        if turn == 12:  # another sequence in a slot
            slots[3] = slots.pop(1)
            runner.run([Step(ids[3][: lengths[3]], 0, [slots[3]], 0)])
        going = [s for s in slots if turn % 3 or s != 0]
        logits = runner.run([Step([ids[s][lengths[s]]], lengths[s], [slots[s]], 1) for s in going])
        for s, row in zip(going, torch.as_tensor(logits), strict=True):
            found[s].append(row.cpu())
            lengths[s] += 1
    assert session._captured.graphs >= 4
    assert device.type == "cuda" or capture.replays == 24
    for own, rows in zip(ids, found, strict=True):
        end = lengths[ids.index(own)]
        with torch.inference_mode():
            wanted = theirs(torch.tensor([own[:end]])).logits[0, end - len(rows) :]
        torch.testing.assert_close(torch.stack(rows), wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
@devices
@pytest.mark.parametrize("weights", [pytest.param("fp32", marks=pytest.mark.peers), "bf16"])
def test_compiled_programs(tmp_path: Path, device: torch.device, weights: str) -> None:
    changes = {"model_type": "mistral", "sliding_window": 30, "attention_bias": True, "num_hidden_layers": 1}
    folder, theirs = saved(tmp_path / "hf", **changes)
    bundle = export("aoti", folder, tmp_path / "aoti", weights)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        assert bundle.manifest.isa.split()[-1] == f"sm_{major}{minor}"
        other = replace(bundle, manifest=replace(bundle.manifest, isa=f"{bundle.manifest.isa[:-2]}19"))
        with pytest.raises(FormatError, match="is compiled for GPUs of the kind sm_19, and cuda is sm_"):
            open_runner(other, slots=1)
    check(bundle, rounded(theirs, DTYPES[weights]), weights)


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        ("torch", "cpu"),
        pytest.param("torch", "cuda", marks=pytest.mark.gpu),
        pytest.param("aoti", "cuda", marks=pytest.mark.gpu),
    ],
    indirect=["device"],
)
def test_the_command_line(kind: str, tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy answers are those of transformers; drawn ones come again with their seed."""
    folder, theirs = save_byte_model(tmp_path / "hf")
    given = ["--device", "gpu", "--weights", "fp32", "--output_path", str(tmp_path / "out" / "llama")]
    assert main(["export", "--model_path", str(folder), "--format", kind, *given]) == 0
    prompts = ["say one", "say two, and then a good deal more than that, until a step is long", "a"]
    rows = [json.dumps({"src": prompt}) for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    answers = []
    common = ["infer", "--model_dir", str(tmp_path / "out"), "--device", "gpu", "--max_new_tokens", "12"]
    common += ["--data_file", str(tmp_path / "rows.jsonl"), "--predict_file", str(tmp_path / "answers.jsonl")]
    draw = ["--do_sample", "yes", "--temperature", "2", "--seed", "3"]
    for drawn in ([], [], draw, draw):
        assert main([*common, *drawn]) == 0
        answers.append((tmp_path / "answers.jsonl").read_text())
    assert answers[0] == answers[1]
    assert answers[2] == answers[3] != answers[0]
    engine = bundle_engine(open_bundle(tmp_path / "out" / "llama"), 3)
    for prompt in prompts:
        ids = list(prompt.encode())
        found = engine.generate([ids], SamplingParams(max_new_tokens=12, ignore_eos=True))[0].token_ids
        assert list(found) == likeliest(theirs, ids, 12)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", r"\(signal 11\)"),
        ("raise RuntimeError('no such kernel')", r"\(RuntimeError: no such kernel\)"),
    ],
)
def test_torch_that_cannot_load_what_it_compiled(script: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export says so, and lives on."""
    monkeypatch.setattr(aoti_export, "_LOAD", script)
    with pytest.raises(FormatError, match=f"cannot load what it compiled for this GPU {reason}: use --format torch"):
        aoti_export.check_loads(Path("model.pt2"), torch.device("cuda:1"))


def test_gpus_of_two_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code runs on the one that it is compiled for, and the line says what else is here."""
    names = {"cuda": "sm_80", "cuda:0": "sm_80", "cuda:1": "sm_90"}
    monkeypatch.setattr(torch_target, "gpus", lambda: 2)
    monkeypatch.setattr(torch_target, "capability", names.__getitem__)
    manifest = Manifest("aoti", "model.pt2", "bf16", 100, {}, {}, {}, {}, device="cuda", isa="x86_64 avx2 sm_90")
    bundle = Bundle(tmp_path, manifest)
    check_gpus(bundle)
    assert target_of(bundle, torch.bfloat16, "cuda:1") == Target(torch.device("cuda:1"), torch.bfloat16, 64)
    with pytest.raises(
        FormatError, match="is compiled for GPUs of the kind sm_90, and cuda is sm_80: name another one"
    ):
        target_of(bundle, torch.bfloat16)
    with pytest.raises(FormatError, match="there is no cuda:2 here, and 2 GPUs are"):
        target_of(bundle, torch.bfloat16, "cuda:2")
    with pytest.raises(FormatError, match=r"its matrices are torch.int64, which no GPU computes with"):
        target_of(bundle, torch.int64, "cuda:1")
    other = Bundle(tmp_path, replace(manifest, isa="x86_64 sm_75"))
    with pytest.raises(FormatError, match="is compiled for GPUs of the kind sm_75, and here is sm_80, sm_90; export"):
        check_gpus(other)


def test_memory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved(tmp_path / "hf")
    pretend(monkeypatch)
    bundle = export("torch", folder, tmp_path / "torch", "bf16")
    with pytest.raises(FormatError, match="for keys and values of 1000000000000000000 sequences"):
        open_runner(bundle, slots=10**18)

    def full(own: Tensor, *given: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(FormatError, match=r"its weights, 0\.0 GB, do not fit what is free of cpu's memory"):
        on_device(bundle, {"weight": torch.zeros(3)}, Target.of("cuda", torch.bfloat16))


def test_what_a_graph_reads_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads its inputs where they were when it was captured."""
    folder, _ = saved(tmp_path / "hf")
    pretend(monkeypatch)
    session: Any = open_runner(export("torch", folder, tmp_path / "torch", "fp32"), slots=2)._session  # type: ignore[attr-defined]
    read: list[weakref.ref[Tensor]] = []

    def step(inputs: Sequence[Tensor]) -> Tensor:
        read.extend(weakref.ref(value) for value in inputs)
        logits: Tensor = session._step(inputs)
        return logits

    def capture(compute: Callable[[], Tensor], *, first: bool) -> tuple[Callable[[], object], Tensor]:
        return (lambda: None), compute()

    captured = CapturedSteps(step, session._weights, session._caches, session._span, capture)
    assert captured.run(0, np.array([5, 6]), np.array([0, 0])) is not None
    gc.collect()
    assert read
    assert all(value() is not None for value in read)


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each: to export for one, and to run what was exported for one."""
    folder, _ = save_byte_model(tmp_path / "hf")
    with monkeypatch.context() as patched:
        pretend(patched)
        export("torch", folder, tmp_path / "llama", "bf16")
    monkeypatch.setattr(torch_target, "gpus", lambda: 0)
    monkeypatch.setattr(torch_export, "gpus", lambda: 0)
    given = ["export", "--model_path", str(folder), "--format", "torch", "--output_path", str(tmp_path / "other")]
    assert main([*given, "--device", "gpu"]) == 2
    assert "--device cuda: there is no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main(["infer", "--model_dir", str(tmp_path), "--device", "gpu"]) == 2
    assert "is made for a GPU, and there is none here" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "llama")]) == 0
    assert "is made for a GPU, and there is none here" in capsys.readouterr().out
