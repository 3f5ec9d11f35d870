"""Flags, files and their merge into option groups."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from arriero.config.files import MAX_BYTES, effective, write_config
from arriero.config.help_page import format_help
from arriero.config.option import REQUIRED, OptionGroup, option
from arriero.config.parser import HelpRequested, parse
from arriero.config.pretraining import MAX_SKIPPED, CorpusOptions
from arriero.config.values import step_range
from arriero.errors import ConfigError


@dataclass(kw_only=True)
class Training(OptionGroup):
    """Training."""

    learning_rate: float = option(5e-5, "peak learning rate", minimum=0.0)
    max_steps: int = option(-1, "steps", minimum=-1)
    fp16: bool = option(False, "half precision")
    use_cache: bool = option(True, "a flag that is on")
    strategy: str = option("no", "when", ("no", "steps", "epoch"), aliases=("eval_strategy",))
    limit: int | None = option(None, "at most", minimum=1)
    layers: list[str] = option(["q", "v"], "which layers")
    stop: list[str] = option([], "stop strings", split=False)
    sizes: list[int] = option([], "numbers")
    name: str | None = option(None, "a name")
    folder: Path | None = option(None, "a folder")


@dataclass(kw_only=True)
class Files(OptionGroup):
    """Files."""

    source: str = option(REQUIRED, "what to read", positional=True)
    target: str = option("out", "what to write", positional=True)
    force: bool = option(False, "write over it")


def train(*argv: str) -> Training:
    (training,) = parse((Training,), argv, "arriero test")
    assert isinstance(training, Training)
    return training


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ((), False),
        (("--fp16",), True),
        (("--fp16", "1"), True),
        (("--fp16", "True"), True),
        (("--fp16", "yes"), True),
        (("--fp16", "ON"), True),
        (("--fp16=true",), True),
        (("--fp16", "0"), False),
        (("--fp16", "False"), False),
        (("--fp16", "no"), False),
        (("--fp16=off",), False),
        (("--fp16", "--max_steps", "3"), True),
        (("--fp16", "--fp16", "0"), False),
    ],
)
def test_bools_in_every_form(argv: tuple[str, ...], value: bool) -> None:
    assert train(*argv).fp16 is value


def test_names_in_kebab_case_and_aliases() -> None:
    training = train("--learning-rate", "3e-4", "--eval-strategy=epoch", "--max-steps", "-1")
    assert (training.learning_rate, training.strategy, training.max_steps) == (3e-4, "epoch", -1)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (("--layers", "a", "b"), ["a", "b"]),
        (("--layers", "a,b"), ["a", "b"]),
        (("--layers", "a b"), ["a", "b"]),
        (("--layers=a,b",), ["a", "b"]),
        (("--layers", "a,", "b", "--fp16"), ["a", "b"]),
        ((), ["q", "v"]),
    ],
)
def test_lists(argv: tuple[str, ...], value: list[str]) -> None:
    assert train(*argv).layers == value


def test_lists_of_whole_strings_and_of_numbers() -> None:
    training = train("--stop", "a, b", "\n\n", "--sizes", "1,2", "-3")
    assert (training.stop, training.sizes) == (["a, b", "\n\n"], [1, 2, -3])


def test_defaults_are_not_shared() -> None:
    train().layers.append("x")
    assert train().layers == ["q", "v"]


def test_optional_values_and_paths() -> None:
    training = train("--limit", "none", "--name", "none", "--folder", "a/b")
    assert (training.limit, training.name, training.folder) == (None, "none", Path("a/b"))
    assert train("--limit", "2").limit == 2


def test_choices_ignore_case() -> None:
    assert train("--strategy", "Epoch").strategy == "epoch"


def test_the_last_of_a_repeated_flag_wins() -> None:
    assert train("--max_steps", "1", "--max_steps", "2").max_steps == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--learning_rat", "1"), "unknown option --learning_rat: did you mean --learning_rate?"),
        (("--learning-rat", "1"), "unknown option --learning-rat: did you mean --learning_rate?"),
        (("--max", "1"), "unknown option --max"),
        (("--zzzzz",), "unknown option --zzzzz: see arriero test --help"),
        (("--learning_rate", "fast"), "--learning_rate takes a number, not 'fast'"),
        (("--learning_rate", "nan"), "--learning_rate is nan: it must be a finite number"),
        (("--learning_rate", "inf"), "--learning_rate is inf: it must be a finite number"),
        (("--learning_rate", "-0.1"), "--learning_rate is -0.1: it must be at least 0"),
        (("--max_steps", "1e3"), "--max_steps takes a whole number, not '1e3'"),
        (("--max_steps", "1.5"), "--max_steps takes a whole number, not '1.5'"),
        (("--max_steps",), "--max_steps needs a value"),
        (("--max_steps", "--fp16"), "--max_steps needs a value"),
        (("--layers",), "--layers needs a value"),
        (("--fp16", "maybe"), "--fp16 takes yes or no (1/0, true/false), not 'maybe'"),
        (("--fp16", "2"), "--fp16 takes yes or no"),
        (("--strategy", "weekly"), "--strategy takes one of no, steps, epoch, not 'weekly'"),
        (("--limit", "0"), "--limit is 0: it must be at least 1"),
        (("--sizes", "1,x"), "--sizes takes a whole number, not 'x'"),
        (("--max_steps", "9" * 5000), "--max_steps takes a whole number"),
        (("stray",), "unexpected argument 'stray'"),
        (("-x",), "unknown option '-x'"),
        (("--config",), "--config needs the path of a YAML or JSON file"),
        (("--config", "missing.yaml"), "missing.yaml: no such configuration file"),
    ],
)
def test_a_slip_is_one_line_that_names_it(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        train(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@dataclass(kw_only=True)
class Method(OptionGroup):
    """Method."""

    kind: str = option("int8", "what", ("int8", "int4"))
    method: str = option("rtn", "how", ("rtn", "gptq", "same"))
    other: str = option("a", "another", ("a", "same"))


def test_a_word_that_another_option_takes_is_told_to_be_that_ones() -> None:
    for word, more in (("gptq", " (which --method takes)"), ("same", ""), ("none", "")):
        with pytest.raises(ConfigError) as error:
            parse((Method,), ["--kind", word], "arriero test")
        assert str(error.value) == f"--kind takes one of int8, int4, not '{word}'{more}"


def test_positionals_by_place_and_by_name() -> None:
    (files,) = parse((Files,), ["a.json", "--force", "b.yaml"], "arriero test")
    assert (files.source, files.target, files.force) == ("a.json", "b.yaml", True)
    (files,) = parse((Files,), ["--source", "a", "b"], "arriero test")
    assert (files.source, files.target) == ("a", "b")
    (files,) = parse((Files,), ["--", "--odd"], "arriero test")
    assert files.source == "--odd"
    with pytest.raises(ConfigError, match="SOURCE must be given"):
        parse((Files,), [], "arriero test")
    with pytest.raises(ConfigError, match="unexpected argument 'c'"):
        parse((Files,), ["a", "b", "c"], "arriero test")


def test_help_is_asked_for_by_either_name() -> None:
    for flag in ("-h", "--help"):
        with pytest.raises(HelpRequested):
            train("--fp16", flag)


def test_one_option_under_two_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--strategy and --eval-strategy are the same option and differ: give one"):
        train("--strategy", "no", "--eval-strategy", "epoch")
    assert train("--strategy", "epoch", "--eval_strategy", "epoch").strategy == "epoch"
    assert train("--eval-strategy", "no", "--eval_strategy", "epoch").strategy == "epoch", "one name: the last wins"
    path = write(tmp_path / "run.yaml", "strategy: no\n")
    assert train(path, "--eval_strategy", "epoch").strategy == "epoch", "a flag wins over a file"


def test_the_home_folder_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a command line, where the shell expands it; only in what is a path."""
    monkeypatch.setenv("HOME", "/home/me")
    path = write(
        tmp_path / "run.yaml",
        "output_dir: ~/run\ndata_path: data/~x,~/b.jsonl:2, ~/c\nadapters: [one=~/lora, '~']\nname: ~/x\nfolder: ~/f\n"
        "output_prefix: ~nobody-at-all/x\n",
    )

    @dataclass(kw_only=True)
    class Places(OptionGroup):
        """Places."""

        output_dir: str = option("", "a folder")
        data_path: str = option("", "files")
        adapters: list[str] = option([], "folders")
        name: str = option("", "a name")
        folder: Path | None = option(None, "a folder")
        output_prefix: str = option("", "a beginning")

    (places,) = parse((Places,), [path], "arriero test")
    assert places.output_dir == "/home/me/run"
    assert places.data_path == "data/~x,/home/me/b.jsonl:2, /home/me/c"
    assert places.adapters == ["one=/home/me/lora", "/home/me"]
    assert places.folder == Path("/home/me/f")
    assert (places.name, places.output_prefix) == ("~/x", "~nobody-at-all/x")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_sets_options_and_flags_win(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.yaml",
        "learning_rate: 3e-4\nmax-steps: 10\nfp16: yes\nuse_cache: 0\n"
        "strategy: no\nlimit: null\nlayers: [a, b]\nname: 7\n",
    )
    for argv in (["--config", path], [f"--config={path}"], [path]):
        training = train(*argv)
        assert training.learning_rate == 3e-4
        assert training.max_steps == 10
        assert training.fp16 is True
        assert training.use_cache is False
        assert training.strategy == "no"  # YAML 1.1 reads the bare word as false
        assert training.limit is None
        assert training.layers == ["a", "b"]
        assert training.name == "7"
    for argv in (["--max_steps", "5", path], [path, "--max_steps", "5"], [path, "--fp16", path, "--max_steps", "5"]):
        assert train(*argv).max_steps == 5


def test_a_later_file_wins_over_an_earlier_one(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "max_steps: 1\nlimit: 1\n")
    second = write(tmp_path / "b.json", json.dumps({"max_steps": 2}))
    training = train("--config", first, "--config", second)
    assert (training.max_steps, training.limit) == (2, 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "learning_rat: 1\n", "run.yaml: unknown key 'learning_rat': did you mean learning_rate?"),
        ("run.yaml", "qqqqqq: 1\n", "no option of this command has that name"),
        ("run.yaml", "max_steps: fast\n", "run.yaml: max_steps takes a whole number, not 'fast'"),
        ("run.yaml", "max_steps: 1.5\n", "run.yaml: max_steps takes a whole number, not 1.5"),
        ("run.yaml", "max_steps: true\n", "run.yaml: max_steps takes a whole number, not True"),
        ("run.yaml", "max_steps:\n", "run.yaml: max_steps has no value: it takes a whole number"),
        ("run.yaml", "learning_rate: .nan\n", "--learning_rate is nan: it must be a finite number"),
        ("run.yaml", "max_steps: {a: 1}\n", "run.yaml: max_steps takes a whole number, not a mapping"),
        ("run.yaml", "max_steps: 1\nmax_steps: 2\n", "the key max_steps is given twice"),
        ("run.yaml", "max_steps: 1\nmax-steps: 2\n", "max-steps and max_steps are the same option"),
        ("run.yaml", "strategy: no\neval_strategy: no\n", "eval_strategy and strategy are the same option"),
        ("run.yaml", "a: [1\n", "not valid YAML"),
        ("run.yaml", "- 1\n", "it must be a mapping"),
        ("run.yaml", "1: 2\n", "it must be a mapping"),
        ("run.yaml", "name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("run.yaml", "max_steps: " + "9" * 5000, "run.yaml"),
        ("run.json", '{"max_steps": 1, "max_steps": 2}', "the key max_steps is given twice"),
        ("run.json", '{"max_steps": 1', "not valid JSON"),
        ("run.json", "[" * 100_000, "not valid JSON"),
        ("run.yaml", "[" * 100_000, "not valid YAML"),
        ("run.yaml", "#" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_key(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(ConfigError) as error:
        train("--config", path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_refers_to_itself_many_times_is_answered_at_once(tmp_path: Path) -> None:
    """A 'billion laughs' document must not be expanded."""
    text = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    path = write(tmp_path / "run.yaml", text.replace("i: &i", "layers: &i"))
    with pytest.raises(ConfigError):
        train("--config", path)


@pytest.mark.parametrize("key", ["max_steps", "strategy", "layers"])
def test_a_value_that_refers_to_itself_many_times_is_refused_at_once(tmp_path: Path, key: str) -> None:
    lists = ["&a [x, x, x, x, x, x, x, x, x]"] + [
        f"&{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    path = write(tmp_path / "run.yaml", f"{key}: [{', '.join(lists)}]\n")
    with pytest.raises(ConfigError, match=f"{key} takes .*, not a list"):
        train("--config", path)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid YAML"):
        train("--config", str(path))


def test_the_effective_configuration_reads_back_the_same(tmp_path: Path) -> None:
    argv = ["--learning_rate", "1e-8", "--strategy", "no", "--stop", "a, b", "--layers", "x", "--folder", "f", "--fp16"]
    training = train(*argv)
    path = tmp_path / "config.yaml"
    write_config(path, [training], header="arriero test\nsecond line")
    assert train("--config", str(path)) == training
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert loaded == effective([training])
    assert loaded["learning_rate"] == 1e-8
    assert path.read_text(encoding="utf-8").startswith("# arriero test\n# second line\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_configuration_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_config(tmp_path / "missing" / "config.yaml", [train()])


def test_an_alias_gives_way_to_a_name() -> None:
    @dataclass(kw_only=True)
    class Other(OptionGroup):
        """Other."""

        eval_strategy: str = option("own", "an option of that name")

    training, other = parse((Training, Other), ["--eval_strategy", "mine"], "arriero test")
    assert (training.strategy, other.eval_strategy) == ("no", "mine")


def test_two_options_of_one_name_are_a_defect() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        parse((Training, Training), [], "arriero test")


def test_the_help_page_tells_every_option_and_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = format_help("arriero test", "What it does.", (Training, Files))
    for name in (
        "learning_rate",
        "max_steps",
        "fp16",
        "strategy",
        "limit",
        "layers",
        "stop",
        "sizes",
        "name",
        "folder",
    ):
        assert f"--{name}" in page
    assert "(default: 5e-05)" in page
    assert "(default: q,v)" in page
    assert "{no,steps,epoch}" in page
    assert "[also --eval_strategy]" in page
    assert "(required)" in page
    assert page.index("Training:") < page.index("Files:")
    assert max(len(line) for line in page.splitlines()) <= 80


def test_groups_built_in_python_are_checked_too() -> None:
    values: dict[str, Any] = {"learning_rate": float("nan")}
    with pytest.raises(ConfigError, match="--learning_rate is nan"):
        Training(**values)
    with pytest.raises(ConfigError, match="--strategy is 'x'"):
        Training(strategy="x")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("5", (5, 5)),
        (" 5 - 8 ", (5, 8)),
        ("5-5", (5, 5)),
        ("0", None),
        ("8-5", None),
        ("5-", None),
        ("a", None),
        ("", None),
    ],
)
def test_ranges_of_steps(text: str, steps: tuple[int, int] | None) -> None:
    assert step_range(text) == steps
    assert step_range("9" * 13) is None


def test_skipped_steps_count_from_0() -> None:
    options = CorpusOptions(input_dir=["c"], skip_data_intervals=["2-4", "7"])
    assert options.skipped_steps() == {1, 2, 3, 6}
    for wrong in ("0", "4-2", f"1-{MAX_SKIPPED + 2}"):
        with pytest.raises(ConfigError, match=f"--skip_data_intervals has '{wrong}'"):
            CorpusOptions(input_dir=["c"], skip_data_intervals=[wrong])
