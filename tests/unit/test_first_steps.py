"""What a newcomer's first commands are told: defaults that suit the method, other spellings, refusals that name what works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.cli import main
from arriero.commands.finetune import _tell_next
from arriero.commands.infer import _chosen
from arriero.commands.next_command import program, tell_next
from arriero.commands.table import VERBS, load_verb
from arriero.config.adapter import AdapterOptions
from arriero.config.data import DataOptions, RowOptions
from arriero.config.files import effective, write_config
from arriero.config.generation import PromptOptions
from arriero.config.infer import InferOptions
from arriero.config.option import option_table
from arriero.config.parser import from_keywords, parse
from arriero.config.training import FINETUNE
from arriero.data.sources import read_samples
from arriero.errors import ConfigError, DataError, FormatError
from arriero.formats import download

OUTPUT = ("m", "--output_dir", "run")


def rate(*options: str) -> float:
    found = effective(parse(FINETUNE, [*OUTPUT, *options], "arriero finetune"))["learning_rate"]
    assert isinstance(found, float)
    return found


def test_the_learning_rate_suits_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    expected = {
        "": 5e-5,
        "--lora no": 5e-5,
        "--lora": 3e-4,
        f"--lora_path {adapter}": 3e-4,
        "--lora --lora_dora --min_learning_rate 1e-4": 3e-4,
        "--prefix_tuning": 2e-2,
        f"--prefix_path {adapter}": 2e-2,
        "--prefix_tuning --prefix_projection": 2e-3,
        "--lora --learning_rate 5e-5": 5e-5,
        "--lora --preference dpo --dataset_path x": 5e-5,
    }
    assert {line: rate(*line.split()) for line in expected} == expected
    assert capsys.readouterr().err == ""
    keywords = {"model_name_or_path": "m", "output_dir": "run", "prefix_tuning": True}
    assert effective(from_keywords(FINETUNE, keywords, "arriero.finetune"))["learning_rate"] == 2e-2


def test_the_learning_rate_of_a_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    write_config(file, parse(FINETUNE, [*OUTPUT, "--lora"], "arriero finetune"))
    assert "\nlearning_rate: 0.0003\n" in file.read_text()
    write_config(file, parse(FINETUNE, [*OUTPUT], "arriero finetune"))
    assert effective(parse(FINETUNE, [str(file), "--lora"], "arriero finetune"))["learning_rate"] == 5e-5


@pytest.mark.parametrize("verb", ["chat", "serve", "evaluate", "predict", "export", "merge", "finetune"])
def test_an_adapter_in_the_place_of_a_model_is_told_the_command_that_works(verb: str, tmp_path: Path) -> None:
    options = {"merge": ["--output_path", "x"], "finetune": ["--output_dir", "x"]}.get(verb, [])
    cases = (("LORA", "base", "--lora_path"), ("PREFIX_TUNING", "base", "--prefix_path"), ("LORA", None, "--lora_path"))
    for number, (kind, base, name) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": base}))
        with pytest.raises(ConfigError) as refused:
            parse(load_verb(verb).options, [str(folder), *options], f"arriero {verb}")
        if base is None:
            assert f"names no base: `arriero {verb} --model_name_or_path BASE {name} {folder}`" in str(refused.value)
        else:
            assert str(refused.value) == (
                f"{folder} is an adapter and no model; its base is base: `arriero {verb} {name} {folder}`"
            )
        (folder / "config.json").write_text("{}")  # a model with the leftovers of an adapter
        assert parse(load_verb(verb).options, [str(folder), *options], f"arriero {verb}", warn=False)


def test_model_is_short_for_model_name_or_path() -> None:
    for verb in VERBS:
        table = option_table(load_verb(verb).options)
        if "model_name_or_path" in table:
            assert "model" in table, verb
    for verb, more in {
        "finetune": ["--output_dir", "x"],
        "chat": [],
        "export": [],
        "plan": [],
        "bench": ["decode"],
    }.items():
        groups = parse(load_verb(verb).options, ["--model", "mine", *more], f"arriero {verb}", warn=False)
        assert effective(groups)["model_name_or_path"] == "mine", verb
    with pytest.raises(ConfigError, match="it is called --model_dir here"):
        parse(load_verb("infer").options, ["--model", "mine"], "arriero infer")


def test_bench_takes_a_model_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    parse(load_verb("bench").options, ["decode", "--model", "mine"], "arriero bench")
    assert capsys.readouterr().err == ""
    groups = parse(load_verb("bench").options, ["serve", "--model", "served"], "arriero bench")
    assert effective(groups)["model"] == "served"


@pytest.mark.parametrize(
    ("verb", "flag", "said"),
    [
        ("evaluate", "data_file", "it is called --dataset_path here"),
        ("pretrain", "data_file", "it is called --input_dir here"),
        ("infer", "prompts", "prompts are rows of a file, --data_file"),
        ("predict", "prompts", "`arriero chat MODEL --prompt TEXT` answers one"),
        ("infer", "model_path", "it is called --model_dir here"),
    ],
)
def test_names_from_elsewhere(verb: str, flag: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(load_verb(verb).options, [f"--{flag}", "x"], f"arriero {verb}")
    assert said in str(refused.value)


def test_a_plan_takes_the_command_line_of_a_fine_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    line = "m --lora --dataset_path d --packing no --lora_rank 4 --learning_rate 1e-3"
    groups = parse(load_verb("plan").options, line.split(), "arriero plan")
    assert effective(groups)["lora_rank"] == 4
    assert capsys.readouterr().err.splitlines() == [
        f"arriero: warning: --{name} has no effect on a plan" for name in ("dataset_path", "packing")
    ]
    with pytest.raises(ConfigError, match="--packing takes yes or no"):
        parse(load_verb("plan").options, ["m", "--packing", "perhaps"], "arriero plan")
    with pytest.raises(ConfigError, match="unknown option --xyzzy"):
        parse(load_verb("plan").options, ["m", "--xyzzy", "1"], "arriero plan")


def test_a_plan_for_a_gpu_says_that_it_is_in_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    told = {
        "--gpu H100": True,
        "--gpu H100 --bf16": False,
        "--gpu V100": True,
        "--gpu H100 --fp16": False,
        "--flops 1e14": False,
    }
    for line, expected in told.items():
        assert main(["plan", "smollm2-135m", "--memory", "80GB", "--device", "auto", *line.split()]) == 0
        assert ("\nThis is fp32; with --bf16: " in capsys.readouterr().out) is expected, line
    assert main(["plan", "smollm2-135m", "--gpu", "H100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["setup"]["compute_dtype"] == "float32"


def bundle(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"kind": "onnx", "graph": "", "files": {}}))
    return folder


def chosen(*arguments: str) -> Path:
    infer, _ = parse(load_verb("infer").options, arguments, "arriero infer")
    assert isinstance(infer, InferOptions)
    return _chosen(infer)


def test_infer_finds_the_bundle(tmp_path: Path) -> None:
    mine = bundle(tmp_path / "inf" / "mine")
    inf = str(mine.parent)
    (mine.parent / "notes").mkdir()
    assert chosen(str(mine)) == chosen("--model_dir", str(mine)) == chosen("--model_dir", inf) == mine
    with pytest.raises(ConfigError, match=rf"holds no bundle lama, but mine: `arriero infer {mine}` runs the first"):
        chosen(inf, "--model_prefix", "lama")
    bundle(tmp_path / "inf" / "other")
    with pytest.raises(ConfigError, match=rf"holds several bundles, mine, other: `arriero infer {mine}` runs"):
        chosen(inf)
    assert chosen(inf, "--model_prefix", "other").name == "other"
    usual = bundle(tmp_path / "inf" / "llama")
    assert chosen(inf) == usual, "PaddleNLP's name comes first"
    with pytest.raises(FormatError, match="holds no bundle, nor is there one in"):
        chosen(str(tmp_path))


@pytest.mark.parametrize("ask", [download.resolve_model, download.resolve_tokenizer, download.model_config])
def test_a_folder_that_is_not_there_is_no_trouble_of_the_network(
    ask: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(name: str, *arguments: object, **keywords: object) -> Path:
        raise FormatError(f"{name}: {said}")

    monkeypatch.setattr(download, "fetch_files", fail)
    assert callable(ask)
    for said in (
        "the Hub (x) cannot be reached; check the network",
        "there is no such model on the Hub, or it is private",
    ):
        with pytest.raises(FormatError) as refused:
            ask("models/nope")
        assert str(refused.value) == f"models/nope: no such folder here, and as a name of the Hub: {said}"
    said = "is gated; accept its licence"
    with pytest.raises(FormatError, match=r"^models/nope: is gated"):
        ask("models/nope")
    said = "the Hub (x) cannot be reached"
    with pytest.raises(FormatError, match=r"^\S+/\S+: the Hub"):
        download.resolve_model("qwen3-0.6b")


def test_a_row_of_another_kind_than_the_task_says_which_option_asks_for_it(tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    with pytest.raises(DataError) as refused:
        read_samples(rows, "squad_qa")
    assert str(refused.value) == (
        f"{rows}:1: has no 'context', which --task_name squad_qa asks for (here, or in the --config file); it has messages: "
        "--task_name none reads rows by their own keys"
    )
    assert RowOptions(task_name="none").task_name is None
    assert PromptOptions(task_name="None").task_name is None
    assert RowOptions(task_name="none", data_format="messages").data_format == "messages"


def test_the_next_command_is_called_as_it_can_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert program() == "arriero"
    own = tmp_path / ".venv" / "bin" / "arriero"
    own.parent.mkdir(parents=True)
    own.touch(0o755)
    assert program() == ".venv/bin/arriero"
    monkeypatch.setenv("PATH", str(own.parent))  # the environment is active
    assert program() == "arriero"


def test_the_next_command_is_ready_for_a_shell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    rows, squad = DataOptions(), DataOptions(task_name="squad_qa", dataset_path="my squad")
    _tell_next("runs/mine", AdapterOptions(lora=True), rows)
    _tell_next("runs/mine", AdapterOptions(prefix_tuning=True), rows)
    _tell_next("runs/my model", AdapterOptions(), rows)
    _tell_next("runs/mine", AdapterOptions(lora=True), squad)
    assert capsys.readouterr().out.splitlines() == [
        "try it: arriero chat --lora_path runs/mine",
        "try it: arriero chat --prefix_path runs/mine",
        "try it: arriero chat 'runs/my model'",
        "try it: arriero evaluate --lora_path runs/mine --dataset_path 'my squad' --task_name squad_qa",
    ]
    monkeypatch.setenv("RANK", "1")
    tell_next("chat", "runs/mine")
    assert capsys.readouterr().out == "", "one process tells it"
