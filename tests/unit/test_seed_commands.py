"""Every command of the seed's README (verbatim in fixtures/seed_commands.txt), its script swapped for the verb."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from arriero.cli import main
from arriero.commands.launch import LaunchOptions
from arriero.commands.table import LATER, load_verb
from arriero.config.files import effective
from arriero.config.parser import parse

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


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if LATER & set(command)], ids=lambda c: " ".join(c[:3])
)
def test_a_verb_of_a_later_version_answers_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "warning" not in line]
    assert len(lines) == 1
    assert "not available in this version (0.1) yet" in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [1, 4, 6])
def test_several_processes_are_refused_in_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMANDS[number]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(lines) == 1
    assert "runs in one process in this version" in lines[0]
