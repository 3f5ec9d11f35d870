"""A real model behind the server: the examples of docs/serving.md, the harness, an answer with tools."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import Served

from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.engine.loading import LoadedModel, load_for_inference
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.shared_generation import engine_of

NAME = "smollm2-135m-instruct"
DOCS = Path(__file__).parents[2] / "docs/serving.md"
EXAMPLES = [
    block
    for block in re.findall(r"```shell\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    if block.startswith("curl")
    and "_lora_adapter" not in block  # tests/e2e/test_docs_commands.py has an adapter for it
]
# CC0: written for this test
QUESTIONS = [
    ("A mule carries", ["loads", "clouds", "rivers", "songs"], 0),
    ("Snow is", ["warm", "cold and white", "loud", "green"], 1),
    ("Fish live in", ["trees", "books", "fire", "the water"], 3),
    ("We hear with our", ["knees", "hair", "ears", "shoes"], 2),
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
"""
CHOICES = """doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]"""
ANSWERS = """doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]"""


@pytest.fixture(scope="module")
def served(smollm2: Path) -> Iterator[Served]:
    with Served(model=NAME) as server:
        yield server


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> LoadedModel:
    return load_for_inference(ModelOptions(model_name_or_path=str(smollm2), device="cpu"), AdapterPathOptions())


def test_the_docs_have_examples() -> None:
    assert len(EXAMPLES) >= 12


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{i}" for i in range(len(EXAMPLES))])
def test_an_example_of_the_docs(served: Served, example: str) -> None:
    command = example.replace("http://127.0.0.1:8011", served.url)
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    if "-sN" not in example:
        found = json.loads(result.stdout)
        assert not found.get("error"), found
        assert found.get("error_code", 0) == 0
        if "weather" in example:
            [call] = found["choices"][0]["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"]).keys() == {"city"}
        if "json_schema" in example:
            assert json.loads(found["choices"][0]["message"]["content"]).keys() == {"city", "people"}
        return
    lines = [line.removeprefix("data: ") for line in result.stdout.splitlines() if line]
    assert all("error" not in json.loads(line) for line in lines if line != "[DONE]")
    assert len(lines) > 5


def test_the_example_in_python(served: Served) -> None:
    [block] = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    program = block.replace("http://127.0.0.1:8011", served.url)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert len(result.stdout) > 10


def test_an_answer_is_that_of_the_engine_alone(served: Served, loaded: LoadedModel) -> None:
    messages: Any = [{"role": "user", "content": "Who wrote Hamlet? Answer in a word."}]
    with engine_of(loaded.model, loaded.tokenizer, max_running=1) as engine:
        [wanted] = engine.generate([loaded.tokenizer.chat(messages)], SamplingParams(max_new_tokens=24))
    with openai.OpenAI(base_url=served.api, api_key="none") as client:
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=24, temperature=0)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == ("length" if wanted.finish_reason == "length" else "stop")


def test_the_harness_scores_as_directly(
    served: Served, loaded: LoadedModel, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's local-completions (log-likelihoods by echo and token ids) and local-chat-completions."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    from arriero.training.harness import HarnessModel, find_tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": q, "choices": c, "label": label}) for q, c, label in QUESTIONS]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, kind, more in (("choices", "multiple_choice", CHOICES), ("answers", "generate_until", ANSWERS)):
        text = TASK.format(name=f"served_{name}", rows=rows, kind=kind, more=more)
        (tmp_path / f"served_{name}.yaml").write_text(text, encoding="utf-8")
    manager, found = find_tasks(["served_choices", "served_answers"], str(tmp_path))

    def score(lm: Any, task: str, **settings: Any) -> Any:
        tasks = [one for one in found if task in str(one)]
        result = simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **settings)
        return [sample["filtered_resps"] for sample in result["samples"][task]], result["results"][task]

    direct = HarnessModel(loaded, 4)
    common = {"model": NAME, "tokenizer": str(smollm2), "max_retries": 1}
    completions = LocalCompletionsAPI(base_url=f"{served.api}/completions", batch_size=4, **common)
    (wanted, wanted_scores), (got, got_scores) = score(direct, "served_choices"), score(completions, "served_choices")
    for ours, theirs in zip(wanted, got, strict=True):
        assert [float(one[0]) for one in theirs] == pytest.approx([float(one[0]) for one in ours], abs=1e-3)
        assert [bool(one[1]) for one in theirs] == [bool(one[1]) for one in ours]
    for metric in ("acc,none", "acc_norm,none"):
        assert got_scores[metric] == pytest.approx(wanted_scores[metric], abs=1e-3)
    chat = LocalChatCompletion(base_url=f"{served.api}/chat/completions", batch_size=1, **common)
    asked = {"apply_chat_template": True}
    assert score(chat, "served_answers", **asked)[0] == score(direct, "served_answers", **asked)[0]
