"""`arriero plan` through the real command line, and the recipes through the real parsers."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from arriero.cli import main
from arriero.commands.table import load_verb
from arriero.config.optimization import OptimizationOptions
from arriero.config.parser import parse
from arriero.config.pretraining import PretrainModelOptions
from arriero.models.config import LlamaConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL = ("--model_name_or_path", "smollm2-135m", "--flops", "1e11", "--memory", "16GB")
Command = Callable[..., subprocess.CompletedProcess[str]]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    code = main(["plan", *arguments, "--json"])
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    assert code == (0 if result["fits"] else 2)
    return result


def test_tables_and_file(arriero: Command, tmp_path: Path) -> None:
    result = arriero("plan", *SMALL, "--num_tokens", "1e9", "--output_file", "plan.json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    plan = json.loads((tmp_path / "plan.json").read_text())
    lines = {line.split("  ")[1]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert "134,515,008" in lines["parameters"]
    assert f"{plan['memory']['peak'] / 2**30:.2f} GiB" in lines["peak"]
    assert f"{plan['longest_sequence']:,} tokens" in result.stdout
    assert "100 GFLOP/s (given)" in lines["peak of a device"]
    assert "70%" in lines["reached, assumed"]
    seconds = 1e9 * plan["flops_per_token"]["training"] / (1e11 * 0.7)
    assert plan["run_seconds"] == pytest.approx(seconds)
    assert f"{seconds / 86400:.1f} days" in result.stdout
    assert not list(tmp_path.glob(".*.tmp"))


def test_nothing_is_downloaded_for_a_named_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path / "home"))
    for name in ("smollm2-135m-instruct", "meta-llama/Llama-2-7b-hf", "__internal_testing__/tiny-random-llama"):
        assert main(["plan", "--model_name_or_path", name, "--gpu", "H200", "--bf16", "--recompute"]) in (0, 2)
    assert not (tmp_path / "home").exists()


def test_a_folder_with_nothing_but_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "configs/models/llama-15m"
    by_folder = planned(capsys, "--model_name_or_path", str(folder), "--flops", "1e11")
    by_file = planned(capsys, "--config_name", str(folder / "config.json"), "--flops", "1e11")
    assert by_folder["parameters"] == by_file["parameters"]
    assert by_folder["parameters"] == {"total": 15191712, "embedding_and_head": 32000 * 288, "trained": 15191712}


def test_options_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    more = (
        "--bf16",
        "--fp16_opt_level",
        "O2",
        "--recompute",
        "--optim",
        "adamw_8bit",
        "--gradient_accumulation_steps",
        "3",
    )
    more += ("--per_device_train_batch_size", "2", "--max_seq_length", "128", "--lora", "--lora_rank", "4")
    setup = planned(capsys, *SMALL, *more)["setup"]
    assert setup == {
        "batch": 2,
        "sequence": 128,
        "accumulation": 3,
        "compute_dtype": "bfloat16",
        "weight_dtype": "bfloat16",
        "recompute": "full",
        "optimizer": "adamw_8bit",
        "device": "cpu",
        "devices": 1,
        "sharding": 0,
        "lora_rank": 4,
    }


def test_too_large_a_model_says_by_how_much_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model_name_or_path", "llama-7b", "--gpu", "H100", "--max_seq_length", "512"]
    assert main(["plan", *arguments]) == 2
    told = capsys.readouterr()
    plan = planned(capsys, *arguments)
    lacking = (plan["memory"]["peak"] - plan["device_memory"]["bytes"]) / 2**30  # type: ignore[index]
    assert f"no, {lacking:,.2f} GiB too much" in told.out
    assert f"{lacking:,.2f} GiB more than there is; what helps: --optim adamw_8bit" in told.err
    assert told.err.count("\n") == 1
    assert main(["plan", *arguments, "--optim", "adamw_8bit", "--recompute"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "lots"], "--memory: the size 'lots' is not understood"),
        (["--memory", "0GB"], "--memory: the size '0GB' must be at least 1 byte"),
        (["--model_name_or_path", "lama-7b"], "did you mean"),
        (["--config_name", "/no/such/folder"], "no such folder"),
        (["--config_name", str(ROOT / "pyproject.toml")], "is a file"),
        (["--max_seq_length", "0"], "--max_seq_length is 0: it must be at least 1"),
        (["--per_device_train_batch_size", "-4"], "must be at least 1"),
        (["--num_tokens", "-1"], "--num_tokens is -1.0: it must be more than 0"),
        (["--flops", "0"], "must be more than 0"),
        (["--mfu", "1.5"], "must be at most 1"),
        (["--num_devices", "0"], "must be at least 1"),
        (["--gpu", "Z9"], "known are H200"),
        (["--gpu", "H100", "--device", "cpu"], "drop one of them"),
        (["--tensor_parallel_degree", "2"], "is not planned for in this version"),
        (["--use_flash_attention", "no"], "--use_flash_attention no is not planned for"),
        (["--sharding", "stage2", "offload"], "drop the word offload"),
        ([*SMALL, "--output_file", "/no/such/folder/x.json"], "cannot be written"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_hostile_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"model_type": "llama", "vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4, "intermediate_size": 2**31 - 1}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["plan", "--config_name", str(tmp_path), "--gpu", "T4"]) == 2
    assert "larger than any machine can address" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_is_planned(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    verb = load_verb("pretrain")
    groups = parse(verb.options, ["--config", str(recipe)], verb.prog)
    model = next(group for group in groups if isinstance(group, PretrainModelOptions))
    optimization = next(group for group in groups if isinstance(group, OptimizationOptions))
    assert LlamaConfig.from_file(model.config_name or model.model_name_or_path).num_parameters() > 0
    assert yaml.safe_load(recipe.read_text())["max_steps"] == optimization.max_steps > optimization.warmup_steps
    plan = planned(capsys, "--config", str(recipe), "--gpu", "H100", "--num_devices", "64")
    assert plan["fits"]
    assert math.isfinite(plan["run_seconds"])  # type: ignore[arg-type]


def test_every_recipe_has_a_row() -> None:
    table = (ROOT / "configs/README.md").read_text()
    assert RECIPES
    for recipe in RECIPES:
        assert f"[{recipe.name}]({os.path.relpath(recipe, ROOT / 'configs')})" in table
