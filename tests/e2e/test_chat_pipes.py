"""`arriero chat` that reads a pipe, and over a bundle: how it ends, how long its answers are, and what it refuses."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import arriero
from arriero.data.tokenizer import load_tokenizer
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import GenerationError

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_models import likeliest, save_byte_model

Call = Callable[..., subprocess.CompletedProcess[str]]
CONTEXT = 96  # shorter than the usual answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Without a chat template, and no token that ends an answer."""
    return save_byte_model(
        tmp_path_factory.mktemp("hf"), max_position_embeddings=CONTEXT, eos_token_id=None, bos_token_id=None
    )


@pytest.fixture(scope="module")
def bundle(model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from arriero.cli import main

    target = tmp_path_factory.mktemp("bundles") / "small"
    assert main(["export", "--model_path", str(model[0]), "--output_path", str(target)]) == 0
    return target


@pytest.fixture(params=["checkpoint", "bundle"])
def place(request: pytest.FixtureRequest, model: tuple[Path, Any], bundle: Path) -> str:
    return str(bundle if request.param == "bundle" else model[0])


def answered(model: tuple[Path, Any], text: str, tokens: int) -> str:
    """transformers' greedy answer of so many tokens."""
    tokenizer = load_tokenizer(model[0])
    return tokenizer.decode(likeliest(model[1], tokenizer.encode(text), tokens))


def test_a_message_of_a_pipe_that_cannot_be_answered_is_an_error(
    place: str, model: tuple[Path, Any], in_process: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others are answered."""
    chat = ("chat", "--model_name_or_path", place, "--device", "cpu", "--max_new_tokens", "7")
    wanted = "".join(f"{answered(model, text, 7)}\n" for text in ("ab", "cd"))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"ab\n/clear\n{'x' * 90}\n/clear\ncd\n"))
    told = in_process(*chat)
    assert (told.returncode, told.stdout) == (2, wanted)
    assert told.stderr.count("\n") == 1
    assert told.stderr.startswith("arriero: the prompt has 90 tokens and max_new_tokens is 7: together more than ")
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n/clear\ncd\n"))
    told = in_process(*chat)
    assert (told.returncode, told.stdout, told.stderr) == (0, wanted, "")


def test_the_usual_length_gives_way_to_the_context(place: str, model: tuple[Path, Any], in_process: Call) -> None:
    chat = ("chat", "--model_name_or_path", place, "--device", "cpu", "--prompt", "abc")
    told = in_process(*chat)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout == answered(model, "abc", CONTEXT - 3) + "\n"
    for length in (("--max_new_tokens", "256"), ("--min_new_tokens", "94")):  # what is told does not
        refused = in_process(*chat, *length)
        assert refused.returncode == 2
        assert "the prompt has 3 tokens and max_new_tokens is 256: together more than" in refused.stderr


@pytest.mark.parametrize("function", ["load", "load_bundle"])
def test_in_python_too(function: str, model: tuple[Path, Any], bundle: Path) -> None:
    own = arriero.load_bundle(bundle) if function == "load_bundle" else arriero.load(model[0], device="cpu")
    prompts = ["abc", "ab" * 30]
    wanted = [answered(model, text, CONTEXT - len(text)) for text in prompts]
    assert [answer.text for answer in own.generate(prompts)] == wanted
    assert own.generate(prompts[0]).text == wanted[0]
    assert "".join(own.stream(prompts[1])) == wanted[1]
    for told in ({"max_new_tokens": 256}, {"tgt_length": 256}, {"params": SamplingParams()}, {"min_new_tokens": 94}):
        with pytest.raises(GenerationError, match="max_new_tokens is 256: together more than"):
            own.generate("abc", **told)  # type: ignore[call-overload]
    with pytest.raises(GenerationError, match="together more than"):
        own.generate("a" * CONTEXT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float16"),
        ("tokenizer_name_or_path", "smollm2-135m-instruct"),
        ("use_flash_attention", "no"),
        ("use_fused_rms_norm", "no"),
        ("kv_cache_dtype", "int8"),
    ],
)
def test_what_a_bundle_decides_is_refused(
    name: str, value: str, bundle: Path, in_process: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of it is loaded; the same by `serve`."""
    monkeypatch.setattr("arriero.bundles.running.bundle_engine", lambda *_, **__: pytest.fail("it is loaded"))
    for verb in (("chat", "--prompt", "x"), ("serve",)):
        told = in_process(*verb, "--model_name_or_path", str(bundle), f"--{name}", value)
        assert told.returncode == 2
        assert told.stderr == f"arriero: --{name} {value}: a bundle decides this itself; leave it out\n"


def test_a_batch_size_is_told_to_have_no_effect(place: str, in_process: Call) -> None:
    chat = ("chat", "--model_name_or_path", place, "--device", "cpu", "--prompt", "x", "--max_new_tokens", "2")
    plain, told = in_process(*chat), in_process(*chat, "--batch_size", "5")
    assert (told.returncode, told.stdout, plain.stderr) == (0, plain.stdout, "")
    warning = "--batch_size has no effect in chat, which answers one message at a time"
    assert told.stderr == f"arriero: warning: {warning}\n"
