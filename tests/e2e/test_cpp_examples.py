"""The C++ examples: built, and run on a bundle each, against transformers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from twin_models import VOCAB, their_model

EXAMPLES = Path(__file__).parents[2] / "examples" / "cpp"
PROMPT, NEW_TOKENS = [1, 5, 9, 2, 33, 4], 40
# The folder of onnxruntime_c_api.h, which the Python package does not have.
HEADERS = os.environ.get("ONNXRUNTIME_INCLUDE")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++"),
]


def built(folder: Path, name: str, *options: str) -> Path:
    """A program of the examples."""
    for command in (["cmake", "-S", str(EXAMPLES), "-B", str(folder), *options], ["cmake", "--build", str(folder)]):
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stdout + told.stderr
    return folder / name


def model(folder: Path) -> Any:
    theirs = their_model(hidden_size=64, intermediate_size=96, max_position_embeddings=96)
    theirs.save_pretrained(folder)  # type: ignore[operator]
    return theirs


def assert_same_tokens(program: Path, bundle: Path, theirs: Any, **variables: str) -> None:
    command = [str(program), str(bundle), str(NEW_TOKENS), *map(str, PROMPT)]
    told = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1", **variables}
    )
    assert told.returncode == 0, told.stderr
    wanted = theirs.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert [int(word) for word in told.stdout.split()] == wanted[0].tolist()
    assert "tokens/s" in told.stderr
    for given, words in (
        (["1000", "1"], "too many tokens for the context, 96"),
        (["2", "99999"], f"TOKEN 99999: a whole number from 0 to {VOCAB - 1} is expected"),
        (["2", "-1"], "TOKEN -1: a whole number from 0"),
        (["2", "x"], "TOKEN x: a whole number from 0"),
        (["2.5", "1"], "COUNT 2.5: a whole number from 0"),
    ):
        refused = subprocess.run([*command[:2], *given], capture_output=True, text=True, check=False, env=variables)
        assert refused.returncode == 2
        assert refused.stderr == f"{program.name}: {words}{refused.stderr.partition(words)[2]}"
        assert refused.stderr.count("\n") == 1


def test_aoti_generate(tmp_path: Path) -> None:
    from arriero.export.aoti_export import export_aoti
    from arriero.export.torch_export import TorchOptions

    theirs = model(tmp_path / "hf")
    bundle = export_aoti(tmp_path / "hf", tmp_path / "bundle", decode_rows=(1,))
    program = built(tmp_path / "build", "aoti_generate", f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    assert_same_tokens(program, bundle.folder, theirs)
    manifest = bundle.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"context": 96', '"context": 95'))
    command = [str(program), str(bundle.folder), "2", "1"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    assert refused.returncode == 2
    assert "is not compiled for the context of the manifest, 95" in refused.stderr
    assert_tokens_of_python(program, export_aoti(tmp_path / "hf", tmp_path / "int4", TorchOptions("int4")))


def assert_tokens_of_python(program: Path, bundle: Any) -> None:
    """Of a bundle whose rounding no other program has: those that its runner gives."""
    from arriero.export.kinds import open_runner
    from arriero.export.self_check import Step

    command = [str(program), str(bundle.folder), str(NEW_TOKENS), *map(str, PROMPT)]
    told = subprocess.run(command, capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1"})
    assert told.returncode == 0, told.stderr
    runner, tokens, done = open_runner(bundle, slots=1, threads=1), [*PROMPT], 0
    while len(tokens) < len(PROMPT) + NEW_TOKENS:
        logits = runner.run([Step(tokens[done:], done, [0], 1)])
        done = len(tokens)
        tokens.append(int(logits[0].argmax()))
    assert [int(word) for word in told.stdout.split()] == tokens


@pytest.mark.skipif(HEADERS is None, reason="needs $ONNXRUNTIME_INCLUDE, the folder of onnxruntime_c_api.h")
def test_onnx_generate(tmp_path: Path) -> None:
    import onnxruntime

    from arriero.export.onnx_export import export_onnx

    theirs = model(tmp_path / "hf")
    bundle = export_onnx(tmp_path / "hf", tmp_path / "bundle")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    program = built(
        tmp_path / "build",
        "onnx_generate",
        "-DWITH_TORCH=OFF",
        f"-DONNXRUNTIME_INCLUDE={HEADERS}",
        f"-DONNXRUNTIME_LIBRARY={tmp_path / 'libonnxruntime.so.1'}",
    )
    assert_same_tokens(program, bundle.folder, theirs, LD_LIBRARY_PATH=str(tmp_path))
