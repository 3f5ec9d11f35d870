"""Every command of the seed's README (verbatim in fixtures/seed_commands.txt), its script swapped for the verb."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from arriero.commands.launch import LaunchOptions, check_command
from arriero.commands.table import load_verb
from arriero.config.files import effective
from arriero.config.parser import parse
from arriero.data import sources
from arriero.data.sources import check_data, load_samples
from arriero.errors import ConfigError, DataError

SCRIPTS = {
    "run_pretrain.py": "pretrain",
    "finetune_generation.py": "finetune",
    "predict_generation.py": "predict",
    "export_generation_model.py": "export",
    "infer_generation.py": "infer",
    "server.py": "serve",
}
LAUNCHERS = ("paddle.distributed.launch", "paddle.distributed.fleet.launch")


def seed_commands() -> list[list[str]]:
    """The commands as argument lists after `arriero`."""
    text = (Path(__file__).parent.parent / "fixtures" / "seed_commands.txt").read_text(encoding="utf-8")
    commands = []
    for block in text.strip().split("\n\n"):
        variables = dict(re.findall(r'^(\w+)="(\w+)"$', block, re.MULTILINE))
        block = re.sub(r'^\w+="\w+"$\n?', "", block, flags=re.MULTILINE)
        for name, value in variables.items():
            block = block.replace(f"${name}", value)
        # Some lack the backslash before an indented line, and some have it straight after a value ("20\").
        words = shlex.split(re.sub(r"\\?\n\s*", " ", block))
        assert words.pop(0) == "python"
        while words[0] in ("-u", "-m"):
            words.pop(0)
        if words[0] in LAUNCHERS:
            words[0] = "launch"
        commands.append([SCRIPTS.get(word, word) for word in words])
    return commands


COMMANDS = seed_commands()


def parsed(command: list[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(verb, its options, the launcher's options)."""
    launcher: dict[str, Any] = {}
    if command[0] == "launch":
        (launch,) = parse((LaunchOptions,), command[1:], "arriero launch")
        launcher = effective([launch])
        command = launch.command
    verb = load_verb(command[0])
    return verb.name, effective(parse(verb.options, command[1:], verb.prog)), launcher


def test_the_fixture_is_whole() -> None:
    verbs = [next(word for word in command if word in SCRIPTS.values()) for command in COMMANDS]
    assert verbs == [
        "pretrain",
        *["finetune"] * 4,
        *["predict"] * 4,
        *["export"] * 2,
        "infer",
        "serve",
        "predict",
    ]


EXPECTED: list[dict[str, Any]] = [
    {
        "model_type": "llama",
        "model_name_or_path": "facebook/llama-7b",
        "tokenizer_name_or_path": "facebook/llama-7b",
        "input_dir": ["./data"],
        "output_dir": "output/llama_hybid",
        "split": "949,50,1",
        "max_seq_length": 2048,
        "per_device_train_batch_size": 1,
        "use_flash_attention": True,
        "use_fused_rms_norm": False,
        "fp16": True,
        "fp16_opt_level": "O2",
        "scale_loss": 1024.0,
        "learning_rate": 1e-5,
        "min_learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "max_steps": 10000,
        "save_steps": 5000,
        "weight_decay": 0.01,
        "warmup_ratio": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": 20,
        "dataloader_num_workers": 1,
        "sharding": ["stage2"],
        "eval_steps": 1000,
        "evaluation_strategy": "steps",
        "report_to": ["tensorboard"],
        "disable_tqdm": True,
        "continue_training": True,
        "recompute": True,
        "do_train": True,
        "do_eval": True,
        "device": "cuda",
    },
    {
        "output_dir": "./checkpoints/",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 8,
        "model_name_or_path": "facebook/llama-7b",
        "task_name": "squad",
        "num_train_epochs": 2.0,
        "learning_rate": 3e-5,
        "warmup_steps": 30,
        "logging_steps": 1,
        "evaluation_strategy": "epoch",
        "save_strategy": "epoch",
        "src_length": 1024,
        "tgt_length": 1024,
        "fp16": True,
        "fp16_opt_level": "O2",
        "do_train": True,
        "do_eval": True,
        "disable_tqdm": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "greater_is_better": True,
        "eval_with_do_generation": False,
        "recompute": True,
        "save_total_limit": 1,
        "overwrite_output_dir": True,
        "tensor_parallel_degree": 4,
        "lora": False,
    },
    {"learning_rate": 3e-4, "lora": True, "lora_rank": 8, "lora_alpha": 16.0, "prefix_tuning": False},
    {"learning_rate": 3e-5, "lora": False, "prefix_tuning": True, "num_prefix_tokens": 64},
    {
        "model_name_or_path": "__internal_testing__/tiny-random-llama",
        "num_train_epochs": 1.0,
        "gradient_accumulation_steps": 16,
        "per_device_eval_batch_size": 16,
        "tensor_parallel_degree": 2,
        "pipeline_parallel_degree": 2,
        "pipeline_parallel_config": ["disable_p2p_cache_shape"],
        "disable_tqdm": True,
        "eval_steps": 100,
        "evaluation_strategy": "steps",
        "eval_with_do_generation": False,
        "fp16": False,
        "recompute": False,
        "lr_scheduler_type": "linear",
        "warmup_steps": 20,
    },
    {"model_name_or_path": "./checkpoints/", "lora_path": None, "data_file": None},
    {
        "model_name_or_path": "./checkpoints/checkpoint-100/",
        "merge_tensor_parallel_path": "./checkpoints/llama-merged",
    },
    {"model_name_or_path": "facebook/llama-7b", "lora_path": "./checkpoints", "prefix_path": None},
    {"model_name_or_path": "facebook/llama-7b", "lora_path": None, "prefix_path": "./checkpoints"},
    {"model_name_or_path": "checkpoints/", "output_path": "inference/llama", "lora_path": None},
    {"model_name_or_path": "facebook/llama-7b", "output_path": "inference/llama", "lora_path": "./checkpoints"},
    {"model_dir": "inference", "model_prefix": "llama"},
    {"model_name_or_path": "facebook/llama-7b", "port": 8010, "flask_port": 8011, "src_length": 100},
    {
        "model_name_or_path": "idea-ccnl/ziya-llama-13b-v1",
        "data_file": "/root/paddlejob/work/eb_data/hcg/dev.json",
        "predict_file": "prediction.json",
    },
]


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_seed_command_gives_the_values_it_says(number: int) -> None:
    _, options, _ = parsed(COMMANDS[number])
    expected = EXPECTED[number]
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_every_flag_of_a_seed_command_is_an_option(number: int) -> None:
    """No flag may be swallowed as a value of another."""
    command = COMMANDS[number]
    flags = {word[2:] for word in command if word.startswith("--")}
    _, options, launcher = parsed(command)
    known_by_other_names = {"model_path"}
    assert flags - known_by_other_names <= options.keys() | launcher.keys()


def test_the_launcher_part() -> None:
    launchers = [parsed(command)[2] for command in COMMANDS if command[0] == "launch"]
    assert [(launch["gpus"], launch["log_dir"]) for launch in launchers] == [
        ("0,1,2,3,4,5,6,7", "output/llama_hybid_log"),
        ("0,1,2,3", None),
        ("4,5,6,7", None),
        ("0,1,2,3", None),
        ("0,1,2,3,4,5,6,7", None),
    ]


@pytest.mark.parametrize("number", [0, 1, 4, 6])
def test_a_launched_command_fits_its_processes(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher checks before it starts the processes: the verb, its options, and the degrees by their number."""
    (launch,) = parse((LaunchOptions,), COMMANDS[number][1:], "arriero launch")
    assert launch.processes == (8 if number == 0 else 4)
    check_command(launch)
    monkeypatch.setattr(launch, "nproc_per_node", 3)
    if number in (1, 4):  # four processes by their degrees
        with pytest.raises(ConfigError, match=r"needs .* 4 processes and this run has 3"):
            check_command(launch)


def warnings_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    parsed(command)
    return [line.partition("warning: ")[2] for line in capsys.readouterr().err.splitlines()]


def test_sharding_has_an_effect_in_several_processes_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [line for line in warnings_of(COMMANDS[0], capsys) if line.startswith("--sharding")]
    assert told == ["--sharding has no effect in one process: arriero launch starts several"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    assert [line for line in warnings_of(COMMANDS[0], capsys) if line.startswith("--sharding")] == []
    whole = [*COMMANDS[0], "--tensor_parallel_degree", "8"]
    assert [line for line in warnings_of(whole, capsys) if line.startswith("--sharding")] == [
        "--sharding has no effect with tp8: nobody shares it"
    ]


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (("--sequence_parallel", "no"), "--sequence_parallel has no effect without --tensor_parallel_degree above 1"),
        (
            ("--pipeline_schedule", "1f1b"),
            "--pipeline_schedule has no effect without --pipeline_parallel_degree above 1",
        ),
        (("--gradient_reduce_dtype", "bfloat16"), "--gradient_reduce_dtype has no effect in one process"),
        (("--save_sharded_model",), "--save_sharded_model has no effect without --tensor_parallel_degree or"),
        (
            ("--pipeline_parallel_degree", "2", "--pipeline_parallel_config", "enable_timer"),
            "--pipeline_parallel_config enable_timer has no effect",
        ),
        (
            ("--tensor_parallel_degree", "2", "--save_sharded_model", "--lora"),
            "--save_sharded_model has no effect with --lora",
        ),
    ],
)
def test_an_option_of_a_layout_that_is_not_there_is_told(
    options: tuple[str, ...], warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (told,) = warnings_of(["finetune", "--model_name_or_path", "m", "--output_dir", "o", *options], capsys)
    assert told.startswith(warning)


def test_without_data_squad_is_read_from_the_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "_from_hub", lambda *_: pytest.fail("asked the Hub"))
    folder = tmp_path / "data" / "squad"
    folder.mkdir(parents=True)
    question = {"id": "1", "question": "How long?", "answers": [{"text": "930 km", "answer_start": 12}]}
    article = {"title": "Ebro", "paragraphs": [{"context": "The Ebro is 930 km long.", "qas": [question]}]}
    (folder / "dev.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
    check_data(None, None, None)
    (sample,) = load_samples(None, None, None, ["dev"])["dev"]
    assert sample.target == "question: How long?"  # the seed's task: the question is generated
    assert str(folder) in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"has no train\.json"):
        load_samples(None, None, "squad", ["train"])


def test_without_data_and_hub_the_line_names_the_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path))

    def no_network(name: str, *_: object) -> None:
        raise DataError(f"--data_name {name}: no network")

    monkeypatch.setattr(sources, "_from_hub", no_network)
    with pytest.raises(ConfigError) as error:
        load_samples(None, None, None, ["train"])
    for part in ("--dataset_path", str(tmp_path / "data" / "squad"), "--data_name rajpurkar/squad", "no network"):
        assert part in str(error.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="no data: give --dataset_path"):
        check_data(None, None, None)
