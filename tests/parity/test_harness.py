"""Scores of EleutherAI's harness through our model class against its own `hf` class on the same folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from arriero.cli import main
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.engine.loading import load_for_inference
from arriero.errors import TemplateError
from arriero.formats.download import resolve_model
from arriero.training.harness import HarnessModel, find_tasks

# Where the texts lie that are shared with this project; see the README there.
SHARED = Path(os.environ.get("ARRIERO_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
# CC0: written for this test
QUESTIONS = [
    ("A mule carries", ["loads", "clouds", "rivers", "songs"], 0),
    ("Snow is", ["warm", "cold and white", "loud", "green"], 1),
    ("At night we see the", ["noon", "sun", "moon", "lunch"], 2),
    ("Fish live in", ["trees", "books", "fire", "the water"], 3),
    ("Two plus two is", ["four", "nine", "a colour", "ten"], 0),
    ("Bread is made of", ["iron", "flour", "glass", "wind"], 1),
    ("A week has", ["two days", "a hundred days", "seven days", "no days"], 2),
    ("The opposite of up is", ["left", "blue", "far", "down"], 3),
    ("A bird has", ["wings", "wheels", "sails", "pages"], 0),
    ("Ice melts when it is", ["read", "heated", "sung", "painted"], 1),
    ("We hear with our", ["knees", "hair", "ears", "shoes"], 2),
    ("A carpenter works with", ["milk", "rain", "sleep", "wood"], 3),
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
# writes a system message only where there is one, and trims what is said, as templates of the field do
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHOICES = """doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATE = """doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def write_task(
    folder: Path, name: str, rows: list[dict[str, Any]], kind: str = "multiple_choice", more: str = ""
) -> None:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = TASK.format(name=name, rows=path, kind=kind) + (CHOICES if kind == "multiple_choice" else GENERATE)
    text += more
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": text, "choices": choices, "label": label} for text, choices, label in QUESTIONS]
    write_task(tmp_path, "small_choices", rows)
    write_task(tmp_path, "small_answers", rows, "generate_until")
    return tmp_path


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve_model("tiny-random-llama")


def ours(model: Path, batch_size: int = 8) -> HarnessModel:
    options = ModelOptions(model_name_or_path=str(model), device="cpu", dtype="float32")
    return HarnessModel(load_for_inference(options, AdapterPathOptions()), batch_size)


def theirs(model: Path, batch_size: int = 8) -> HFLM:
    return HFLM(str(model), device="cpu", dtype="float32", batch_size=batch_size)


def compare(model: Path, folder: Path, tasks: list[str], **settings: Any) -> tuple[float, float]:
    """Seconds that each took, ours first; fails where a prompt, an answer or a score differs."""
    manager, found = find_tasks(tasks, str(folder))
    results, seconds = [], []
    for lm in (ours(model), theirs(model)):
        began = time.perf_counter()
        results.append(simple_evaluate(lm, tasks=found, task_manager=manager, bootstrap_iters=0, **settings))
        seconds.append(time.perf_counter() - began)
    for task in tasks:
        first, second = (result["samples"][task] for result in results)
        for a, b in zip(first, second, strict=True):
            assert (a["doc_id"], a["arguments"]) == (b["doc_id"], b["arguments"])
            if "acc" in a:
                a_scores, b_scores = ([float(r[0]) for r in s["filtered_resps"]] for s in (a, b))
                assert a_scores == pytest.approx(b_scores, abs=1e-3)
            else:
                assert a["filtered_resps"] == b["filtered_resps"]
        scores = [
            {key: value for key, value in result["results"][task].items() if "stderr" not in key} for result in results
        ]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    return seconds[0], seconds[1]


@pytest.mark.parametrize("num_fewshot", [pytest.param(0, marks=pytest.mark.peers), 2])
def test_tiny_model_scores_as_the_hf_class(tiny: Path, folder: Path, num_fewshot: int) -> None:
    compare(tiny, folder, ["small_choices", "small_answers"], num_fewshot=num_fewshot)


@pytest.mark.parametrize("num_fewshot", [pytest.param(0, marks=pytest.mark.peers), 2])
@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace(" | trim", "")], ids=["trims", "keeps blanks"]
)
def test_chat_template_as_the_hf_class(tiny: Path, folder: Path, template: str, num_fewshot: int) -> None:
    """Questions as turns, with answers that begin already (`gen_prefix`), which leaves the last message open."""
    rows = [{"question": f" {text} ", "choices": choices, "label": label} for text, choices, label in QUESTIONS[:6]]
    write_task(folder, "begun_choices", rows, more='gen_prefix: "The answer is "\n')
    write_task(folder, "begun_answers", rows, "generate_until", more="description: Answer briefly.\n")
    model = folder / "model"
    shutil.copytree(tiny, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    tasks = ["begun_choices", "begun_answers"]
    compare(model, folder, tasks, num_fewshot=num_fewshot, apply_chat_template=True, fewshot_as_multiturn=True)


def test_a_template_that_leaves_a_message_out(tiny: Path) -> None:
    own = ours(tiny)
    with (
        mock.patch.object(type(own._text), "render_chat", return_value="nothing"),
        pytest.raises(TemplateError, match="leaves out a message of the assistant"),
    ):
        own.apply_chat_template([{"role": "assistant", "content": "The"}], add_generation_prompt=False)


def test_odd_requests_as_the_hf_class(tiny: Path) -> None:
    """An empty context, a context that is too long, one token, a trailing blank; and texts longer than the context."""
    own, other = ours(tiny), theirs(tiny)
    assert own.max_length == other.max_length
    long = "word and word " * own.max_length
    pairs = [("", "hello there"), (long, " end"), ("a", " b"), ("blank ", "after"), ("<|im_start|>user", " hi")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for a, b in zip(
        own.loglikelihood(requests, disable_tqdm=True), other.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert a[0] == pytest.approx(b[0], abs=1e-3)
        assert a[1] == b[1]
    assert own.loglikelihood([Instance("loglikelihood", {}, ("text", ""), 0)], disable_tqdm=True) == [(0.0, True)]
    texts = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(["short text", long])]
    expected = other.loglikelihood_rolling(texts, disable_tqdm=True)
    assert own.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, rel=1e-5)


def test_command(tiny: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("evaluate", "--model_name_or_path", str(tiny), "--device", "cpu", "--include_path", str(folder))
    assert main([*common, "--tasks", "small_choices", "--limit", "4", "--output_dir", str(folder / "out")]) == 0
    assert "small_choices" in capsys.readouterr().out
    written = json.loads((folder / "out" / "eval_results.json").read_text())
    assert written["results"]["small_choices"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert len((folder / "out" / "samples_small_choices.jsonl").read_text().splitlines()) == 4
    assert main([*common, "--tasks", "small_choises"]) == 2
    assert "small_choises: there is no such task" in capsys.readouterr().err
    assert main([*common, "--tasks", "small_choices", "--dataset_path", "x.json"]) == 2
    assert "--tasks and --dataset_path" in capsys.readouterr().err


@pytest.mark.peers
@pytest.mark.timeout(600)
def test_smollm2_scores_as_the_hf_class(smollm2: Path, folder: Path) -> None:
    """Two multiple-choice tasks: which answer a SQuAD question has, and which instruction an answer is of."""
    rows_from = SHARED / "squad" / "dev.json"
    assert rows_from.is_file(), f"{rows_from} is missing: set ARRIERO_SHARED_DATA to the folder of the shared data"
    rng = random.Random(0)
    articles = json.loads(rows_from.read_text())["data"]
    paragraphs = [p for article in articles for p in article["paragraphs"]]
    paragraphs = [p for p in paragraphs if len(p["qas"]) >= 4 and len(p["context"]) < 500][:6]
    rows = []
    for paragraph in paragraphs:
        answers = list(dict.fromkeys(qa["answers"][0]["text"] for qa in paragraph["qas"] if qa["answers"]))
        for qa in paragraph["qas"][:2]:
            right = qa["answers"][0]["text"]
            choices = [right, *[a for a in answers if a != right][:3]]
            rng.shuffle(choices)
            question = f"{paragraph['context']}\nQuestion: {qa['question']}\nAnswer:"
            rows.append({"question": question, "choices": choices, "label": choices.index(right)})
    write_task(folder, "squad_choices", rows)
    seconds = compare(smollm2, folder, ["squad_choices", "small_choices"], num_fewshot=0)
    print(f"ours {seconds[0]:.1f} s, hf {seconds[1]:.1f} s")
