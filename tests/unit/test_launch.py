"""`arriero launch`: the line it starts, its environment, its logs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.commands.launch import LaunchOptions, command_line, environment
from arriero.config.parser import parse
from arriero.errors import ConfigError

Run = Callable[..., subprocess.CompletedProcess[str]]


def launch(*argv: str) -> LaunchOptions:
    (options,) = parse((LaunchOptions,), argv, "arriero launch")
    assert isinstance(options, LaunchOptions)
    return options


def test_everything_behind_the_verb_is_passed_on() -> None:
    options = launch("--gpus", "0,1", "--log_dir", "logs", "serve", "--gpus", "7", "--config", "a.yaml", "-h")
    assert options.command == ["serve", "--gpus", "7", "--config", "a.yaml", "-h"]
    assert (options.gpus, options.log_dir, options.processes) == ("0,1", "logs", 2)


def test_one_process_needs_no_torchrun() -> None:
    for argv in (
        ["serve", "--port", "1"],
        ["--gpus", "3", "serve", "--port", "1"],
        ["--nnodes", "1", "serve", "--port", "1"],
    ):
        assert command_line(launch(*argv)) == [sys.executable, "-m", "arriero", "serve", "--port", "1"]


def test_several_processes_are_torchrun_s() -> None:
    assert command_line(launch("--gpus", "0, 1", "--log_dir", "logs", "serve")) == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "--log-dir=logs",
        "--redirects=3",
        "--tee=0:3",
        "-m",
        "arriero",
        "serve",
    ]


def test_several_machines() -> None:
    line = command_line(
        launch("--nnodes", "2", "--node_rank", "1", "--master", "10.0.0.1:29500", "--gpus", "0", "serve")
    )
    assert line[3:-3] == [
        "--nproc_per_node=1",
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=10.0.0.1",
        "--master_port=29500",
    ]
    line = command_line(
        launch(
            "--nnodes",
            "1:4",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "h:1",
            "--rdzv_id",
            "j",
            "--max_restarts",
            "3",
            "serve",
        )
    )
    assert line[3:-3] == [
        "--nproc_per_node=1",
        "--nnodes=1:4",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=h:1",
        "--rdzv_id=j",
        "--max_restarts=3",
    ]


def test_torchrun_knows_these_options() -> None:
    from torch.distributed.run import get_args_parser

    options = launch(
        "--nnodes", "2", "--node_rank", "1", "--master", "10.0.0.1:29500", "--gpus", "0,1", "--log_dir", "logs",
        "--rdzv_backend", "static", "--rdzv_id", "j", "--max_restarts", "0", "serve",
    )  # fmt: skip
    known = get_args_parser().parse_args(command_line(options)[3:])
    assert (known.nproc_per_node, known.nnodes, known.node_rank, known.log_dir) == ("2", "2", 1, "logs")
    assert (known.module, known.training_script, known.training_script_args) == (True, "arriero", ["serve"])


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment(launch("serve"))["CUDA_VISIBLE_DEVICES"] == "5"
    assert "OMP_NUM_THREADS" not in environment(launch("serve"))
    variables = environment(launch("--gpus", "0,2", "serve"))
    assert variables["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert int(variables["OMP_NUM_THREADS"]) >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment(launch("--gpus", "0,2", "serve"))["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--gpus", "0,0", "serve"), "--gpus"),
        (("--gpus", "0,,1", "serve"), "--gpus"),
        (("--gpus", "0,1", "--nproc_per_node", "3", "serve"), "--nproc_per_node"),
        (("--master", "host", "serve"), "--master"),
        (("--master", "h:1", "--master_port", "2", "serve"), "--master_addr/--master_port"),
        (("--nproc_per_node", "0", "serve"), "--nproc_per_node"),
        (("--gpu", "0", "serve"), "did you mean --gpus?"),
        ((), "COMMAND must be given"),
    ],
)
def test_slips(argv: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        launch(*argv)
    assert named in str(error.value)


def test_a_slip_in_the_launched_command_is_told_once(arriero: Run) -> None:
    for arguments, message in [
        (("--gpus", "0,1", "serve", "--prt", "1"), "unknown option --prt: did you mean --port?"),
        (("--gpus", "0,1", "serv"), "unknown command 'serv' after launch"),
        (("launch", "serve"), "launch cannot start itself"),
        (("--gpus", "0,1", "predict"), "predict runs in one process in this version and --gpus 0,1 asks for several"),
        (("--nnodes", "2", "predict"), "predict runs in one process"),
    ]:
        result = arriero("launch", *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr


def test_help_of_the_launched_command(arriero: Run) -> None:
    assert arriero("launch", "--gpus", "0,1", "serve", "--help").stdout == arriero("serve", "--help").stdout


def test_one_process_with_a_log(arriero: Run, tmp_path: Path) -> None:
    result = arriero("launch", "--gpus", "0", "--log_dir", "logs", "completion", "fish")
    assert result.returncode == 0
    assert (tmp_path / "logs" / "workerlog.0").read_text(encoding="utf-8") == result.stdout
    assert result.stdout.startswith("# fish completion of arriero")


@pytest.mark.slow
def test_two_processes_with_logs(arriero: Run, tmp_path: Path) -> None:
    result = arriero("launch", "--nproc_per_node", "2", "--log_dir", "logs", "completion", "fish")
    assert result.returncode == 0, result.stderr
    logs = sorted((tmp_path / "logs").rglob("stdout.log"))
    assert [log.parent.name for log in logs] == ["0", "1"]
    assert all("# fish completion of arriero" in log.read_text(encoding="utf-8") for log in logs)
    assert result.stdout.count("# fish completion of arriero") == 1
