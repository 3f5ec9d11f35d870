"""Whatever the configurations beside a model or an adapter hold, `inspect` tells of it or refuses it with one line."""

from __future__ import annotations

import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from arriero.commands.inspect import InspectOptions, run  # noqa: E402
from arriero.errors import ArrieroError  # noqa: E402
from arriero.formats.peft import save_adapter  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from format_files import CONFIG, LORA, TOKENIZER, _lora_state, state  # noqa: E402

FEW, MANY = 150, 2000  # of each file
STATE = {"step": 20, "total_steps": 100, "tokens": 12345, "seconds": 1.5, "best_metric": 0.5}
GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "group_size": None, "strategy": "channel", "symmetric": True},
    "input_activations": None,
}
QUANTIZATION = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": GROUP}}
SETTINGS = {**LORA.to_dict(), "base_model_name_or_path": "some/base"}
# The mutated file -> its honest content; all but the adapter's lie beside a model.
HONEST: dict[str, Any] = {
    "trainer_state.json": STATE,
    "adapter_config.json": SETTINGS,
    "tokenizer.json": TOKENIZER,
    "config.json": {**CONFIG.to_dict(), "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "quantization": {**CONFIG.to_dict(), "quantization_config": QUANTIZATION},
}
VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, "", "x", "\ud800", "\x9b2J", "a" * 3000, [], {}, [1], ["x"], {"a": 1}, [[]] * 9]
    ),
    st.sampled_from([0, -1, 3, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, 1e308, float("inf"), float("nan")]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    ),
)


@cache
def weights(name: str) -> dict[str, bytes]:
    """The file of weights that stands beside."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer)
        if name == "adapter_config.json":
            save_adapter(folder, _lora_state(), LORA)
        else:
            values = state()
            if name == "quantization":
                for layer in (name.removesuffix(".weight") for name in list(values) if "_proj" in name):
                    rows = values[f"{layer}.weight"].shape[0]
                    values[f"{layer}.weight"] = values[f"{layer}.weight"].to(torch.int8)
                    values[f"{layer}.weight_scale"] = torch.ones(rows, 1)
            save_file(values, folder / "model.safetensors")
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def slots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree of JSON."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [slot for key in keys for slot in slots(value[key])]


def mutated(draw: st.DrawFn, content: Any) -> bytes:
    tree = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        found = slots(tree)
        if not found:
            break
        holder, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["value", "value", "value", "delete", "rename", "whole"])):
            case "value":
                holder[key] = json.loads(json.dumps(draw(VALUES)))
            case "delete":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = holder.pop(key)
            case "whole":
                tree = json.loads(json.dumps(draw(VALUES)))
    return json.dumps(tree).encode()


def look(name: str, content: bytes) -> bool:
    """Whether `inspect` told of a folder with this content of a file."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "folder"
        folder.mkdir()
        files = dict(weights(name))
        if name != "adapter_config.json":
            named = {key: HONEST[key] for key in ("trainer_state.json", "tokenizer.json", "config.json")}
            files |= {key: json.dumps(value).encode() for key, value in named.items()} | {"manifest.json": b"{}"}
        files["config.json" if name == "quantization" else name] = content
        for file, data in files.items():
            (folder / file).write_bytes(data)
        for as_json in (False, True):
            try:
                run(InspectOptions(path=str(folder), json=as_json))
            except ArrieroError as error:
                assert str(error)  # noqa: PT017
                return False
    return True


@pytest.mark.parametrize("name", HONEST)
def test_the_files_themselves_are_told_of(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(name, json.dumps(HONEST[name]).encode())
    assert "do not fit" not in capsys.readouterr().out


def fuzz(name: str, examples: int, capsys: pytest.CaptureFixture[str]) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def each(data: st.DataObject) -> None:
        content = mutated(data.draw, HONEST[name])
        capsys.readouterr()
        told = look(name, content)
        out = capsys.readouterr().out
        assert told or not out, "something was printed before the refusal"
        assert all(c.isprintable() or c == "\n" for c in out)

    each()


@pytest.mark.parametrize("name", HONEST)
def test_changed_configurations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz(name, FEW, capsys)


@pytest.mark.peers
@pytest.mark.parametrize("name", HONEST)
def test_changed_configurations_at_length(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz(name, MANY, capsys)
