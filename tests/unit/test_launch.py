"""`arriero launch`: what it starts, its environment, its refusals, and a lone process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from arriero import cli
from arriero.commands import launch as launch_command
from arriero.commands.launch import LaunchOptions, check_command, check_gpus, command_line, environment
from arriero.commands.table import ONE_PROCESS
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.layout import Layout
from arriero.config.optimization import OptimizationOptions
from arriero.config.parser import parse
from arriero.errors import ArrieroError, ConfigError, PeerError, RunStopped
from arriero.parallel.launching.report import Report, report_of
from arriero.parallel.launching.resuming import accumulate_for_absent_machines, resume_if_restarted
from arriero.parallel.processes import silence_limit, start

Run = Callable[..., subprocess.CompletedProcess[str]]


def launch(*argv: str) -> LaunchOptions:
    (options,) = parse((LaunchOptions,), argv, "arriero launch")
    assert isinstance(options, LaunchOptions)
    return options


def test_everything_behind_the_verb_is_passed_on() -> None:
    options = launch("--gpus", "0,1", "--log_dir", "logs", "serve", "--gpus", "7", "--config", "a.yaml", "-h")
    assert options.command == ["serve", "--gpus", "7", "--config", "a.yaml", "-h"]
    assert (options.gpus, options.log_dir, options.processes) == ("0,1", "logs", 2)
    assert command_line(options) == [sys.executable, "-P", "-m", "arriero", *options.command]


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


def test_gpus_by_name() -> None:
    names = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,MIG-GPU-8932f937/1/0"
    assert launch("--gpus", names, "serve").gpus == names


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
        (("--gpus", "a,b", "serve"), "give numbers from 0 on"),
        (("--gpus", "0,-1", "serve"), "give numbers from 0 on"),
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


@pytest.mark.parametrize(
    ("size", "rank", "message"),
    [
        ("abc", "0", "WORLD_SIZE is 'abc': give a number, or unset it"),
        ("0", None, "WORLD_SIZE is 0: give the number of processes, or unset it"),
        ("2", None, "WORLD_SIZE is 2 and RANK is not set: start by arriero launch, or unset WORLD_SIZE"),
        ("2", "one", "RANK is 'one': give a number, or unset it"),
        ("2", "5", "RANK is 5 and WORLD_SIZE 2: ranks go from 0 to 1"),
    ],
)
def test_a_place_that_cannot_be(size: str, rank: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(ConfigError) as caught:
        start(Layout(dp_replicate=2), torch.device("cpu"))
    assert str(caught.value) == message
    # a launcher says it anew
    check_command(launch("--nproc_per_node", "2", "evaluate", "--model_name_or_path", "m", "--tasks", "t"))


def test_help_of_the_launched_command(arriero: Run) -> None:
    assert arriero("launch", "--gpus", "0,1", "serve", "--help").stdout == arriero("serve", "--help").stdout


def test_one_process_with_and_without_a_log(arriero: Run, tmp_path: Path) -> None:
    plain = arriero("launch", "--gpus", "0", "completion", "fish")
    logged = arriero("launch", "--gpus", "0", "--log_dir", "logs", "completion", "fish")
    assert (plain.returncode, logged.returncode, logged.stderr) == (0, 0, "")
    assert plain.stdout == logged.stdout == (tmp_path / "logs" / "workerlog.0").read_text(encoding="utf-8")
    assert plain.stdout.startswith("# fish completion of arriero")


def test_an_error_of_one_process_with_a_log(arriero: Run, tmp_path: Path) -> None:
    result = arriero("launch", "--log_dir", "logs", "merge", "m", "--lora_path", "none", "--output_path", "out")
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
    gone.__cause__, gone.__context__ = None, RunStopped("ended", 0)  # it was told to end, and so were they
    assert (reported(gone).stopped, reported(gone).exit_code) == (True, 0)


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


def test_layers_that_do_not_fill_the_stages_are_told_before_the_data_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("RANK", "0")
    options = ("--model_name_or_path", "llama-7b", "--output_dir", "x", "--pipeline_parallel_degree", "64")
    for verb in (("pretrain", "--input_dir", "none"), ("finetune", "--dataset_path", "none")):
        assert cli.main([*verb, *options]) == 2
        assert "the model's 32 layers do not fill 64 pipeline stages" in capsys.readouterr().err


@pytest.mark.parametrize(("here", "given", "expected"), [(4, 3, 3), (2, 3, 6), (3, 3, 4), (1, 1, 4), (3, 1, None)])
def test_fewer_machines_accumulate_more(
    here: int, given: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has the rows of 4 processes, however many of them are here."""
    monkeypatch.setenv("ARRIERO_MOST_PROCESSES", "4")
    monkeypatch.setenv("WORLD_SIZE", str(here))
    monkeypatch.setenv("RANK", "0")
    options = OptimizationOptions(gradient_accumulation_steps=given)
    if expected is None:
        with pytest.raises(ConfigError, match=r"--gradient_accumulation_steps 1: .* give a multiple of 3"):
            accumulate_for_absent_machines(options)
        return
    accumulate_for_absent_machines(options)
    assert options.gradient_accumulation_steps == expected


def test_machines_that_come_and_go_must_share_out_a_step() -> None:
    verb = ("pretrain", "--output_dir", "x", "--model_name_or_path", "m", "--input_dir", "d")
    place = ("--master", "h:1", "--nproc_per_node", "2")
    for machines in ("1:2", "2:2", "2"):
        check_command(launch("--nnodes", machines, *place, *verb))
    check_command(launch("--nnodes", "1:3", *place, *verb, "--gradient_accumulation_steps", "4"))
    with pytest.raises(
        ConfigError, match=r"--nnodes 2:3: .* --gradient_accumulation_steps a multiple of 2 \(it is 1\)"
    ):
        check_command(launch("--nnodes", "2:3", *place, *verb))
    with pytest.raises(ConfigError, match="this run has 2"):
        check_command(launch("--nnodes", "1:2", *place, *verb, "--tensor_parallel_degree", "4"))


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
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_gpus(launch("--gpus", "0,3", "serve"))
    with pytest.raises(ConfigError, match="--gpus names 4 and this machine has 4 GPUs"):
        check_gpus(launch("--gpus", "3,4,5", "serve"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_gpus(launch("--gpus", "4,5,6,7", "serve"))


def test_no_python_file_of_the_current_folder_takes_part(tmp_path: Path) -> None:
    """Anybody may have put one beside the data; a folder `arriero` is nobody's fault."""
    for name in ("yaml.py", "psutil.py", "arriero/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('run')\n")
    source = Path(__file__).parents[2] / "src"
    command = [sys.executable, "-P", "-m", "arriero", "launch", "--gpus", "0", "completion", "fish"]
    variables = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# fish completion of arriero")
    for path in source.rglob("*.py"):
        for behind in path.read_text(encoding="utf-8").split("sys.executable,")[1:]:
            assert behind.split()[0] == '"-P",', path


def test_the_launcher_is_as_quiet_as_its_processes_and_says_that_it_was_told_to_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch's C++ side reads its level when it is imported; until the agent listens a signal is told all the same."""
    levels: list[str | None] = []

    def first_import(options: LaunchOptions) -> None:
        levels.append(os.environ.get("TORCH_CPP_LOG_LEVEL"))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    monkeypatch.setattr(launch_command, "check_gpus", first_import)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        launch_command.run(launch("--nproc_per_node", "2", "evaluate", "--model_name_or_path", "m", "--tasks", "t"))
    assert (ended.value.code, levels) == (143, ["ERROR"])
    assert capfd.readouterr().err == "arriero: asked to end (SIGTERM)\n"
    assert signal.getsignal(signal.SIGTERM) == before
