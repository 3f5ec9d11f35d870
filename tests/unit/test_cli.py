"""The `arriero` command itself: pages, exit codes, one-line errors, speed of the answer."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import arriero as package
from arriero import cli
from arriero.commands.table import ONE_PROCESS, VERBS, load_verb
from arriero.config.help_page import format_help
from arriero.config.option import OptionGroup, option_table, specs_of, title
from arriero.errors import ArrieroError, DataError

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Puts a verb named `probe` into the table that does what it is given."""

    def install(run: Callable[[], int]) -> None:
        module = types.ModuleType("arriero_probe")
        module.__dict__.update(HELP="Probe.", OPTIONS=(), run=run)
        monkeypatch.setitem(sys.modules, "arriero_probe", module)
        monkeypatch.setitem(VERBS, "probe", ("arriero_probe", "a probe"))

    return install


def test_the_overview_lists_every_verb(arriero: Run) -> None:
    result = arriero("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert all(f"  {name} " in result.stdout for name in VERBS)
    assert arriero("-h").stdout == result.stdout


def test_without_a_command_the_overview_is_an_error(arriero: Run) -> None:
    result = arriero()
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: arriero" in result.stderr


def test_version(arriero: Run) -> None:
    result = arriero("--version")
    assert (result.returncode, result.stdout) == (0, f"arriero {package.__version__}\n")


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_is_complete(name: str) -> None:
    loaded = load_verb(name)
    option_table(loaded.options)  # refuses two options of one name
    page = format_help(loaded.prog, loaded.help, loaded.options)
    assert page.startswith(f"usage: arriero {name}")
    for group in loaded.options:
        assert issubclass(group, OptionGroup)
        assert f"\n{title(group)}:\n" in page
        for spec in specs_of(group):
            assert spec.help, spec.name
            assert (spec.name.upper() if spec.positional else f"--{spec.name}") in page


def test_every_verb_has_a_place() -> None:
    assert VERBS.keys() >= ONE_PROCESS


def test_help_and_parsing_import_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from arriero.cli import main\n"
        "from arriero.commands.table import VERBS, load_verb\n"
        "from arriero.config.parser import parse\n"
        "main(['--help'])\n"
        "for name in VERBS:\n"
        "    assert main([name, '--help']) == 0\n"
        "assert main(['finetune', '--output_dir', 'x', '--fp16', '--bf16']) == 2\n"
        "verb = load_verb('finetune')\n"
        "parse(verb.options, ['m', '--output_dir', 'x', '--lora', '--config', 'run.yaml'], 'arriero finetune')\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    (tmp_path / "run.yaml").write_text("learning_rate: 3e-4\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_overview_answers_at_once(arriero: Run) -> None:
    """Under 0.3 s: processor time, the least of five runs, so that a busy machine does not matter."""
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        arriero("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3


def test_a_slip_is_one_line_and_code_2(arriero: Run) -> None:
    for arguments, message in [
        (("finetun",), "unknown command 'finetun': did you mean finetune?"),
        (("eval",), "unknown command 'eval': it is `arriero evaluate`"),
        (("train",), "`arriero finetune` for a model that is there, `arriero pretrain` from scratch"),
        (("xyzzy",), "unknown command 'xyzzy': arriero --help lists them"),
        (("--frobnicate",), "unknown command '--frobnicate'"),
        (("serve", "--prt", "1"), "unknown option --prt: did you mean --port?"),
        (("serve", "--port", "0"), "--port is 0: it must be at least 1"),
        (("serve", "--port", "1", "--flask_port", "1"), "--port and --flask_port are both 1"),
        (("serve", "--port", "1", "--flask_port", "2", "--ui_port", "3"), "three ports for two things"),
        (("serve", "--port", "8010", "--ui_port", "8010"), "--ui_port and --flask_port are both 8010"),
        (("download", ""), "MODEL_NAME_OR_PATH is empty: give a name or a path"),
        (("inspect", " "), "PATH is empty: give a name or a path"),
        (("chat", "--model_name_or_path", "", "--device", "cpu"), "--model_name_or_path is empty"),
        (("predict", "--lora_path", "l1,l3"), "one adapter here; `arriero merge --lora_path l1,l3 ...` joins them"),
        (("export", "--lora_path", "l1,l3"), "one adapter here"),
        (("evaluate", "--lora_path", "l1,l3"), "one adapter here"),
        (("serve", "--lora_path", "l1,l3"), "one adapter here"),
        (("preprocess",), "--model_name_or_path, --input_path, --output_prefix must be given"),
    ]:
        result = arriero(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("arriero: ")
        assert message in result.stderr


def test_debug_shows_the_traceback(arriero: Run) -> None:
    for arguments in (("--debug", "serve", "--port", "0"), ("serve", "--port", "0", "--debug")):
        result = arriero(*arguments)
        assert result.returncode == 2
        assert "Traceback" in result.stderr
        assert "arriero: --port is 0: it must be at least 1" in result.stderr
    assert "Traceback" in arriero("serve", "--port", "0", ARRIERO_DEBUG="1").stderr


Install = Callable[[Callable[[], int]], None]


def test_exit_codes(verb: Install, capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> Callable[[], int]:
        def run() -> int:
            raise error

        return run

    for error, code, line in [
        (DataError("rows.jsonl line 3: no answer\n  give one"), 2, "arriero: rows.jsonl line 3: no answer give one\n"),
        (ArrieroError("no"), 2, "arriero: no\n"),
        (KeyboardInterrupt(), 130, "arriero: interrupted\n"),
        (
            RuntimeError("shapes\ndiffer"),
            1,
            "arriero: internal error: RuntimeError: shapes differ (run it again with --debug for the traceback)\n",
        ),
    ]:
        verb(raising(error))
        assert cli.main(["probe"]) == code
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", line)
    verb(lambda: 5)
    assert cli.main(["probe"]) == 5


def test_a_process_of_many_says_which_it_is(
    verb: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> int:
        raise DataError("no rows")

    verb(run)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "arriero [rank 3]: no rows\n"


def test_debug_after_launch_belongs_to_the_launched() -> None:
    for arguments, rest, found in [
        (["launch", "serve", "--debug"], ["launch", "serve", "--debug"], False),
        (["--debug", "launch", "serve"], ["launch", "serve"], True),
        (["serve", "--debug", "--port", "1"], ["serve", "--port", "1"], True),
        (["serve"], ["serve"], False),
    ]:
        assert cli._take_debug(arguments) is found
        assert arguments == rest


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m arriero completion zsh; echo code $? >&2"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        ["bash", "-c", f"( {command} ) | head -n 1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "#compdef arriero\n"
    assert result.stderr in ("code 141\n", "code 0\n")


LATE = """
import atexit, sys, time
def late():
    print("late", flush=True)
    time.sleep(0.5)
atexit.register(late)
from arriero.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_changes_nothing(number: int) -> None:
    """Python takes long to end after torch was loaded."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", LATE, "export", "--help"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line == "late\n" for line in process.stdout)
        process.send_signal(number)
        told = process.stderr.read()
        assert (process.wait(), told) == (0, "")


def test_an_option_group_without_options_has_no_heading() -> None:
    class Empty(OptionGroup):
        """Empty."""

    assert "Empty" not in format_help("arriero probe", "", (Empty,))
