"""The installation that only runs bundles, made as docs/export.md says: it has no torch, and answers the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
from byte_models import save_byte_model  # noqa: E402

Call = Callable[..., subprocess.CompletedProcess[str]]
MOST_MEGABYTES = 250


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment's folder of programs."""
    home = tmp_path_factory.mktemp("slim")
    source = home / "source"  # a build leaves files behind
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "venv", str(home / "venv")], check=True)
    install = [str(home / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
    pins = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*install, *pins, str(source), "-r", str(ROOT / "requirements-infer.txt")], check=True)
    return home / "venv" / "bin"


def run(slim: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        [str(slim / "arriero"), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.peers
@pytest.mark.timeout(600)
def test_it_runs_bundles_and_says_what_it_lacks(slim: Path, in_process: Call, tmp_path: Path) -> None:
    found = subprocess.run([str(slim / "python"), "-c", "import torch"], capture_output=True, check=False)
    assert found.returncode == 1
    packages = slim.parent / "lib"
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
    assert size < MOST_MEGABYTES * 1e6
    folder, _ = save_byte_model(tmp_path / "hf", max_position_embeddings=640)
    assert in_process("export", "--model_path", str(folder), "--output_path", "inference/llama").returncode == 0
    for arguments in (
        ["infer", "--model_dir", "inference", "--predict_file", "answers.json"],
        ["chat", "--model_name_or_path", "inference/llama", "--prompt", "hi"],
    ):
        told = run(slim, *arguments, cwd=tmp_path)
        assert told.returncode == 0, told.stderr
        answers = tmp_path / "answers.json"
        slim_says = answers.read_bytes() if arguments[0] == "infer" else told.stdout.split()
        full = in_process(*arguments)
        assert slim_says == (answers.read_bytes() if arguments[0] == "infer" else full.stdout.split())
    lacking = run(slim, "predict", "--model_name_or_path", str(folder), cwd=tmp_path)
    assert lacking.returncode == 2
    assert "is not installed here" in lacking.stderr
    assert len(lacking.stderr.splitlines()) == 1
