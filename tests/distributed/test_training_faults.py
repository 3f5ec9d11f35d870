"""Faults of a training run on several processes, through the real `arriero launch`: one line, no hang, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from forked import Launcher, run_command

from arriero.cli import main
from arriero.data.tokenizer import load_tokenizer
from arriero.formats.download import resolve_model

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[2] / "src"
TINY = "__internal_testing__/tiny-random-llama"
ROWS = [{"src": f"Count from {i}.", "tgt": f"{i} {i + 1} {i + 2}"} for i in range(24)]
STEPS = 6
Launch = Callable[..., Launcher]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and a model whose vocabulary of 2,049 no number of processes divides."""
    folder = tmp_path_factory.mktemp("work")
    for name, rows in (("data", ROWS), ("fewer", ROWS[:20]), ("one", ROWS[:1])):
        (folder / name).mkdir()
        for split in ("train.json", "dev.json"):
            (folder / name / split).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = folder / "model"
    shutil.copytree(resolve_model(TINY, folder / "home"), model)
    config = json.loads((model / "config.json").read_text())
    assert load_tokenizer(model).vocab_size == config["vocab_size"] == 2048
    weights = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:1]])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 2049}))
    return folder


def training(output: str, *more: str, data: str = "data") -> list[str]:
    return [
        *("finetune", "--model_name_or_path", "model", "--dataset_path", data, "--output_dir", output),
        *("--max_steps", str(STEPS), "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--learning_rate", "1e-3", "--src_length", "64", "--tgt_length", "32", "--save_steps", "2"),
        *("--logging_steps", "1", "--disable_tqdm", "--report_to", "none", *more),
    ]


@pytest.fixture
def launch(work: Path) -> Iterator[Launch]:
    """`launch("--nproc_per_node", "2", "finetune", ...)` in `work`; whatever is left of it at the end is killed."""
    launchers: list[Launcher] = []

    def call(*arguments: str, cwd: Path = work) -> Launcher:
        variables = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "ARRIERO_TIMEOUT": "30"}
        launcher = Launcher("arriero", "launch", *arguments, cwd=cwd, env=variables)
        launchers.append(launcher)
        return launcher

    yield call
    for launcher in launchers:
        if launcher.poll() is None:
            for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                process.kill()
            launcher.communicate()


def end(launcher: Launcher) -> tuple[int, str, list[str]]:
    """Its exit code, its output, and the error's lines (without warnings)."""
    out, err = launcher.communicate(timeout=100)
    return launcher.returncode, out, [line for line in err.splitlines() if "warning" not in line]


def alone(work: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The same command in this one process."""
    monkeypatch.chdir(work)
    return main(list(arguments))


def losses(folder: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step in the log."""
    records = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]


def same_files(one: Path, other: Path) -> None:
    """Every weight and optimizer tensor, to the bit."""
    parts = [path.relative_to(other) for path in other.rglob("*.safetensors")]
    assert len(parts) >= 2
    for part in parts:
        first, second = load_file(one / part), load_file(other / part)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"{part}: {name}"


def worker(launcher: Launcher, rank: int) -> psutil.Process:
    """The launched process of a rank."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in psutil.Process(launcher.pid).children(recursive=True):
            try:
                if process.environ().get("RANK") == str(rank) and "finetune" in process.cmdline():
                    return process
            except psutil.Error:
                continue
        time.sleep(0.02)
    pytest.fail(f"rank {rank} does not appear")


def kill_in_step(launcher: Launcher, rank: int, step: int) -> None:
    """SIGKILL a rank after the line of a step has been printed: it is at work on the next."""
    process = worker(launcher, rank)
    for line in launcher.stdout:
        if line.startswith("step ") and int(line.split("/")[0].split()[-1]) == step:
            process.kill()
            return
    pytest.fail(f"step {step} does not come")


def kill_in_save(launcher: Launcher, rank: int, folder: Path, step: int) -> None:
    """SIGKILL a rank while the checkpoint of a step is half written."""
    process = worker(launcher, rank)
    partial = folder / f".checkpoint-{step}.partial"
    deadline = time.monotonic() + 60
    while not partial.exists():
        assert time.monotonic() < deadline
        assert launcher.poll() is None
    process.send_signal(signal.SIGSTOP)  # it cannot end the save any more, even if the next line is late
    process.kill()


TENSOR = ("--tensor_parallel_degree", "2")


@pytest.fixture(scope="module")
def whole(work: Path) -> Path:
    """The uninterrupted run on two processes that share out matrices."""
    return uninterrupted(work, "whole", *TENSOR)


def uninterrupted(work: Path, output: str, *options: str) -> Path:
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "ARRIERO_TIMEOUT": "30"}
    command = ["launch", "--nproc_per_node", "2", *training(output, *options)]
    done = run_command(*command, cwd=work, env=variables, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / output


def test_a_vocabulary_that_the_processes_do_not_divide_trains_as_in_one(
    whole: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert alone(work, monkeypatch, *training("alone")) == 0
    assert len(losses(whole)) == STEPS
    for one, other in zip(losses(whole), losses(work / "alone"), strict=True):
        assert one == pytest.approx(other, rel=1e-5), "loss and gradient norm"
    assert load_file(whole / "model.safetensors")["lm_head.weight"].shape == (2049, 64)


def test_killed_in_a_save_it_ends_as_the_uninterrupted_run(whole: Path, work: Path, launch: Launch) -> None:
    torn = work / "torn"
    command = training(torn.name, *TENSOR, "--resume_from_checkpoint", "auto")
    die_in_save(whole, torn, launch, command)
    end_as(whole, torn, launch, command)


@pytest.mark.peers
@pytest.mark.parametrize(
    "options",
    [TENSOR, ("--pipeline_parallel_degree", "2"), ("--sharding", "stage3")],
    ids=["tp2", "pp2", "stage3"],
)
def test_killed_in_a_step_then_in_a_save(options: tuple[str, ...], work: Path, launch: Launch) -> None:
    name = "-".join(options).replace("--", "")
    kill_twice(uninterrupted(work, f"whole-{name}", *options), work / f"torn-{name}", launch, *options)


def kill_twice(whole: Path, torn: Path, launch: Launch, *options: str) -> None:
    """In a step, then in a save; the third sitting ends as the uninterrupted run did."""
    command = training(torn.name, *options, "--resume_from_checkpoint", "auto")
    launcher = launch("--nproc_per_node", "2", *command)
    kill_in_step(launcher, 1, 3)
    code, _, err = end(launcher)
    assert (code, err) == (137, ["arriero [rank 1]: killed by SIGKILL (out of memory?)"])
    assert [path.name for path in torn.glob("checkpoint-*")] == ["checkpoint-2"]
    same_files(torn / "checkpoint-2", whole / "checkpoint-2")

    out = die_in_save(whole, torn, launch, command)
    assert "at step 2" in out
    end_as(whole, torn, launch, command)


def die_in_save(whole: Path, torn: Path, launch: Launch, command: list[str]) -> str:
    """What was printed until then."""
    launcher = launch("--nproc_per_node", "2", *command)
    kill_in_save(launcher, 0, torn, 4)
    code, out, err = end(launcher)
    assert (code, err) == (137, ["arriero [rank 0]: killed by SIGKILL (out of memory?)"])
    assert (torn / ".checkpoint-4.partial").exists()
    assert [path.name for path in torn.glob("checkpoint-*")] == ["checkpoint-2"]
    same_files(torn / "checkpoint-2", whole / "checkpoint-2")
    return out


def end_as(whole: Path, torn: Path, launch: Launch, command: list[str]) -> None:
    code, out, err = end(launch("--nproc_per_node", "2", *command))
    assert (code, err) == (0, [])
    assert "at step 2" in out
    same_files(torn, whole)
    assert losses(torn) == losses(whole)
    assert {path.name for path in torn.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_signal_before_the_first_step_ends_all_in_one_line(work: Path, launch: Launch) -> None:
    """While they load; nothing is left of the run."""
    launcher = launch("--nproc_per_node", "2", *training("early"))
    deadline = time.monotonic() + 60
    lock = work / "early" / ".lock"
    while not (lock.exists() and lock.read_text()) and time.monotonic() < deadline:
        time.sleep(0.005)
    launcher.send_signal(signal.SIGTERM)
    code, _, err = end(launcher)
    assert (code, err) == (0, ["arriero: SIGTERM: ended before the first step: nothing to save"])
    assert not (work / "early").exists()


def test_a_checkpoint_that_lacks_a_file_is_refused_by_name(whole: Path, work: Path, launch: Launch) -> None:
    broken = work / "broken"
    shutil.copytree(whole / "checkpoint-4", broken)
    optimizer = next(path for path in broken.rglob("*.safetensors") if path.name != "model.safetensors")
    optimizer.unlink()
    options = ("--tensor_parallel_degree", "2", "--resume_from_checkpoint", "broken")
    code, _, err = end(launch("--nproc_per_node", "2", *training("on", *options)))
    assert (code, len(err)) == (2, 1)
    assert err[0].startswith("arriero [rank ")
    assert optimizer.name in err[0]


def two_machines(launch: Launch, commands: list[list[str]], folders: list[Path]) -> tuple[int, list[str]]:
    """Two launchers play two machines, each in a folder of its own; the end of the second."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    place = ("--nnodes", "2", "--master", f"127.0.0.1:{port}", "--nproc_per_node", "1")
    launchers = [
        launch(*place, "--node_rank", str(number), *command, cwd=folder)
        for number, (command, folder) in enumerate(zip(commands, folders, strict=True))
    ]
    first, second = (end(launcher) for launcher in launchers)
    assert first[0] == 2
    assert first[2][-1].startswith("arriero [rank 0]: ")
    return second[0], second[2]


def test_other_options_on_one_rank(work: Path, launch: Launch) -> None:
    commands = [training("options"), training("options", "--learning_rate", "1e-4")]
    code, err = two_machines(launch, commands, [work, work])
    assert code == 2
    assert err[-1] == (
        "arriero [rank 1]: rank 1 was started with --learning_rate 0.0001 and rank 0 with 0.001: "
        "give all processes the same options"
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("fewer", "rank 1 has other train data (20 rows, SHA-256 "),
        pytest.param(None, "--dataset_path data: no such file or folder", marks=pytest.mark.peers),
    ],
    ids=["other rows", "no file"],
)
def test_data_that_one_rank_does_not_have(
    content: str | None, line: str, work: Path, tmp_path: Path, launch: Launch
) -> None:
    """The second machine's folder has other data under the same name."""
    (tmp_path / "model").symlink_to(work / "model")
    if content is not None:
        (tmp_path / "data").symlink_to(work / content)
    command = training(str(work / f"data-{content}"))
    code, err = two_machines(launch, [command, command], [work, tmp_path])
    assert code == 2
    assert err[-1].startswith(f"arriero [rank 1]: {line}")


@pytest.mark.peers  # tests/unit/test_run_facts.py has what is compared
def test_weights_that_one_rank_does_not_have(work: Path, tmp_path: Path, launch: Launch) -> None:
    """The second machine's folder has another model under the same name."""
    shutil.copytree(work / "model", tmp_path / "model")
    (tmp_path / "data").symlink_to(work / "data")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    command = training(str(work / "weights"))
    code, err = two_machines(launch, [command, command], [work, tmp_path])
    assert code == 2
    assert err[-1].startswith("arriero [rank 1]: rank 1 has another model.safetensors of the model (")


@pytest.mark.peers  # tests/unit/test_run_folder.py has the look
def test_a_run_folder_that_one_rank_does_not_see(work: Path, tmp_path: Path, launch: Launch) -> None:
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(work / name)
    command = training("unshared")
    code, err = two_machines(launch, [command, command], [work, tmp_path])
    assert code == 2
    assert err[-1] == (
        "arriero [rank 1]: --output_dir unshared on the machine of rank 1 is not the folder that rank 0 has there: "
        "name one that all machines share"
    )


def test_more_ranks_than_rows(work: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--max_steps", "2", "--do_eval", "--sharding", "stage3")
    code, _, err = end(launch("--nproc_per_node", "2", *training("few", *options, data="one")))
    assert (code, err) == (0, [])
    assert alone(work, monkeypatch, *training("few-alone", "--max_steps", "2", "--do_eval", data="one")) == 0
    found, wanted = (json.loads((work / name / "all_results.json").read_text()) for name in ("few", "few-alone"))
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)
    assert found["train_tokens"] == wanted["train_tokens"]
    for one, other in zip(losses(work / "few"), losses(work / "few-alone"), strict=True):
        assert one == pytest.approx(other, rel=1e-5), "loss and gradient norm"


@pytest.mark.parametrize(
    ("processes", "degree", "line"),
    [
        ("3", "--tensor_parallel_degree", "does not share out 4 heads with 2 key-value heads"),
        pytest.param(
            *("3", "--pipeline_parallel_degree", "the model's 2 layers do not fill 3 pipeline stages"),
            marks=pytest.mark.peers,
        ),
    ],
    ids=["heads", "layers"],
)
def test_a_layout_that_the_model_does_not_have(processes: str, degree: str, line: str, launch: Launch) -> None:
    code, _, err = end(launch("--nproc_per_node", processes, *training("shape", degree, processes)))
    assert (code, len(err)) == (2, 1)
    assert err[0].startswith("arriero [rank ")
    assert line in err[0]


@pytest.mark.parametrize(
    ("processes", "options", "parts"),
    [
        ("3", ("--tensor_parallel_degree", "2"), ("--tensor_parallel_degree 2", "has 3", "start 4")),
        ("2", ("--tensor_parallel_degree", "2", "--pipeline_parallel_degree", "2"), ("multiple of 4", "has 2")),
        ("4", ("--sharding", "stage2", "--sharding_parallel_degree", "3"), ("--sharding_parallel_degree 3", "has 4")),
    ],
)
def test_a_number_of_processes_that_does_not_fit_is_refused_before_any_starts(
    processes: str, options: tuple[str, ...], parts: tuple[str, ...], capsys: Any
) -> None:
    assert main(["launch", "--nproc_per_node", processes, *training("misfit", *options)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert line.startswith("arriero: ")
    for part in parts:
        assert part in line
