"""Shell completion, tried in the real shells that this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arriero.commands.completion import bash_script, fish_script, zsh_script
from arriero.commands.table import VERBS, load_verb
from arriero.config.option import specs_of


def complete(line: str, tmp_path: Path) -> set[str]:
    """What bash offers after a line typed up to its end."""
    script = tmp_path / "arriero.bash"
    script.write_text(bash_script(), encoding="utf-8")
    words = line.split(" ")
    program = (
        f"source {script}\n"
        "complete -p arriero >/dev/null || exit 9\n"
        f"COMP_WORDS=({' '.join(repr(word) for word in words)})\n"
        f"COMP_CWORD={len(words) - 1}\n"
        "_arriero\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    result = subprocess.run(["bash", "--norc", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return set(result.stdout.split())


def test_verbs(tmp_path: Path) -> None:
    assert complete("arriero ", tmp_path) == {*VERBS, "--help", "--version", "--debug"}
    assert complete("arriero pre", tmp_path) == {"preprocess", "predict", "pretrain"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_every_verb(verb: str, tmp_path: Path) -> None:
    names = {
        f"--{name}"
        for group in load_verb(verb).options
        for spec in specs_of(group)
        if not spec.positional
        for name in (spec.name, *spec.aliases)
    }
    assert complete(f"arriero {verb} --", tmp_path) == names | {"--config", "--debug", "--help"}


def test_part_of_an_option(tmp_path: Path) -> None:
    assert complete("arriero serve --fl", tmp_path) == {"--flask_port"}


def test_values(tmp_path: Path) -> None:
    assert complete("arriero pretrain --lr_scheduler_type co", tmp_path) == {
        "cosine",
        "constant",
        "constant_with_warmup",
    }
    assert complete("arriero pretrain --fp16 ", tmp_path) == {"yes", "no"}
    assert complete("arriero completion ", tmp_path) == {"bash", "zsh", "fish"}


def test_files_where_the_value_is_free(tmp_path: Path) -> None:
    (tmp_path / "model-a").mkdir()
    (tmp_path / "other").mkdir()
    assert complete("arriero serve --model_name_or_path mo", tmp_path) == {"model-a"}


def test_launch_completes_the_verb_behind_it(tmp_path: Path) -> None:
    assert complete("arriero launch ser", tmp_path) == {"serve"}
    assert complete("arriero launch --gpus 0,1 serve --fl", tmp_path) == {"--flask_port"}
    assert complete("arriero launch --gp", tmp_path) == {"--gpus"}


def test_the_command_prints_the_script() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for shell, script in (("bash", bash_script()), ("zsh", zsh_script()), ("fish", fish_script())):
        line = [sys.executable, "-m", "arriero", "completion", shell]
        result = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        assert result.stdout == script


@pytest.mark.parametrize(("shell", "script"), [("zsh", zsh_script), ("fish", fish_script)])
def test_the_other_shells_accept_theirs(shell: str, script: object, tmp_path: Path) -> None:
    text = script()  # type: ignore[operator]
    for verb in VERBS:
        assert verb in text
    assert text.count("flask_port") >= 1
    if shutil.which(shell) is None:
        return  # its text is checked above; its syntax only where the shell is installed
    path = tmp_path / "script"
    path.write_text(text, encoding="utf-8")
    subprocess.run([shell, "-n", str(path)], check=True, capture_output=True)
