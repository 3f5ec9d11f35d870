"""An adapter's own tokenizer and chat template go where the adapter goes; what a bundle cannot round is said."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
from byte_models import save_byte_model
from tokenizers import Tokenizer

from arriero.cli import main
from arriero.data.tokenizer import load_tokenizer
from arriero.engine.adapter_tokenizer import with_adapters_tokenizer
from arriero.formats.side_files import read_side_files

Call = Callable[..., subprocess.CompletedProcess[str]]
TEMPLATE = "{% for message in messages %}<<{{ message['content'] }}>>{% endfor %}"
OTHER = "{% for message in messages %}[[{{ message['content'] }}]]{% endfor %}"
TINY = "__internal_testing__/tiny-random-llama"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model with a template, the adapter `lora` of PEFT beside it, which has no file of a tokenizer."""
    folder, model = save_byte_model(tmp_path / "base")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    (folder / "LICENSE").write_text("base's")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    return folder


def exported(in_process: Call, *more: str) -> tuple[Path, str]:
    told = in_process("export", "--model_path", "base", "--lora_path", "lora", "--output_path", "out", *more)
    assert told.returncode == 0, told.stderr
    return Path("out"), told.stderr


def other_vocabulary(folder: Path, tokens: int = 0) -> None:
    """A tokenizer.json whose ids run the other way, with so many tokens more."""
    value = json.loads((folder.parent / "base" / "tokenizer.json").read_text())
    vocabulary = value["model"]["vocab"]
    value["model"]["vocab"] = {token: len(vocabulary) - 1 - i for token, i in vocabulary.items()}
    backend = Tokenizer.from_str(json.dumps(value))
    backend.add_tokens([f"<{i}>" for i in range(tokens)])
    backend.save(str(folder / "tokenizer.json"))


def test_an_adapter_without_a_tokenizer_has_the_bases(base: Path, in_process: Call, tmp_path: Path) -> None:
    _, told = exported(in_process)
    assert "tokenizer" not in told
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    for name in ("tokenizer.json", "chat_template.jinja"):  # the same again
        (tmp_path / "lora" / name).write_bytes((base / name).read_bytes())
    assert "tokenizer" not in exported(in_process)[1]


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_a_template_of_the_adapters_own(base: Path, in_process: Call, tmp_path: Path, kind: str) -> None:
    (tmp_path / "lora" / "chat_template.jinja").write_text(OTHER)
    (tmp_path / "lora" / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    _, told = exported(in_process, "--format", kind)
    lines = [line for line in told.splitlines() if "tokenizer" in line]
    assert lines == ["tokenizer and chat template are those of lora, which differ from the base's: chat_template.jinja"]
    out = tmp_path / "out"
    tokenizer = load_tokenizer(out)
    assert tokenizer.chat_template == OTHER
    assert tokenizer.stop_token_ids == [7]
    assert (out / "LICENSE").read_text() == "base's"
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    if kind == "gguf":
        assert OTHER.encode() in (out / "model.gguf").read_bytes()
        return
    asked = in_process("chat", "--model_name_or_path", "out", "--prompt", "abc", "--max_new_tokens", "4")
    assert asked.returncode == 0, asked.stderr


def test_merging_takes_it_too(base: Path, in_process: Call, tmp_path: Path) -> None:
    (tmp_path / "lora" / "chat_template.jinja").write_text(OTHER)
    told = in_process("merge", "--model_name_or_path", "base", "--lora_path", "lora", "--output_path", "merged")
    assert told.returncode == 0, told.stderr
    assert "tokenizer and chat template are those of lora" in told.stderr
    assert load_tokenizer(tmp_path / "merged").chat_template == OTHER
    assert (tmp_path / "merged" / "LICENSE").read_text() == (base / "LICENSE").read_text()


def test_a_vocabulary_of_the_adapters_own(base: Path, in_process: Call, tmp_path: Path) -> None:
    """Then nothing of the base's tokenizer is left beside it."""
    (base / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    other_vocabulary(tmp_path / "lora")
    _, told = exported(in_process)
    assert "which differ from the base's: tokenizer.json, without chat_template.jinja, tokenizer_config.json\n" in told
    out, wanted = load_tokenizer(tmp_path / "out"), load_tokenizer(tmp_path / "lora")
    assert out.encode("Abc") == wanted.encode("Abc") != load_tokenizer(base).encode("Abc")
    assert out.chat_template is None


def test_a_tokenizer_that_the_model_has_no_rows_for(base: Path, in_process: Call, tmp_path: Path) -> None:
    other_vocabulary(tmp_path / "lora", tokens=3)
    _, told = exported(in_process)
    assert (
        "warning: the tokenizer of lora has 259 tokens and the model only 256 embeddings: that of the base is kept"
        in told
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_other_files_of_a_vocabulary_stay_where_it_is_the_same(base: Path, tmp_path: Path) -> None:
    """tokenizer.json is written anew by each version of a library; a SentencePiece model beside it is of use still."""
    lora = tmp_path / "lora"
    files = {**read_side_files(base), "tokenizer.model": b"pieces"}
    value = json.loads((base / "tokenizer.json").read_text())
    (lora / "tokenizer.json").write_text(json.dumps(value, indent=3))
    (lora / "tokenizer_config.json").write_text(json.dumps({"chat_template": OTHER}))
    found = with_adapters_tokenizer(files, lora, 256)
    assert found["tokenizer.model"] == b"pieces"
    assert "chat_template.jinja" not in found  # it would be read before the adapter's
    assert json.loads(found["tokenizer_config.json"]) == {"chat_template": OTHER}
    other_vocabulary(lora)
    assert "tokenizer.model" not in with_adapters_tokenizer(files, lora, 256)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json"])
def test_predict_says_that_the_adapter_has_another(base: Path, in_process: Call, tmp_path: Path, name: str) -> None:
    argv = (
        "predict",
        "--model_name_or_path",
        "base",
        "--lora_path",
        "lora",
        "--max_new_tokens",
        "2",
        "--src_length",
        "99",
    )
    (tmp_path / "rows.jsonl").write_text('{"src": "ab"}\n')
    argv = (*argv, "--data_file", "rows.jsonl")
    hint = "lora has a tokenizer or chat template of its own, which differs from the one in use: --tokenizer_name_or_path lora"
    assert hint not in in_process(*argv).stderr
    (tmp_path / "lora" / "chat_template.jinja").write_text(OTHER)
    if name == "tokenizer.json":
        other_vocabulary(tmp_path / "lora", tokens=0)
    told = in_process(*argv)
    assert told.returncode == 0, told.stderr
    assert told.stderr.count(hint) == 1
    if name == "tokenizer.json":
        assert hint not in in_process(*argv, "--tokenizer_name_or_path", "lora").stderr


def test_the_merged_model_of_a_run_has_the_runs_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path / "home"))
    (tmp_path / "train.jsonl").write_text(json.dumps({"src": "ab", "tgt": "c"}) + "\n")
    from arriero.formats.download import resolve_model

    own = tmp_path / "own"
    load_tokenizer(resolve_model(TINY)).save(own)
    (own / "chat_template.jinja").write_text(OTHER)
    argv = [
        "finetune",
        "--model_name_or_path",
        TINY,
        "--tokenizer_name_or_path",
        "own",
        "--dataset_path",
        "train.jsonl",
    ]
    argv += ["--lora", "--merge_weights", "--max_steps", "1", "--disable_tqdm", "True", "--report_to", "none"]
    assert main([*argv, "--output_dir", "run"]) == 0
    assert load_tokenizer(tmp_path / "run").chat_template == OTHER
    assert load_tokenizer(tmp_path / "run" / "merged").chat_template == OTHER


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["a8w8", "int8"])
def test_input_rounding_that_a_bundle_has_not_is_said(
    base: Path, in_process: Call, tmp_path: Path, kind: str, merged: bool
) -> None:
    assert (
        in_process("quantize", "--model_name_or_path", "base", "--output_path", "q", "--quant_type", kind).returncode
        == 0
    )
    more = ["--lora_path", "lora"] if merged else []
    told = in_process("export", "--model_path", "q", "--output_path", "out", *more)
    assert told.returncode == 0, told.stderr
    assert told.stderr.count("inputs of layers are not rounded as in q (") == (kind == "a8w8")
