"""`arriero plan` through the real command line, and the recipes through the real parsers."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from arriero.cli import main
from arriero.commands.table import load_verb
from arriero.config.adapter import LINEAR_LAYERS
from arriero.config.layout import Layout
from arriero.config.optimization import OptimizationOptions
from arriero.config.parser import parse
from arriero.config.pretraining import PretrainModelOptions
from arriero.models.config import LlamaConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs/pretrain").glob("*.yaml"))
FINETUNING = sorted((ROOT / "configs/finetune").glob("*.yaml"))
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
    assert setup.pop("layout") == asdict(Layout())  # type: ignore[attr-defined]
    assert setup == {
        "batch": 2,
        "sequence": 128,
        "accumulation": 3,
        "compute_dtype": "bfloat16",
        "weight_dtype": "bfloat16",
        "recompute": "full",
        "optimizer": "adamw_8bit",
        "device": "cpu",
        "reduce_dtype": "float32",
        "lora_rank": 4,
        "lora_targets": list(LINEAR_LAYERS),
        "dora": False,
        "prefix_length": 0,
        "prefix_network": 0,
        "quantize_base": None,
        "preference": None,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lora", "--quantize_base", "nf4"), "LoRA, rank 8, base in nf4"),
        (("--lora", "--lora_dora", "--load_in_8bit"), "DoRA, rank 8, base in int8"),
        (("--prefix_tuning", "--num_prefix_tokens", "16"), "prefix of 16"),
        (("--prefix_tuning", "--prefix_projection"), "prefix of 10, made by a network of width 576"),
    ],
)
def test_methods_of_fine_tuning_are_planned(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *SMALL, "--flops", "1e11", "--max_seq_length", "256", *options]) == 0
    shown = capsys.readouterr().out
    assert words in shown
    assert "4 a weight, 6 a trained one" in shown
    plain = planned(capsys, *SMALL, "--flops", "1e11", "--max_seq_length", "256")
    chosen = planned(capsys, *SMALL, "--flops", "1e11", "--max_seq_length", "256", *options)
    assert chosen["memory"]["peak"] < plain["memory"]["peak"]  # type: ignore[index]
    assert chosen["flops_per_token"]["training"] < plain["flops_per_token"]["training"]  # type: ignore[index]


def test_pairs_are_planned_as_two_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(capsys, *SMALL, "--lora", "--max_seq_length", "128", "--per_device_train_batch_size", "4")
    pairs = {
        loss: planned(
            capsys,
            *(*SMALL, "--lora", "--max_seq_length", "128", "--per_device_train_batch_size", "2", "--preference", loss),
        )
        for loss in ("dpo", "orpo")
    }
    for loss, plan in pairs.items():
        assert plan["memory"] == rows["memory"]
        assert (plan["step_tokens"], plan["largest_micro_batch"]) == (4 * 128, rows["largest_micro_batch"] // 2)  # type: ignore[operator]
        work, of_rows = plan["flops_per_token"], rows["flops_per_token"]
        assert isinstance(work, dict)
        assert isinstance(of_rows, dict)
        # the head once more in the backward pass; of the reference a forward pass
        assert work["recomputed"] == 2 * 49152 * 576
        more = work["training"] + work["recomputed"]
        assert plan["step_seconds"] == pytest.approx(rows["step_seconds"] * more / of_rows["training"])
        assert work["reference"] == (of_rows["forward"] if loss == "dpo" else 0)
    main(["plan", *SMALL, "--preference", "dpo"])
    out = capsys.readouterr().out
    assert "dpo: a pair is two rows" in out
    assert "once for every pair before the first step" in out


def test_a_layout_is_planned(arriero: Command, tmp_path: Path) -> None:
    given = (
        "--world_size",
        "24",
        "--tensor_parallel_degree",
        "3",
        "--pipeline_parallel_degree",
        "2",
        "--context_parallel_degree",
        "2",
        "--sharding",
        "stage1",
    )
    given += ("--gradient_accumulation_steps", "6", "--bandwidth_in_node", "10", "--bandwidth_between_nodes", "1")
    result = arriero("plan", *SMALL, *given, "--output_file", "plan.json")
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["setup"]["layout"] == asdict(Layout(tp=3, pp=2, cp=2, dp_shard=2, stage=1))
    assert plan["step_tokens"] == 2 * 6 * 2048
    assert plan["bubble"] == pytest.approx(1 / 7)
    assert {one["axis"] for one in plan["communication"]} == {"shard", "tp", "cp", "pp"}
    busy, bubble = plan["busy_seconds"], plan["bubble_seconds"]
    assert plan["step_seconds"] == pytest.approx(busy + bubble + sum(plan["waiting_seconds"].values()))
    lines = {line.split("  ")[1]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert "Layout: pp2 x dp_shard2 x cp2 x tp3 (stage1; 1f1b)" in result.stdout
    assert "14.3%" in lines["bubble"]
    assert "10 GB/s in a node of 8, 1 GB/s between nodes (given)" in lines["links"]
    assert "tp, 3 devices" in lines


@pytest.mark.parametrize(("gpu", "tera"), [("V100", 15.7), ("T4", 8.1), ("A100", 312.0)])
def test_bf16_is_as_fast_as_the_gpu_has_it(gpu: str, tera: float, capsys: pytest.CaptureFixture[str]) -> None:
    """V100 and T4 have matrix units for fp16 alone."""
    given = ["plan", "--model_name_or_path", "smollm2-135m", "--gpu", gpu]
    assert main([*given, "--bf16"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "peak of a device" in line]
    assert f"{tera:g} TFLOP/s" in line or f"{tera:.1f} TFLOP/s" in line
    assert ("it has no units for bf16; --fp16 has" in line) == (gpu != "A100")
    assert main([*given, "--fp16"]) == 0
    assert "no units" not in capsys.readouterr().out


@pytest.mark.parametrize(("gpu", "code"), [("A100", 2), ("A10", 2), ("L40S", 0)])
def test_fp8_is_refused_as_the_gpu_would(gpu: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model_name_or_path", "smollm2-135m", "--gpu", gpu, "--bf16", "--fp8"]) == code
    refused = (
        f"--fp8 needs an H100, an RTX 40 or a newer NVIDIA GPU (compute capability 8.9), and --gpu is {gpu}: drop it"
    )
    assert (refused in capsys.readouterr().err) == (code == 2)


def test_a_search_lists_layouts_and_the_options_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--model_name_or_path",
        "llama-3.1-8b",
        "--gpu",
        "A100",
        "--bf16",
        "--fp16_opt_level",
        "O2",
        "--num_devices",
        "32",
    ]
    given += ["--max_seq_length", "4096", "--gradient_accumulation_steps", "4"]
    assert main(["plan", *given, "--search"]) == 0
    table = capsys.readouterr().out
    options = table.rstrip().splitlines()[-1].split()
    assert main(["plan", *given, "--search", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["layouts"][0]
    assert best["options"].split() == options
    # what is printed is taken back as it is, and gives the same plan
    plan = planned(capsys, *given[:9], "--max_seq_length", "4096", *options)
    assert plan["setup"]["layout"] == best["layout"]  # type: ignore[index]
    assert plan["memory"]["peak"] == best["peak"]  # type: ignore[index]
    assert plan["tokens_per_second"] == pytest.approx(best["tokens_per_second"])


def test_a_search_that_finds_nothing_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model_name_or_path", "llama-2-70b", "--gpu", "T4", "--num_devices", "2", "--search"]
    assert main(["plan", *given]) == 2
    told = capsys.readouterr()
    assert "  none" in told.out
    assert "no layout of 2 devices that divides 2 rows a step fits" in told.err


@pytest.mark.slow
def test_a_dry_run_builds_the_program_of_a_thousand_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    name = "__internal_testing__/tiny-random-llama"
    given = [
        "--model_name_or_path",
        name,
        "--memory",
        "8GB",
        "--flops",
        "1e11",
        "--max_seq_length",
        "64",
        "--device",
        "cpu",
    ]
    given += ["--num_devices", "1024", "--tensor_parallel_degree", "2"]  # without a pipeline two ranks are built
    assert main(["plan", *given, "--gradient_accumulation_steps", "2", "--sharding", "stage1", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "Rank 0 as built (pp 0, dp_replicate 0, dp_shard 0, cp 0, tp 0)" in shown
    # 2048 x 64 embedding: half of its rows to each of tp, and 1024 rows to 512 shards
    assert "model.embed_tokens.weight                       2 x 64 of 2,048 x 64" in shown
    assert "Rank 1,023 as built (pp 0, dp_replicate 0, dp_shard 511, cp 0, tp 1)" in shown
    assert "lm_head.weight                                  2 x 64 of 2,048 x 64" in shown


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
        (["--max_seq_length", "-1"], "--max_seq_length is -1: it must be at least 0"),
        (["--per_device_train_batch_size", "-4"], "must be at least 1"),
        (["--num_tokens", "-1"], "--num_tokens is -1.0: it must be more than 0"),
        (["--flops", "0"], "must be more than 0"),
        (["--mfu", "1.5"], "must be at most 1"),
        (["--num_devices", "0"], "must be at least 1"),
        (["--gpu", "Z9"], "known are H200"),
        (["--gpu", "H100", "--device", "cpu"], "drop one of them"),
        (["--tensor_parallel_degree", "2"], "--tensor_parallel_degree 2 needs"),
        ([*SMALL, "--num_devices", "2", "--tensor_parallel_degree", "2"], "the nearest that does is"),
        (
            [
                *SMALL,
                "--num_devices",
                "2",
                "--pipeline_parallel_degree",
                "2",
                "--pipeline_schedule",
                "zbv",
                "--torch_compile",
            ],
            "--torch_compile and --pipeline_schedule zbv do not go together",
        ),
        ([*SMALL, "--num_devices", "64", "--pipeline_parallel_degree", "64"], "at most 30 are possible"),
        ([*SMALL, "--num_devices", "6", "--search", "--dry_run"], "take a layout from the first"),
        ([*SMALL, "--search"], "give --num_devices"),
        (
            [*SMALL, "--num_devices", "8", "--search", "--tensor_parallel_degree", "2"],
            "--tensor_parallel_degree 2 and --search: the search chooses the degrees itself",
        ),
        (
            [*SMALL, "--num_devices", "8", "--search", "--data_parallel_degree", "4"],
            "the search chooses the degrees itself",
        ),
        ([*SMALL, "--num_devices", "8", "--search"], "--search needs the speed of devices and links"),
        ([*SMALL, "--num_devices", "8", "--bandwidth_in_node", "100"], "both bandwidths are needed"),
        ([*SMALL, "--num_devices", "8", "--bandwidth_in_node", "0"], "must be more than 0"),
        ([*SMALL, "--qat"], "--qat is not planned for"),
        ([*SMALL, "--quantize_base", "nf4"], "add --lora"),
        ([*SMALL, "--prefix_path", "somewhere"], "--prefix_path is not read by plan"),
        ([*SMALL, "--prefix_tuning", "--num_prefix_tokens", "99999"], "fills the model's context"),
        (["--use_flash_attention", "no"], "--use_flash_attention no is not planned for"),
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


@pytest.mark.parametrize("recipe", FINETUNING, ids=lambda path: path.stem)
def test_recipe_of_fine_tuning_parses_and_nothing_in_it_is_idle(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    verb = load_verb("finetune")
    parse(verb.options, ["--config", str(recipe)], verb.prog)
    assert capsys.readouterr().err == ""


def test_every_recipe_has_a_row() -> None:
    table = (ROOT / "configs/README.md").read_text()
    assert RECIPES
    assert FINETUNING
    for recipe in [*RECIPES, *FINETUNING]:
        assert f"[{recipe.name}]({os.path.relpath(recipe, ROOT / 'configs')})" in table
