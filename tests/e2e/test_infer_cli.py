"""`arriero infer`: prompts and answers in a bundle's context, what a broken run leaves, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import arriero
from arriero.engine.engine import Engine
from arriero.errors import ConfigError, GenerationError
from arriero.formats.bundle_folder import is_bundle

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_models import save_byte_model

Call = Callable[..., subprocess.CompletedProcess[str]]
CONTEXT = 64


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with less context than its default answer has tokens; not to be changed."""
    from arriero.cli import main

    folder, _ = save_byte_model(tmp_path_factory.mktemp("hf"), max_position_embeddings=640)
    target = tmp_path_factory.mktemp("bundles") / "small"
    argv = ["export", "--model_path", str(folder), "--output_path", str(target), "--context", str(CONTEXT)]
    assert main(argv) == 0
    return target


def rows_in(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lengths_asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tokens of each prompt that is submitted from now on, and of its answer at most."""
    asked: list[tuple[int, int]] = []
    submit = Engine.submit

    def noting(self: Engine, prompt: Any, params: Any, **options: Any) -> Any:
        asked.append((len(prompt), params.max_new_tokens))
        return submit(self, prompt, params, **options)

    monkeypatch.setattr(Engine, "submit", noting)
    return asked


@pytest.mark.parametrize("more", [(), ("--stream",)])
def test_a_small_context_answers_by_default(
    small: Path, in_process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    asked = lengths_asked(monkeypatch)
    rows = rows_in(tmp_path, {"src": "abc"}, {"src": "abcdefgh" * 5})
    told = in_process("infer", "--model_dir", str(small), "--data_file", rows, *more)
    assert told.returncode == 0, told.stderr
    assert asked == [(3, CONTEXT - 3), (40, CONTEXT - 40)]
    assert told.stdout.startswith("2 of 2 answers have room for less than 100 tokens in the bundle's context of 64\n")


def test_a_length_that_is_told_shortens_prompts_instead(
    small: Path, in_process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = lengths_asked(monkeypatch)
    row = {"instruction": "Say it.", "input": "x" * 300, "output": ""}
    told = in_process(
        *("infer", "--model_dir", str(small), "--data_file", rows_in(tmp_path, {"src": "abc"}, row)),
        *("--max_new_tokens", "9"),
    )
    assert told.returncode == 0, told.stderr
    assert asked[0] == (3, 9)
    assert 45 <= asked[1][0] <= CONTEXT - 9
    assert asked[1][1] == 9
    assert told.stdout.startswith("1 of 2 prompts were cut to 55 tokens, for the bundle has a context of 64\n")


def test_a_prompt_that_is_cut_anyway_leaves_room(
    small: Path, in_process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = lengths_asked(monkeypatch)
    rows = rows_in(tmp_path, {"instruction": "A", "input": "x" * 300, "output": ""})
    told = in_process("infer", "--model_dir", str(small), "--data_file", rows, "--min_new_tokens", "3")
    assert told.returncode == 0, told.stderr
    assert sum(asked[0]) <= CONTEXT
    assert asked[0][1] >= CONTEXT // 2
    assert "1 of 1 prompts were cut to 32 tokens, for the bundle has a context of 64\n" in told.stdout


@pytest.mark.parametrize("more", [(), ("--stream",), ("--max_new_tokens", "5"), ("--benchmark",)])
def test_no_prompt_is_answered_before_all_fit(
    small: Path, in_process: Call, tmp_path: Path, more: tuple[str, ...]
) -> None:
    row = {"question": "q", "context": "z", "answers": ["y"]}
    rows = rows_in(tmp_path, row, row | {"answers": ["y" * 100]})
    told = in_process("infer", "--model_dir", str(small), "--data_file", rows, *more)
    assert told.returncode == 2
    assert told.stdout == ""
    assert " prompt tokens even without its context: the bundle has a context of 64" in told.stderr
    assert len(told.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--max_new_tokens", "--min_new_tokens"])
def test_answers_that_leave_no_room_for_a_prompt(small: Path, in_process: Call, option: str) -> None:
    told = in_process("infer", "--model_dir", str(small), option, "64")
    assert told.returncode == 2
    assert f"{option} 64: the bundle has a context of 64 tokens, prompts included; lower it" in told.stderr


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_finished_is_kept_when_a_run_breaks_off(
    small: Path, in_process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """One answer after the other, of which the third breaks."""
    begun: list[Any] = []
    step = Engine.step

    def breaking(self: Engine) -> list[Any]:
        answers = step(self)
        for answer in answers:
            if answer not in begun:
                begun.append(answer)
            if begun.index(answer) == 2:
                raise GenerationError("the device is gone")
        return answers

    monkeypatch.setattr(Engine, "step", breaking)
    rows = rows_in(tmp_path, *({"src": "ab" * (i + 1)} for i in range(4)))
    argv = ["infer", "--model_dir", str(small), "--data_file", rows, "--batch_size", "1", "--max_new_tokens", "3"]
    told = in_process(*argv, "--predict_file", "answers.jsonl", *(["--stream"] if stream else []))
    assert told.returncode == 2
    assert "arriero: warning: 2 of 4 prompts were answered" in told.stderr
    assert "the device is gone" in told.stderr
    assert [row["src"] for row in read_rows(tmp_path / "answers.jsonl")] == ["ab", "abab"]
    assert told.stdout.count("-" * 20) == 2
    monkeypatch.setattr(Engine, "step", step)
    whole = in_process(*argv, "--predict_file", "whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    assert read_rows(tmp_path / "answers.jsonl") == read_rows(tmp_path / "whole.jsonl")[:2]


@pytest.mark.parametrize("place", ["answers.jsonl", "more/answers.jsonl", "model.onnx", "link"])
def test_no_answers_into_a_bundle(small: Path, in_process: Call, tmp_path: Path, place: str) -> None:
    before = sorted(path.name for path in small.iterdir())
    target = small / place
    if place == "link":
        target = tmp_path / "link"
        target.symlink_to(small / "answers.jsonl")
    told = in_process("infer", "--model_dir", str(small), "--predict_file", str(target))
    assert told.returncode == 2
    assert told.stdout == ""
    assert f"--predict_file {target}: {small} is a bundle, which a file more would spoil" in told.stderr
    assert sorted(path.name for path in small.iterdir()) == before
    assert is_bundle(small)
    told = in_process("infer", "--model_dir", str(small), "--predict_file", str(small.parent / "beside.jsonl"))
    assert told.returncode == 0, told.stderr
    (small.parent / "beside.jsonl").unlink()


@pytest.mark.parametrize("more", [("--predict_file", "x.jsonl"), ("--stream",)])
def test_a_measurement_keeps_no_answers(small: Path, in_process: Call, tmp_path: Path, more: tuple[str, ...]) -> None:
    told = in_process("infer", "--model_dir", str(small), "--benchmark", *more)
    assert told.returncode == 2
    assert f"{more[0]} and --benchmark: a measurement keeps no answers; leave one of them out" in told.stderr
    assert not (tmp_path / "x.jsonl").exists()


def test_threads_have_a_bound(small: Path, in_process: Call) -> None:
    many = 4 * (os.cpu_count() or 1) + 1
    for argv in (
        ("infer", "--model_dir", str(small), "--num_threads", str(many)),
        ("bench", "--model_name_or_path", "none", "--threads", str(10**9)),
    ):
        told = in_process(*argv)
        assert told.returncode == 2
        assert f"{argv[-2]} {argv[-1]}: this machine has " in told.stderr
        assert len(told.stderr.splitlines()) == 1
    with pytest.raises(ConfigError, match=f"num_threads {many}: this machine has"):
        arriero.load_bundle(small, num_threads=many)
    assert arriero.load_bundle(small, num_threads=2).generate("a", max_new_tokens=1).text is not None


def test_prompts_that_repeat_are_computed_each(
    small: Path, in_process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight of one prompt: what is copied from another would count as computed."""
    answers: list[Any] = []
    submit = Engine.submit

    def noting(self: Engine, *arguments: Any, **options: Any) -> Any:
        answers.append(submit(self, *arguments, **options))
        return answers[-1]

    monkeypatch.setattr(Engine, "submit", noting)
    rows = rows_in(tmp_path, {"src": "abcdefgh" * 5})
    argv = ("infer", "--model_dir", str(small), "--data_file", rows, "--benchmark", "--batch_size", "8")
    told = in_process(*argv, "--max_new_tokens", "1")
    assert told.returncode == 0, told.stderr
    assert "8 prompts at once, of 320 tokens in all" in told.stdout
    assert [answer.request.cached for answer in answers] == [0] * 8 * 6
