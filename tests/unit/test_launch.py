"""`arriero launch`: what it starts, its environment, its refusals, and a lone process."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from arriero import cli
from arriero.commands.launch import LaunchOptions, check_command, check_gpus, command_line, environment
from arriero.commands.table import ONE_PROCESS
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.parser import parse
from arriero.errors import ArrieroError, ConfigError, PeerError, RunStopped
from arriero.parallel.launching.report import Report, report_of
from arriero.parallel.launching.resuming import resume_if_restarted
from arriero.parallel.processes import silence_limit

Run = Callable[..., subprocess.CompletedProcess[str]]


def launch(*argv: str) -> LaunchOptions:
    (options,) = parse((LaunchOptions,), argv, "arriero launch")
    assert isinstance(options, LaunchOptions)
    return options


def test_everything_behind_the_verb_is_passed_on() -> None:
    options = launch("--gpus", "0,1", "--log_dir", "logs", "serve", "--gpus", "7", "--config", "a.yaml", "-h")
    assert options.command == ["serve", "--gpus", "7", "--config", "a.yaml", "-h"]
    assert (options.gpus, options.log_dir, options.processes) == ("0,1", "logs", 2)
    assert command_line(options) == [sys.executable, "-m", "arriero", *options.command]


@pytest.mark.parametrize(
    ("argv", "processes", "machines", "single"),
    [
        (["serve"], 1, (1, 1), True),
        (["--gpus", "3", "serve"], 1, (1, 1), True),
        (["--nnodes", "1", "serve"], 1, (1, 1), True),
        (["--gpus", "4,5, 6,7", "serve"], 4, (1, 1), False),
        (["--nproc_per_node", "3", "serve"], 3, (1, 1), False),
        (["--nnodes", "2", "--node_rank", "1", "--master", "10.0.0.1:29500", "serve"], 1, (2, 2), False),
        (["--nnodes", "1:4", "--rdzv_backend", "c10d", "--rdzv_endpoint", "h:1", "serve"], 1, (1, 4), False),
    ],
)
def test_how_many(argv: list[str], processes: int, machines: tuple[int, int], single: bool) -> None:
    options = launch(*argv)
    assert (options.processes, options.machines, options.single) == (processes, machines, single)


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert environment(launch("serve"))["CUDA_VISIBLE_DEVICES"] == "5"
    assert "OMP_NUM_THREADS" not in environment(launch("serve"))
    variables = environment(launch("--gpus", "0,2,3", "serve"))
    assert (variables["CUDA_VISIBLE_DEVICES"], variables["OMP_NUM_THREADS"]) == ("0,2,3", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment(launch("--gpus", "0,2", "serve"))["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--gpus", "0,0", "serve"), "--gpus"),
        (("--gpus", "0,,1", "serve"), "--gpus"),
        (("--gpus", "0,1", "--nproc_per_node", "3", "serve"), "--nproc_per_node"),
        (("--master", "host", "serve"), "--master"),
        (("--master", "h:70000", "serve"), "--master"),
        (("--master", "h:1", "--master_port", "2", "serve"), "--master_addr/--master_port"),
        (("--nproc_per_node", "0", "serve"), "--nproc_per_node"),
        (("--nnodes", "two", "serve"), "--nnodes"),
        (("--nnodes", "3:2", "serve"), "--nnodes"),
        (("--nnodes", "0", "serve"), "--nnodes"),
        (("--nnodes", "2", "serve"), "--master ADDRESS:PORT"),
        (("--nnodes", "2", "--master", "h:1", "--node_rank", "2", "serve"), "--node_rank"),
        (("--nnodes", "1:2", "--master", "h:1", "--node_rank", "0", "serve"), "--node_rank"),
        (("--nnodes", "2", "--master", "h:1", "--rdzv_backend", "static", "serve"), "--node_rank"),
        (("--gpu", "0", "serve"), "did you mean --gpus?"),
        ((), "COMMAND must be given"),
    ],
)
def test_slips(argv: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        launch(*argv)
    assert named in str(error.value)


def test_a_layout_that_does_not_fit_is_refused_before_the_start() -> None:
    verb = ("pretrain", "--output_dir", "x", "--model_name_or_path", "m", "--input_dir", "d")
    degrees = ("--tensor_parallel_degree", "2", "--pipeline_parallel_degree", "2")
    for processes, machines in ((4, 1), (2, 2), (4, 3)):
        place = ("--master", "h:1") if machines > 1 else ()
        check_command(launch("--nproc_per_node", str(processes), "--nnodes", str(machines), *place, *verb, *degrees))
    with pytest.raises(ConfigError, match="this run has 6"):
        check_command(launch("--nproc_per_node", "3", "--nnodes", "2", "--master", "h:1", *verb, *degrees))
    with pytest.raises(ConfigError, match="this run has 2"):
        check_command(launch("--gpus", "0,1", *verb, *degrees))


def test_a_slip_in_the_launched_command_is_told_once(arriero: Run) -> None:
    assert "predict" not in ONE_PROCESS
    for arguments, message in [
        (("--gpus", "0,1", "serve", "--prt", "1"), "unknown option --prt: did you mean --port?"),
        (("--gpus", "0,1", "serv"), "unknown command 'serv' after launch"),
        (("launch", "serve"), "launch cannot start itself"),
        (
            ("pretrain", "--nproc_per_node", "2"),
            "--nproc_per_node is an option of launch, and those come before the command: "
            "arriero launch --nproc_per_node ... pretrain ...",
        ),
        (("--gpus", "0,1", "completion", "fish"), "completion runs in one process and --gpus 0,1 asks for several"),
        (("--nnodes", "2", "--master", "h:1", "completion", "fish"), "completion runs in one process"),
    ]:
        result = arriero("launch", *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr


@pytest.mark.parametrize("text", ["abc", "-5", "0", "nan", "inf", ""])
def test_a_timeout_that_is_no_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_TIMEOUT", text)
    with pytest.raises(ConfigError) as caught:
        silence_limit()
    assert str(caught.value) == f"ARRIERO_TIMEOUT is {text!r}: give a number of seconds above 0"
    monkeypatch.setenv("ARRIERO_TIMEOUT", "1.5")
    assert silence_limit() == timedelta(seconds=1.5)


def test_help_of_the_launched_command(arriero: Run) -> None:
    assert arriero("launch", "--gpus", "0,1", "serve", "--help").stdout == arriero("serve", "--help").stdout


def test_one_process_with_and_without_a_log(arriero: Run, tmp_path: Path) -> None:
    plain = arriero("launch", "--gpus", "0", "completion", "fish")
    logged = arriero("launch", "--gpus", "0", "--log_dir", "logs", "completion", "fish")
    assert (plain.returncode, logged.returncode, logged.stderr) == (0, 0, "")
    assert plain.stdout == logged.stdout == (tmp_path / "logs" / "workerlog.0").read_text(encoding="utf-8")
    assert plain.stdout.startswith("# fish completion of arriero")


def test_an_error_of_one_process_with_a_log(arriero: Run, tmp_path: Path) -> None:
    result = arriero("launch", "--log_dir", "logs", "merge", "--lora_path", "none", "--output_path", "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("arriero: ")
    assert result.stderr == (tmp_path / "logs" / "workerlog.0").read_text(encoding="utf-8")


def test_a_log_folder_that_cannot_be(arriero: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = arriero("launch", "--log_dir", "file/logs", "completion", "fish")
    assert (result.returncode, result.stderr) == (
        2,
        "arriero: --log_dir file/logs: Not a directory: name a folder that can be written\n",
    )


def reported(error: BaseException) -> Report:
    return report_of(error, "line", getattr(error, "exit_code", 1), "")


def test_who_is_to_blame() -> None:
    class DistBackendError(RuntimeError):  # as torch.distributed's, which is told by its name
        pass

    gone = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:10")
    for error in (PeerError("rank 0 failed"), gone, DistBackendError("x"), RuntimeError("Timed out waiting 30000ms")):
        assert reported(error).of_peer
        assert not reported(error).failed
    caused = ConfigError("the others cannot be reached")
    caused.__cause__ = gone
    assert reported(caused).of_peer
    for error in (ConfigError("x"), RuntimeError("shapes differ"), ValueError("Connection closed by peer")):
        assert reported(error).failed
    for error in (RunStopped("saved", 0), KeyboardInterrupt(), BrokenPipeError()):
        assert reported(error).stopped
    # It failed itself, and telling the others failed because they were gone.
    try:
        try:
            raise ConfigError("no rows")
        except ArrieroError:
            raise gone  # noqa: B904
    except RuntimeError as error:
        own = reported(error)
    assert (own.failed, own.message, own.exit_code) == (True, "no rows", 2)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = Report(time=3.5, message="ä\n", exit_code=2, of_peer=True, traceback="t")
    report.write(tmp_path / "r.json")
    assert Report.read(tmp_path / "r.json") == report
    assert Report.read(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("restart", "age", "given", "expected"),
    [
        # (restart number, age of the checkpoint in the folder in seconds after the launch or None, options) -> options
        ("0", 5, {}, (None, False)),
        ("0", 5, {"overwrite_output_dir": True}, (None, True)),
        ("1", None, {}, ("auto", False)),
        ("1", 5, {}, ("auto", False)),
        ("1", 5, {"overwrite_output_dir": True}, ("auto", False)),
        ("1", None, {"overwrite_output_dir": True}, (None, True)),
        ("1", -50, {"overwrite_output_dir": True}, (None, True)),  # of the run that was to be replaced
        ("1", None, {"resume_from_checkpoint": "other/checkpoint-7"}, ("other/checkpoint-7", False)),
        ("2", 5, {"resume_from_checkpoint": "other/checkpoint-7"}, ("auto", False)),
    ],
)
def test_what_a_restarted_run_goes_on_from(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restart: str,
    age: int | None,
    given: dict[str, object],
    expected: tuple[str | None, bool],
) -> None:
    launched = 1_700_000_000
    monkeypatch.setenv("ARRIERO_RESTART", restart)
    monkeypatch.setenv("ARRIERO_LAUNCHED", str(launched))
    if age is not None:
        (tmp_path / "checkpoint-3").mkdir()
        os.utime(tmp_path / "checkpoint-3", (launched + age, launched + age))
    options = CheckpointOptions(output_dir=str(tmp_path), **given)  # type: ignore[arg-type]
    resume_if_restarted(options)
    assert (options.resume_from_checkpoint, options.overwrite_output_dir) == expected


def test_the_command_line_goes_on_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def run(options: CheckpointOptions) -> int:
        seen.append(options.resume_from_checkpoint)
        return 0

    module = types.ModuleType("restart_probe")
    module.__dict__.update(HELP="", OPTIONS=(CheckpointOptions,), run=run)
    monkeypatch.setitem(sys.modules, "restart_probe", module)
    monkeypatch.setitem(cli.VERBS, "probe", ("restart_probe", ""))
    for restart in ("0", "1"):
        monkeypatch.setenv("ARRIERO_RESTART", restart)
        assert cli.main(["probe", "--output_dir", str(tmp_path)]) == 0
    assert seen == [None, "auto"]


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_gpus(launch("--gpus", "0,3", "serve"))
    with pytest.raises(ConfigError, match="--gpus names 4 and this machine has 4 GPUs"):
        check_gpus(launch("--gpus", "3,4,5", "serve"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_gpus(launch("--gpus", "4,5,6,7", "serve"))
