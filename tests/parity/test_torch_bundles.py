"""Bundles of exported programs against transformers."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arriero import onednn
from arriero.errors import ConfigError, FormatError
from arriero.export import aoti_export, torch_graph, torch_program
from arriero.export.aoti_export import export_aoti
from arriero.export.bundle import MANIFEST, open_bundle
from arriero.export.kinds import open_runner
from arriero.export.self_check import Step
from arriero.export.slot_runner import MAX_TOKENS, SlotRunner
from arriero.export.torch_export import TorchOptions, export_torch
from arriero.export.torch_graph import OPERATORS, TorchGraph
from arriero.export.torch_session import TorchSession
from arriero.export.torch_trace import trace_decode, trace_step
from arriero.export.torch_weights import MatrixForm, program_weights
from arriero.export.weight_source import WeightSource
from arriero.formats.hf_source import open_hf

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from bundle_families import FAMILIES as SHARED
from bundle_families import YARN
from program_runs import CONTEXT, expected, flat, live, saved, sequence
from twin_models import VOCAB

SOURCE = Path(__file__).parents[2] / "src"
FAMILIES: dict[str, dict[str, Any]] = SHARED | {"qwen3": {"model_type": "qwen3", "head_dim": 24}}
YARN_TIED = {"rope_scaling": YARN, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}


def assert_right(given: Any, theirs: Any, seed: int, lengths: Sequence[int] = (40, 3, 90, 17, 60, 1, 33)) -> None:
    sequences = [sequence(seed + number, length) for number, length in enumerate(lengths)]
    for ids, logits in zip(sequences, live(given, sequences, seed), strict=True):
        torch.testing.assert_close(logits, expected(theirs, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder, theirs = saved(tmp_path / "hf", **FAMILIES[family])
    bundle = export_torch(folder, tmp_path / "torch")
    assert_right(open_runner(bundle, slots=4), theirs, seed=1)


def test_logits_by_onednn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever processor this runs."""
    monkeypatch.setattr(torch_graph, "onednn_is_faster", onednn.has_onednn)
    folder, theirs = saved(tmp_path / "hf", **YARN_TIED)
    assert_right(open_runner(export_torch(folder, tmp_path / "torch"), slots=4), theirs, seed=1)


@pytest.mark.parametrize("changes", [YARN_TIED, FAMILIES["mistral"], FAMILIES["qwen3"]])
def test_logits_of_programs_for_a_compiler(tmp_path: Path, changes: dict[str, Any]) -> None:
    """As they are traced; whether they survive being compiled is tested once, below."""
    folder, theirs = saved(tmp_path / "hf", **changes)
    with open_hf(folder) as source:
        weights = program_weights(WeightSource(source), MatrixForm())
        config, own = source.config, [value.load() for value in weights.values()]
        programs = {3: flat(trace_decode(config, CONTEXT, weights, 3))}
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        step = flat(trace_step(config, CONTEXT, weights))
        session = TorchSession(step, programs, own, shape, CONTEXT, VOCAB, rows=5)
        assert_right(SlotRunner(session), theirs, seed=2)


def test_operators_are_those_that_programs_need(tmp_path: Path) -> None:
    used = set()
    for family, kind in (("mistral", torch.float32), ("qwen3", torch.bfloat16)):
        folder, _ = saved(tmp_path / family, **FAMILIES[family])
        with open_hf(folder) as source:
            traced = trace_step(source.config, CONTEXT, program_weights(WeightSource(source), MatrixForm(kind)))
        used |= {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert {name.removeprefix("aten.") for name in used if name.startswith("aten.")} == OPERATORS


def test_a_long_prompt_few_logits_and_a_second_life(tmp_path: Path) -> None:
    length = 2 * MAX_TOKENS + 30
    folder, theirs = saved(tmp_path / "hf", max_position_embeddings=length)
    given = open_runner(export_torch(folder, tmp_path / "torch"), slots=2)
    ids = sequence(3, length)
    wanted = expected(theirs, ids)
    assert given.run([Step(ids[:10], 0, [0], 0)]).shape == (0, VOCAB)
    logits = given.run([Step(ids, 0, [1], 40), Step(ids[10:11], 10, [0], 1)])
    torch.testing.assert_close(logits, np.concatenate((wanted[-40:], wanted[10:11])), rtol=0, atol=1e-4)
    for seed in (1, 2):
        assert_right(given, theirs, seed)


@pytest.mark.parametrize("weights", ["fp16", "bf16"])
def test_half_of_the_bytes(tmp_path: Path, weights: str) -> None:
    folder, theirs = saved(tmp_path / "hf", tie_word_embeddings=True)
    bundle = export_torch(folder, tmp_path / "torch", TorchOptions(weights))
    matrices = sum(value.numel() for value in theirs.parameters() if value.dim() == 2)
    assert (bundle.folder / "weights.safetensors").stat().st_size == pytest.approx(2 * matrices, rel=0.1)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[weights]
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.to(kind))
    assert_right(open_runner(bundle, slots=4), theirs, seed=1)


def test_a_prefix_comes_before_every_sequence(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "hf")
    config, length = theirs.config, 5
    shape = (
        config.num_hidden_layers,
        2,
        config.num_key_value_heads,
        length,
        config.hidden_size // config.num_attention_heads,
    )
    prefix = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    bundle = export_torch(folder, tmp_path / "torch", prefix=prefix)
    given = open_runner(bundle, slots=2)
    assert (given.prefix_length, given.context) == (length, CONTEXT - length)
    from transformers import DynamicCache

    for slot, ids in enumerate((sequence(0, 20), sequence(1, 7))):
        given.begin([slot], 0, length)
        logits = given.run([Step(ids, length, [slot], len(ids))])
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(torch.from_numpy(prefix).unbind(0)):
            cache.update(keys[None], values[None], layer)
        with torch.inference_mode():
            wanted = theirs(torch.tensor([ids]), past_key_values=cache).logits[0]
        torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=0, atol=1e-4)


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("onnx", "onnxruntime", "transformers") or name.startswith("arriero.models"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import json
from types import SimpleNamespace as Step
from arriero.export.bundle import open_bundle
from arriero.export.kinds import open_runner
runner = open_runner(open_bundle(sys.argv[1]), slots=2, threads=1)
tokens, done = json.loads(sys.argv[2]), 0
while len(tokens) < 9 + 40:
    logits = runner.run([Step(tokens=tokens[done:], start=done, blocks=[1], logits=1, salt=b"")])
    done = len(tokens)
    tokens.append(int(logits[0].argmax()))
print(json.dumps(tokens))
"""


def assert_runs_without_models(bundle: Path, theirs: Any) -> None:
    """40 greedy tokens, where neither our model's code nor transformers can be imported."""
    prompt = sequence(5, 9)
    told = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(bundle), json.dumps(prompt)],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    wanted = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert json.loads(told.stdout) == wanted[0].tolist()


def test_it_runs_where_the_models_cannot_be_imported(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "hf")
    assert_runs_without_models(export_torch(folder, tmp_path / "torch").folder, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.peers)])
def test_compiled_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Of one layer with oneDNN's products, of two with those of torch's BLAS, on whatever processor this runs."""
    monkeypatch.setattr(aoti_export, "onednn_is_faster", lambda: layers == 1 and onednn.has_onednn())
    changes = {"model_type": "mistral", "sliding_window": 30, "attention_bias": True, "num_hidden_layers": layers}
    folder, theirs = saved(tmp_path / "hf", **changes)
    bundle = export_aoti(folder, tmp_path / "aoti", decode_rows=(2,))
    assert bundle.manifest.isa.split()[0] in ("x86_64", "aarch64")
    for seed in range(2 * layers):
        assert_right(open_runner(bundle, slots=5), theirs, seed)
    if layers > 1:
        assert_runs_without_models(bundle.folder, theirs)
    assert not [name for name in zipfile.ZipFile(bundle.graph).namelist() if name.endswith((".cpp", ".h"))]

    def edited(**changes: Any) -> str:
        values = json.loads((bundle.folder / MANIFEST).read_text())
        (bundle.folder / MANIFEST).write_text(json.dumps(values | changes))
        with pytest.raises(FormatError) as told:
            open_bundle(bundle.folder)
        (bundle.folder / MANIFEST).write_text(json.dumps(values))
        return str(told.value)

    assert "it needs avx9000, which" in edited(isa=f"{bundle.manifest.isa} avx9000")
    assert "it needs a machine of the kind vax" in edited(isa="vax")
    major, minor = torch.__version__.split(".")[:2]
    older = f"{major}.{int(minor) - 1}.0"
    assert f"is made for torch {older}, and {torch.__version__} is installed" in edited(versions={"torch": older})
    assert "run on cpu or cuda" in edited(device="tpu")

    def unfit(**changes: Any) -> str:
        """What is said of programs that would read beyond their inputs, and so end the process."""
        with pytest.raises(FormatError) as told:
            open_runner(replace(bundle, manifest=replace(bundle.manifest, **changes)), slots=2)
        return str(told.value)

    assert "is compiled for a context of 96, and the manifest says 4096; export it again" in unfit(context=4096)
    assert "is compiled for a context of 96, and the manifest says 90" in unfit(context=90)
    heads = {"num_key_value_heads": 2 * bundle.manifest.config["num_key_value_heads"]}
    assert "is compiled for another model than the manifest" in unfit(config={**bundle.manifest.config, **heads})


@pytest.mark.slow
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    folder, _ = saved(tmp_path / "hf", num_hidden_layers=1)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    # torch hides a setting that is taken away, as monkeypatch does in the end
    with (
        config.patch({"cpp.cxx": ("/bin/true",)}),  # one that does nothing
        pytest.raises(FormatError, match="the program step cannot be compiled"),
    ):
        export_aoti(folder, tmp_path / "aoti")
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match="--format aoti needs a C\\+\\+ compiler, and there is none: install g\\+\\+"),
    ):
        export_aoti(folder, tmp_path / "aoti")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "temporary"]


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {},
            "rope type 'dynamic' cannot be exported to torch",
        ),
        ({}, {"context": 97}, "a context of 97 cannot be exported: from 2 to the model's 96 can"),
        ({}, {"context": 1}, "a context of 1 cannot be exported"),
        ({}, {"weights": "int4"}, "--format torch has no weights of the kind int4: --format onnx and aoti have"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], text: str) -> None:
    folder, _ = saved(tmp_path / "hf", **changes)
    with pytest.raises(ConfigError, match=text):
        export_torch(folder, tmp_path / "torch", TorchOptions(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_program_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved(tmp_path / "hf")
    right = torch_program.rope_frequencies
    monkeypatch.setattr(torch_program, "rope_frequencies", lambda config: (right(config)[0], 1.01))
    with pytest.raises(FormatError, match="torch bundle: its logits differ from the model's by"):
        export_torch(folder, tmp_path / "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


class Bomb:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def rewritten(path: Path, target: Path, change: Callable[[dict[str, Any]], None], **records: bytes) -> Path:
    """A copy of an archive with another program, and with other contents of the records whose names end so."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("models/model.json"):
                values = json.loads(content)
                change(values)
                content = json.dumps(values).encode()
            for end, other in records.items():
                content = other if entry.filename.endswith(end) else content
            new.writestr(entry.filename, content)
    return target


def test_nothing_in_a_program_is_run_but_operators(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "hf")
    bundle = export_torch(folder, tmp_path / "torch")
    mark = tmp_path / "mark"
    packed = io.BytesIO()
    torch.save((Bomb(mark),), packed)

    def evil(values: dict[str, Any]) -> None:
        values["guards_code"] = [f"__import__('pathlib').Path({str(mark)!r}).touch()"]

    same = rewritten(bundle.graph, tmp_path / "same.pt2", evil, pt=packed.getvalue())
    graph = TorchGraph(same)
    assert not mark.exists()
    assert graph.shapes == TorchGraph(bundle.graph).shapes
    with contextlib.suppress(Exception):  # whatever it makes of it
        torch.export.load(same)
    assert mark.exists()  # so that the bomb is one


def node_of(values: dict[str, Any], target: str) -> dict[str, Any]:
    nodes = values["graph_module"]["graph"]["nodes"]
    return next(node for node in nodes if node["target"] == f"torch.ops.aten.{target}")


def breakages() -> dict[str, tuple[Callable[[dict[str, Any]], None], str]]:
    def retarget(target: Any) -> Callable[[dict[str, Any]], None]:
        return lambda values: node_of(values, "silu.default").update(target=target)

    def argument(given: Any) -> Callable[[dict[str, Any]], None]:
        return lambda values: node_of(values, "silu.default")["inputs"][0].update(arg=given)

    def twice(values: dict[str, Any]) -> None:
        node_of(values, "silu.default")["outputs"] = [{"as_tensor": {"name": "tokens"}}]

    return {
        "system": (retarget("torch.os.system"), "uses 'torch.os.system', which no program of arriero does"),
        "file": (retarget("torch.ops.aten.from_file.default"), "uses 'torch.ops.aten.from_file.default'"),
        "operator": (retarget("_operator.call"), "uses '_operator.call'"),
        "extension": (retarget("#hop:x"), "uses '#hop:x'"),
        "number": (retarget(7), "its graph cannot be read"),
        "later": (argument({"as_tensor": {"name": "nowhere"}}), "its graph cannot be read"),
        "text": (argument({"as_string": "x"}), "has an argument 'as_string', which is not known"),
        "script": (argument({"as_custom_obj": {"name": "x", "class_fqn": "y"}}), "has an argument 'as_custom_obj'"),
        "several": (argument({"as_int": 1, "as_bool": True}), "its graph cannot be read"),
        "twice": (twice, "names 'tokens' twice"),
        "schema": (lambda values: values["schema_version"].update(major=9), "of exported programs, and 8 is known"),
        "no graph": (lambda values: values.update(graph_module=[]), "holds no graph"),
        "list": (lambda values: values["graph_module"]["graph"].update(nodes=7), "its graph cannot be read"),
    }


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    return export_torch(saved(folder / "hf")[0], folder / "torch").folder


@pytest.mark.parametrize("what", breakages())
def test_a_broken_program_is_refused(program: Path, tmp_path: Path, what: str) -> None:
    change, text = breakages()[what]
    with pytest.raises(FormatError, match=text):
        TorchGraph(rewritten(program / "model.pt2", tmp_path / "model.pt2", change))


def test_what_is_no_archive_is_refused(program: Path, tmp_path: Path) -> None:
    content = (program / "model.pt2").read_bytes()
    for number, other in enumerate((b"", b"PK", content[:-100], pickle.dumps(1))):
        path = tmp_path / f"{number}.pt2"
        path.write_bytes(other)
        with pytest.raises(FormatError, match="is no archive of an exported program"):
            TorchGraph(path)
    empty = tmp_path / "empty.pt2"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("x/models/other.json", b"{}")
    with pytest.raises(FormatError, match="holds 0 programs"):
        TorchGraph(empty)
    packed = tmp_path / "packed.pt2"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/models/model.json", b" " * 10**6)
    with pytest.raises(FormatError, match="too large or packed"):
        TorchGraph(packed)


def test_weights_of_another_model_are_refused(program: Path, tmp_path: Path) -> None:
    """Also with a manifest that says that all is well."""
    other = export_torch(saved(tmp_path / "hf", intermediate_size=80)[0], tmp_path / "torch")
    (other.folder / "model.pt2").write_bytes((program / "model.pt2").read_bytes())
    with pytest.raises(
        FormatError, match=r"input \d+ is torch.float32 \[64, 96\], and the model's is torch.float32 \[64, 80\]"
    ):
        open_runner(other, slots=1)


def test_more_memory_than_there_is(program: Path) -> None:
    with pytest.raises(FormatError, match=r"GB for keys and values of 10{17} sequences of 96 tokens cannot be had"):
        open_runner(open_bundle(program), slots=10**17)


def endless(values: dict[str, Any]) -> None:
    """Numbers that double their digits from node to node."""
    nodes = values["graph_module"]["graph"]["nodes"]
    place, first = next((i, node) for i, node in enumerate(nodes) if node["target"] == "_operator.mul")
    for number in range(60):
        last = {
            "arg": {
                "as_sym_int": {
                    "as_name": f"big_{number - 1}" if number else first["outputs"][0]["as_sym_int"]["as_name"]
                }
            }
        }
        inputs = [{"name": name, "kind": 1, **last} for name in ("a", "b")]
        output = {"as_sym_int": {"as_name": f"big_{number}"}}
        nodes.insert(place + 1 + number, {**first, "inputs": inputs, "outputs": [output]})


def misshapen(values: dict[str, Any]) -> None:
    node_of(values, "view.default")["inputs"][1]["arg"] = {"as_ints": [7, 7, 7]}


@pytest.mark.parametrize(("change", "text"), [(endless, "a size of"), (misshapen, "is invalid for input of size")])
def test_a_program_that_cannot_be_computed(program: Path, tmp_path: Path, change: Any, text: str) -> None:
    shutil.copytree(program, tmp_path / "other")
    rewritten(program / "model.pt2", tmp_path / "other" / "model.pt2", change)
    given = open_runner(replace(open_bundle(program), folder=tmp_path / "other"), slots=1)
    with pytest.raises(FormatError, match=f"its program cannot be computed .*{text}"):
        given.run([Step([1, 2, 3], 0, [0], 1)])


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"num_hidden_layers": 10**12}, r"takes \d+ inputs, and the model has \d+"),
        ({"vocab_size": 299}, f"tells of 299 tokens, and its weights are of {VOCAB}"),
    ],
)
def test_a_manifest_of_another_model(program: Path, config: dict[str, int], text: str) -> None:
    bundle = open_bundle(program)
    other = replace(bundle.manifest, config={**bundle.manifest.config, **config})
    with pytest.raises(FormatError, match=text):
        open_runner(replace(bundle, manifest=other), slots=1)
