"""The seed's commands for several processes, word for word, and what training and answering on several processes leave."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from forked import run_processes

from arriero.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Arriero = Callable[..., subprocess.CompletedProcess[str]]

TINY = "__internal_testing__/tiny-random-llama"
ROWS = 84  # 5 steps of 16, and one of 4


def seed_command(script: str, number: int) -> list[str]:
    """The launched command number `number` of the seed that runs a script: `launch`, its options, the verb, its options."""
    text = (Path(__file__).parents[1] / "fixtures" / "seed_commands.txt").read_text(encoding="utf-8")
    block = [block for block in text.split("\n\n") if script in block and "distributed" in block][number]
    block = block[block.index("python") :].replace("$task_name", "llama_hybid")
    # the seed has a backslash straight behind a value ("20\")
    words = shlex.split(re.sub(r"\\\n\s*", " ", block))
    words = words[next(i for i, word in enumerate(words) if word.startswith("paddle.")) + 1 :]
    verb = {"finetune_generation.py": "finetune", "run_pretrain.py": "pretrain"}
    return ["launch", *(verb.get(word, word) for word in words)]


def squad(rows: int) -> dict[str, Any]:
    """Data in SQuAD's format, four questions on each passage."""
    paragraphs = []
    for first in range(0, rows, 4):
        context = f"The {first}th king of the hills had {3 * first} horses, and his {first % 7} brothers had no peace."
        questions = [
            {
                "id": str(number),
                "question": f"Question {number}: how many horses had he?",
                "answers": [{"text": f"{3 * first}", "answer_start": context.index(f"{3 * first} horses")}],
            }
            for number in range(first, min(first + 4, rows))
        ]
        paragraphs.append({"context": context, "qas": questions})
    return {"version": "1.1", "data": [{"title": "Kings", "paragraphs": paragraphs}]}


@pytest.fixture
def home(tmp_path: Path) -> str:
    """An $ARRIERO_HOME that holds SQuAD, where `finetune` looks when no data is named."""
    folder = tmp_path / "home" / "data" / "squad"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(squad(ROWS)), encoding="utf-8")
    (folder / "dev.json").write_text(json.dumps(squad(13)), encoding="utf-8")
    return str(tmp_path / "home")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder) if "loss" in record]


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "all_results.json").read_text()))


def test_the_pipeline_command_word_for_word(arriero: Arriero, in_process: Arriero, tmp_path: Path, home: str) -> None:
    """Two tensor-parallel times two pipeline processes and 16 micro-batches, against one process; a shorter warm-up follows."""
    command = [*seed_command("finetune_generation.py", 1), "--warmup_steps", "2"]
    assert command[1:3] == ["--gpus", "4,5,6,7"]
    done = arriero(*command, timeout=400, ARRIERO_HOME=home)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "checkpoints"
    assert len(losses(out)) == math.ceil(ROWS / 16)
    assert "tp2 x pp2" in done.stdout or "pp2 x tp2" in done.stdout
    assert "Traceback" not in done.stderr

    verb = command.index("finetune")
    single = ["--tensor_parallel_degree", "1", "--pipeline_parallel_degree", "1", "--output_dir", "one"]
    done = in_process(*command[verb:], *single, ARRIERO_HOME=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert results(out)["eval_loss"] == pytest.approx(results(tmp_path / "one")["eval_loss"], rel=1e-5)


@pytest.mark.peers
def test_any_evaluation_batch_goes_through_a_pipeline(arriero: Arriero, tmp_path: Path, home: str) -> None:
    """The seed wants its evaluation batch to be 1 x 16 in a pipeline."""
    score = ("finetune", "--do_train", "no", "--do_eval", "--model_name_or_path", TINY)
    launch = ("launch", "--nproc_per_node", "2")
    pipeline = ("--pipeline_parallel_degree", "2", "--per_device_eval_batch_size", "3", "--output_dir", "two")
    for command in ((*score, "--output_dir", "one"), (*launch, *score, *pipeline)):
        done = arriero(*command, timeout=400, ARRIERO_HOME=home)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)


@pytest.mark.peers  # eight processes
def test_the_sharding_command_word_for_word(arriero: Arriero, tmp_path: Path) -> None:
    """Eight processes, fp16 O2, stage2; what follows the seed's words: a small model, fewer steps, the device that is here."""
    rows = [{"text": f"The {i}th king of the {i % 7} hills had {i * 3} horses and no peace."} for i in range(1200)]
    (tmp_path / "kings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = arriero(
        *("preprocess", "--model_name", TINY, "--tokenizer_name", "LlamaTokenizer", "--input_path", "kings.jsonl"),
        *("--output_prefix", "data/kings", "--append_eos"),
    )
    assert made.returncode == 0, made.stderr
    smaller = [
        *("--model_name_or_path", TINY, "--tokenizer_name_or_path", TINY, "--device", "cpu"),
        *(
            "--max_seq_length",
            "32",
            "--max_steps",
            "4",
            "--save_steps",
            "2",
            "--eval_steps",
            "2",
            "--logging_steps",
            "1",
        ),
    ]
    command = seed_command("run_pretrain.py", 0)
    assert command[1:5] == ["--gpus", "0,1,2,3,4,5,6,7", "--log_dir", "output/llama_hybid_log"]
    done = arriero(*command, *smaller, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dp_shard8 (stage2): 8 processes" in done.stdout
    assert "--sharding has no effect" not in done.stderr
    out = tmp_path / "output" / "llama_hybid"
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert {path.name for path in (tmp_path / "output" / "llama_hybid_log").iterdir()} == {
        f"workerlog.{rank}" for rank in range(8)
    }
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float16}

    # one process that accumulates as many samples; fp16 gradients are rounded in another order from the second step on
    verb = command.index("pretrain")
    done = arriero(*command[verb:], *smaller, "--gradient_accumulation_steps", "8", "--output_dir", "one", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(out)[0] == pytest.approx(losses(tmp_path / "one")[0], rel=1e-5)
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=2e-3)


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        pytest.param(("--pipeline_parallel_degree", "2", "--pipeline_schedule", "zbv"), 4, id="tp2 x pp2 in a V"),
        pytest.param(("--sharding", "stage3"), 2, id="tp2 x dp_shard2", marks=pytest.mark.peers),
    ],
)
def test_the_final_model_as_shards_too(
    layout: tuple[str, ...], files: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One key-value head for two processes, a tied head, and stages that are no run of layers; merged, it is the model."""
    shape = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 128}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **shape, **heads, **ends}))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"Verse {i} of many."}) + "\n" for i in range(99)))
    paths = ("--input_path", str(tmp_path / "text.jsonl"), "--output_prefix", str(tmp_path / "corpus" / "text"))
    assert main(["preprocess", "--model_name_or_path", TINY, "--append_eos", *paths]) == 0
    ended = run_processes(
        *(4, "arriero", "pretrain", "--config_name", "config.json"),
        *("--tokenizer_name_or_path", TINY, "--input_dir", "corpus", "--output_dir", "out", "--max_seq_length", "16"),
        *(
            "--max_steps",
            "1",
            "--tensor_parallel_degree",
            "2",
            *layout,
            "--save_sharded_model",
            "--save_strategy",
            "no",
        ),
        timeout=400,
        cwd=tmp_path,
    )
    assert [code for code, _ in ended] == [0] * 4, ended
    out = tmp_path / "out"
    assert len(list((out / "sharded").glob("model-tp0?-of-02*.safetensors"))) == files
    assert main(["merge", "--model_name_or_path", str(out / "sharded"), "--output_path", str(tmp_path / "m")]) == 0
    assert "logits differ" in capsys.readouterr().out
    merged = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(merged)
    for name in merged:
        assert (tmp_path / "m" / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.parametrize(
    "more", [("--num_speculative_tokens", "3"), ("--pipeline_parallel_degree", "2")], ids=["tensor", "pipeline"]
)
def test_answers_of_two_processes_are_those_of_one(
    more: tuple[str, ...],
    arriero: Arriero,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    predict = ("predict", "--model_name_or_path", TINY, "--max_new_tokens", "12", "--predict_file")
    alone = more if "pipeline" not in more[0] else ()
    assert main([*predict, "one.json", *alone]) == 0
    shown = capsys.readouterr().out
    two = arriero("launch", "--nproc_per_node", "2", *predict, "two.json", *more, timeout=400)
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert two.stdout == shown.replace("one.json", "two.json")


@pytest.mark.parametrize(
    "layout", [(), pytest.param(("--tensor_parallel_degree", "2"), marks=pytest.mark.peers)], ids=["copies", "tensor"]
)
def test_scores_of_two_processes_are_those_of_one(
    layout: tuple[str, ...],
    arriero: Arriero,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dev.json").write_text(json.dumps(squad(13)), encoding="utf-8")
    options = ("--src_length", "80", "--tgt_length", "24", "--max_new_tokens", "4", "--per_device_eval_batch_size", "3")
    evaluate = ("evaluate", "--model_name_or_path", TINY, "--dataset_path", "dev.json", "--task_name", "squad_qa")
    assert main([*evaluate, *options, "--output_dir", "one"]) == 0
    shown = capsys.readouterr().out
    two = arriero("launch", "--nproc_per_node", "2", *evaluate, *options, "--output_dir", "two", *layout, timeout=400)
    assert two.returncode == 0, two.stderr
    words = [[line.split()[0] for line in text.splitlines()] for text in (shown, two.stdout)]
    assert words[0] == words[1], "each score once"
    wanted, found = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two"))
    assert found == pytest.approx(wanted, rel=1e-5)
    answers = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("one", "two")]
    assert answers[0] == answers[1]


@pytest.mark.peers
def test_a_real_model_answers_the_same_on_three_processes(arriero: Arriero, smollm2: Path, tmp_path: Path) -> None:
    """Its nine heads and three key-value heads are shared out."""
    predict = ("predict", "--model_name_or_path", str(smollm2), "--max_new_tokens", "32", "--predict_file")
    one = arriero(*predict, "one.json", timeout=500)
    three = arriero("launch", "--nproc_per_node", "3", *predict, "three.json", timeout=500)
    assert (one.returncode, three.returncode) == (0, 0), three.stderr
    assert (tmp_path / "three.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert three.stdout == one.stdout.replace("one.json", "three.json")
