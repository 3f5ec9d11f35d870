"""Every shell block of README and docs: the real parser takes its options; it is run here, or a table says why not."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from doc_commands import PAGES, ROOT, Command, blocks, commands
from random_adapter import write_adapter
from served import Served

from arriero.adapters.lora import LoRAConfig
from arriero.commands.launch import LaunchOptions, check_command
from arriero.commands.table import load_verb
from arriero.config.parser import parse
from arriero.errors import ConfigError
from arriero.formats.download import resolve_model

ALL = [command for path in PAGES for command in commands(path)]
TINY = "__internal_testing__/tiny-random-llama"
SMOLLM2 = "smollm2-135m-instruct"

# README's commands that are run here, in its order, with the tiny model in the place of SmolLM2 and these options after their
# own (the last one counts). Pages of the verbs: their examples were run when they were recorded (docs/make_verbs.py).
RUN = (
    r"arriero download smollm2-135m-instruct --output_dir",
    r"arriero convert model.gguf ",
    r"arriero convert models/smollm2 --output_dir",
    r"arriero preprocess .*tinyshakespeare",
    r"arriero pretrain --config configs/pretrain/shakespeare-char-cpu",
    r"arriero pretrain .*--continue_training",
    r"arriero plan --config configs/pretrain/llama-1.3b",
    r"arriero finetune .*--output_dir runs/(mine|squad|full) ",
    r"arriero finetune --config configs/finetune/(prefix|qat-w4|dpo)",
    r"arriero quantize .*gptq",
    r"arriero finetune --preview",
    r"arriero finetune --config runs/mine/config.yaml",
    r"arriero evaluate .*runs/squad",
    r"arriero predict .*questions",
    r"arriero merge .*models/mine",
    r"arriero chat .*--prompt",
)
MORE_OPTIONS = {
    "download": (),
    "convert": (),
    "preprocess": (),
    "plan": (),
    "pretrain": (
        "--max_steps",
        "2",
        "--warmup_steps",
        "0",
        "--max_seq_length",
        "32",
        "--eval_iters",
        "1",
        "--device",
        "cpu",
    ),
    "finetune": ("--max_steps", "2", "--src_length", "96", "--tgt_length", "16", "--device", "cpu"),
    "quantize": ("--calibration_length", "16", "--device", "cpu"),
    "evaluate": ("--max_new_tokens", "2", "--device", "cpu"),
    "predict": ("--max_new_tokens", "2", "--device", "cpu"),
    "merge": ("--device", "cpu"),
    "chat": ("--max_new_tokens", "2", "--device", "cpu"),
}
# Why a command is not run here; each pattern is searched in "PAGE: COMMAND".
OTHER_PROGRAMS = r"pip|make|srun|docker|openssl|export|curl|python|\.venv/bin/(python|torchrun|pip)|\.ci/run"
LARGE = r"facebook/llama-7b|meta-llama|configs/pretrain/llama|llama-3|HuggingFaceTB"
OTHER_SHAPES = r"q4_k|model-q4|smollm2-q4|paddle/|lora\.gguf|qlora|models/plain|inspect model\.gguf"
ALIKE = "generation|finetuning|merging|methods|pretraining|quantization|tutorial|from-transformers"
NOT_RUN = {
    r"^docs/verbs/.*: ": "an example that was run when it was recorded: docs/make_verbs.py --record",
    r"\.\.\.": "a fragment: options are left out",
    rf": ({OTHER_PROGRAMS})\b": "no verb of arriero",
    r"^README\.md: \.venv/bin/arriero": "as the recipes that follow in README",
    r"--gpus|--nnodes": "needs several GPUs; tests/distributed run their layouts on CPUs",
    LARGE: "a model of gigabytes; tests/unit/test_seed_commands.py, test_plan_*.py",
    r"arriero plan .*(smollm2-135m |405b)": "tests/e2e/test_plan_cli.py plans many",
    r"arriero upload": "writes to the Hub; tests/e2e/test_hub_cli.py has one of its own",
    r"--tasks": "needs task files; tests/parity/test_harness.py",
    r"arriero serve": "runs until it is stopped; tests/e2e/test_serve_*.py start it in these ways",
    r"arriero (export|infer)|arriero chat .*inference": "tests/e2e/test_export_cli.py",
    r"arriero bench": "takes minutes; tests/e2e/test_bench_cli.py",
    r"arriero launch --nproc_per_node 2": "several processes; tests/distributed",
    OTHER_SHAPES: "the tiny model has another shape; tests/e2e/test_convert_*.py, tests/parity/test_gguf_*.py",
    r"arriero chat .*(--system|--temperature)": "waits for a person; tests/e2e/test_chat_cli.py is one",
    r"arriero quickstart": "takes minutes: `make quickstart`; tests/unit/test_quickstart_data.py",
    rf"^docs/({ALIKE})\.md|^configs/README": "as README's, on other folders",
}


def reason(command: Command) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, str(command))), None)


def is_run(command: Command) -> bool:
    return command.page == "README.md" and any(re.match(pattern, command.text) for pattern in RUN)


def substitute(words: tuple[str, ...]) -> list[str]:
    return [word.replace(SMOLLM2, TINY) for word in words]


@pytest.mark.parametrize("command", [command for command in ALL if command.verb is not None], ids=str)
def test_options_are_those_of_the_verb(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    verb, *words = command.arguments
    fragment = "..." in words
    words = [re.sub(r"^\$\w+$", "7", word) for word in words]  # a variable of the shell
    before = ["", *words][: len(words)]
    kept = [word for word, last in zip(words, before, strict=True) if word != "..." or last == "--model_name_or_path"]
    if "--config" in kept and not (ROOT / kept[kept.index("--config") + 1]).is_file():  # of a run that is not there
        where = kept.index("--config")
        assert kept[where + 1].endswith((".yaml", ".json"))
        del kept[where : where + 2]
        fragment = True
    with pytest.raises(ConfigError, match="must be given") if fragment else contextlib.nullcontext():
        groups = parse(load_verb(verb).options, kept, f"arriero {verb}", warn=False)
        if verb == "launch":
            (launch,) = groups
            assert isinstance(launch, LaunchOptions)
            check_command(launch)
        if fragment:  # all that must be given is
            raise ConfigError("nothing must be given")


@pytest.mark.parametrize("command", [command for command in ALL if command.verb is None], ids=str)
def test_other_commands_name_what_is_there(command: Command) -> None:
    first = command.words[0]
    if first == "make":
        targets = {
            word for line in (ROOT / "Makefile").read_text().splitlines() for word in re.findall(r"^([a-z-]+):", line)
        }
        assert command.words[1] in targets
    elif first.endswith(("python", "torchrun")):
        program = next(word for word in command.words if word.endswith(".py"))
        assert (ROOT / program).is_file()
    elif first.endswith("pip"):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extras in re.findall(r"\[([\w,-]+)\]", command.text):
            assert set(extras.split(",")) <= known.keys()
        for name in re.findall(r"(?:-r|-c|--constraint) (\S+)", command.text):
            assert (ROOT / name).is_file()
    elif first == "curl":
        body = command.words[command.words.index("-d") + 1] if "-d" in command.words else "{}"
        assert isinstance(json.loads(body), dict)
    elif first == "docker":
        assert (ROOT / command.words[command.words.index("--file") + 1]).is_file()
    else:
        assert first in ("srun", "openssl", "export", ".ci/run"), f"say here how {command} is checked"


def test_every_command_is_run_or_says_why_not() -> None:
    assert [str(command) for command in ALL if not is_run(command) and reason(command) is None] == []
    assert [
        pattern for pattern in RUN if not any(re.match(pattern, c.text) for c in ALL if c.page == "README.md")
    ] == []
    told = [str(command) for command in ALL if not is_run(command)]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, text) for text in told)] == []


def test_no_block_hides_from_this_test() -> None:
    for path in PAGES:
        hidden = blocks(path.read_text(encoding="utf-8"), ("console", "zsh", "shell-session", "terminal"))
        assert not hidden, f"{path}: call these blocks shell"


@pytest.fixture
def workshop(tmp_path: Path, in_process: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """A folder with what a reader of README has: rows, texts, questions, a GGUF file."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    chat = [{"role": "user", "content": "Capital of Peru?"}, {"role": "assistant", "content": "Lima."}]
    question = {"context": "The bridge opened in 1937.", "answers": {"text": ["1937"], "answer_start": [21]}}
    paragraphs = [
        {
            "context": question["context"],
            "qas": [{"id": "a", "question": "When?", "answers": [{"text": "1937", "answer_start": 21}]}],
        }
    ]
    for folder in ("my_data", "squad", "my_corpus"):
        (tmp_path / folder).mkdir()
    for part in ("train", "dev"):
        (tmp_path / f"my_data/{part}.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 4)
        squad = {"version": "1.1", "data": [{"title": "Bridge", "paragraphs": paragraphs * 4}]}
        (tmp_path / f"squad/{part}.json").write_text(json.dumps(squad))
    (tmp_path / "questions.jsonl").write_text('{"src": "The sky is"}\n{"src": "A mule is"}\n')
    pair = {"prompt": "The sky is", "chosen": "blue", "rejected": "wet"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 4)
    text = "\n\n".join(f"First Citizen:\nBefore we proceed any further, hear me speak {i}." for i in range(400))
    for name in ("tinyshakespeare.txt", "text.txt"):
        (tmp_path / name).write_text(text)
    made = [
        in_process("convert", TINY, "model.gguf"),
        in_process(
            *("preprocess", "--model_name_or_path", TINY, "--input_path", "text.txt"),
            *("--output_prefix", "my_corpus/text", "--append_eos"),
        ),
    ]
    assert [result.returncode for result in made] == [0, 0], made
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_readme_from_top_to_bottom(workshop: Path, in_process: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = 0
    for command in [command for command in ALL if is_run(command)]:
        verb, *words = substitute(command.arguments)
        result = in_process(verb, *words, *MORE_OPTIONS[verb], cwd=workshop)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        done += 1
    assert done >= len(RUN)
    assert (workshop / "models/mine/model.safetensors").is_file()
    assert len((workshop / "answers.jsonl").read_text().splitlines()) == 2


def test_the_requests_of_serving_are_answered(tmp_path: Path) -> None:
    """Each `curl` of docs/serving.md, sent to a server of the tiny model that bears SmolLM2's name."""
    pytest.importorskip("fastapi")
    asked = [command for command in ALL if command.page == "docs/serving.md" and command.words[0] == "curl"]
    write_adapter(Path(resolve_model(TINY)), tmp_path / "sql", LoRAConfig(rank=2, alpha=4.0))
    with Served("--served_model_name", SMOLLM2, "--adapter_folder", str(tmp_path)) as server:
        for command in asked:
            url = next(word for word in command.words if word.startswith("http"))
            body = command.words[command.words.index("-d") + 1].encode() if "-d" in command.words else None
            request = urllib.request.Request(url.replace("http://127.0.0.1:8011", server.url), body)
            if body is not None:
                request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as answer:
                content = answer.read().decode()
            if '"stream": true' not in command.text and command.words[1] != "-sN":
                assert isinstance(json.loads(content), dict), command
            else:
                assert content.strip(), command
    assert len(asked) > 5
