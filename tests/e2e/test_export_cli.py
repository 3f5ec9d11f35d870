"""`arriero export`, `infer` and `chat` with a bundle: the seed's commands, without torch, and what can go wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import onnx
import peft
import pytest
import torch

from arriero.commands.prompt_rows import read_prompts
from arriero.data.prompt_tokens import fit_prompt
from arriero.data.tokenizer import load_tokenizer
from arriero.export.bundle import MANIFEST
from arriero.formats.detection import detect
from arriero.formats.gguf.tensor_types import KINDS
from arriero.formats.opening import open_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))
from byte_models import likeliest, save_byte_model  # noqa: E402

Call = Callable[..., subprocess.CompletedProcess[str]]
SOURCE = Path(__file__).parents[2] / "src"
ROOM = {"max_position_embeddings": 640}
BAR = "-" * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return save_byte_model(tmp_path_factory.mktemp("hf"), **ROOM)


@pytest.fixture(scope="module")
def exported(model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle; not to be changed."""
    from arriero.cli import main

    target = tmp_path_factory.mktemp("bundles") / "inference" / "llama"
    assert main(["export", "--model_path", str(model[0]), "--output_path", str(target)]) == 0
    return target


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """One of the test's own."""
    return Path(shutil.copytree(exported, tmp_path / "inference" / "llama"))


def seed_commands(base: Path) -> dict[str, list[str]]:
    """The seed's commands of export and inference, verbatim but for the script's name and the model's."""
    found = {}
    for block in (FIXTURES / "seed_commands.txt").read_text(encoding="utf-8").strip().split("\n\n"):
        words = shlex.split(re.sub(r"\\?\n\s*", " ", block))
        if words[1] in ("export_generation_model.py", "infer_generation.py"):
            verb = words[1].partition("_")[0]
            name = verb if "--lora_path" not in words else "export lora"
            found[name] = [verb, *(str(base) if word == "facebook/llama-7b" else word for word in words[2:])]
    return found


def answers_in(output: str) -> list[str]:
    """What `infer` printed under each of its prompts."""
    blocks = output.split(f"\n{BAR}\n")[:-1]
    prompts = [sample.prompt for sample in read_prompts(None)]
    assert len(blocks) == len(prompts)
    assert all(block.startswith(f"{prompt}\n") for block, prompt in zip(blocks, prompts, strict=True))
    return [block[len(prompt) + 1 :] for block, prompt in zip(blocks, prompts, strict=True)]


def wanted_answers(folder: Path, answer: Callable[[list[int]], list[int]]) -> list[str]:
    tokenizer = load_tokenizer(folder)
    prompts = [fit_prompt(sample, tokenizer, 1024)[0] for sample in read_prompts(None)]
    return [tokenizer.decode(answer(prompt)).strip() for prompt in prompts]


def randomise(adapted: Any, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def test_the_seeds_commands(in_process: Call, tmp_path: Path, model: tuple[Path, Any]) -> None:
    commands = seed_commands(model[0])
    assert commands.keys() == {"export", "export lora", "infer"}
    shutil.copytree(model[0], tmp_path / "checkpoints")
    made = in_process(*commands["export"])
    assert made.returncode == 0, made.stderr
    assert "of 96 likeliest tokens 100.0% are the same\ninference/llama: onnx, fp32, " in made.stdout
    told = in_process(*commands["infer"])
    assert told.returncode == 0, told.stderr
    assert answers_in(told.stdout) == wanted_answers(model[0], lambda ids: likeliest(model[1], ids, 100))


def test_the_seeds_commands_with_an_adapter(in_process: Call, tmp_path: Path) -> None:
    folder, theirs = save_byte_model(tmp_path / "base", **ROOM)
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    randomise(adapted, 0.1)
    adapted.save_pretrained(tmp_path / "checkpoints")
    commands = seed_commands(folder)
    in_process(*commands["export lora"])
    told = in_process(*commands["infer"])
    assert told.returncode == 0, told.stderr
    assert answers_in(told.stdout) == wanted_answers(folder, lambda ids: likeliest(adapted.eval(), ids, 100))


def test_a_prefix(in_process: Call, tmp_path: Path) -> None:
    """It comes out as `predict` computes it, which test_prefix_peft.py compares with PEFT."""
    folder, theirs = save_byte_model(tmp_path / "base", **ROOM)
    prefixed = peft.get_peft_model(theirs, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
    randomise(prefixed, 0.7)
    prefixed.save_pretrained(tmp_path / "checkpoints")
    export = ["export", "--model_path", str(folder), "--prefix_path", "checkpoints", "--output_path"]
    made = in_process(*export, "inference/llama", "--tgt_length", "30")
    assert made.returncode == 0, made.stderr
    told = in_process("infer", "--model_dir", "inference", "--predict_file", "answers.json")
    in_process(*("predict", "--model_name_or_path", str(folder), "--prefix_path", "checkpoints"), "--tgt_length", "30")
    rows = [(tmp_path / name).read_text() for name in ("answers.json", "prediction.json")]
    assert rows[0] == rows[1]
    assert answers_in(told.stdout.partition("2 answers")[0]) == [
        json.loads(row)["output"] for row in rows[0].splitlines()
    ]
    refused = in_process(*export, "inference/gguf", "--format", "gguf")
    assert refused.returncode == 2
    assert "a GGUF file holds no prefix; use --format onnx" in refused.stderr


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        package = name.split(".")[0]
        if package in ("torch", "onnx", "transformers", "safetensors") or name.startswith("arriero.models"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from arriero.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["infer", "--model_dir", "."],
        ["infer", "--model_dir", ".", "--stream"],
        ["infer", "--model_dir", ".", "--do_sample", "--seed", "4", "--top_p", "0.9", "--max_new_tokens", "20"],
        ["infer", "--model_dir", ".", "--data_file", "rows.jsonl", "--batch_size", "2"],
        ["infer", "--model_dir", ".", "--benchmark", "--max_new_tokens", "3"],
        ["chat", "--model_name_or_path", ".", "--prompt", "hello", "--max_new_tokens", "9"],
    ],
    ids=lambda words: " ".join(words[3:5]) or words[0],
)
def test_it_runs_where_torch_and_the_models_cannot_be_imported(
    bundle: Path, in_process: Call, tmp_path: Path, arguments: list[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"src": "ab" * (i + 1)}) + "\n" for i in range(5)))
    arguments = [str(rows) if word == "rows.jsonl" else word for word in arguments]
    told = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments],
        cwd=bundle, env={"PYTHONPATH": str(SOURCE), "PATH": os.environ["PATH"]}, capture_output=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr.decode()
    if "--benchmark" not in arguments:
        assert told.stdout.decode() == in_process(*arguments, cwd=bundle).stdout
    assert len(told.stdout.splitlines()) >= (1 if arguments[0] == "chat" else 3)


def test_a_stream_and_a_batch_say_the_same(exported: Path, in_process: Call) -> None:
    plain = in_process("infer", "--model_dir", str(exported), "--max_new_tokens", "25")
    streamed = in_process("infer", "--model_dir", str(exported), "--max_new_tokens", "25", "--stream")
    assert [a.strip() for a in answers_in(streamed.stdout)] == answers_in(plain.stdout)
    assert plain.stdout == in_process("infer", "--model_dir", str(exported.parent), "--max_new_tokens", "25").stdout


def test_the_bundle_says_how_long_answers_are(in_process: Call, tmp_path: Path, model: tuple[Path, Any]) -> None:
    in_process("export", "--model_path", str(model[0]), "--output_path", "short", "--max_new_tokens", "3")
    generation = json.loads((tmp_path / "short" / MANIFEST).read_text())["generation"]
    assert generation["max_new_tokens"] == 3
    told = in_process("infer", "--model_dir", "short")
    assert answers_in(told.stdout) == wanted_answers(model[0], lambda ids: likeliest(model[1], ids, 3))
    cut = in_process("infer", "--model_dir", "short", "--src_length", "200")
    assert cut.stdout.startswith("2 of 2 prompts were cut to --src_length 200\n")


def test_chat_with_a_bundle(exported: Path, in_process: Call, model: tuple[Path, Any]) -> None:
    arguments = ("--prompt", "hello there", "--max_new_tokens", "12")
    with_bundle = in_process("chat", "--model_name_or_path", str(exported), *arguments)
    with_model = in_process("chat", "--model_name_or_path", str(model[0]), "--device", "cpu", *arguments)
    assert with_bundle.returncode == 0, with_bundle.stderr
    assert with_bundle.stdout == with_model.stdout


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_a_gguf_bundle_is_the_file_of_llama_cpp(
    in_process: Call, tmp_path: Path, model: tuple[Path, Any], weights: str
) -> None:
    arguments = ("--format", "gguf", "--weights", weights, "--output_path", "inference/llama")
    made = in_process("export", "--model_path", str(model[0]), *arguments)
    assert made.returncode == 0, made.stderr
    with open_model(detect(tmp_path / "inference" / "llama" / "model.gguf")) as source:
        for name, stored in source.tensors.items():
            original = model[1].state_dict()[name]
            value = stored if isinstance(stored, torch.Tensor) else stored.load()
            error = float((value.float() - original).norm() / original.norm())
            assert error < {"fp16": 1e-3, "int8": 1e-2, "int4": 0.12}[weights]
    refused = in_process("infer", "--model_dir", "inference")
    assert refused.returncode == 2
    assert "is a bundle of the kind gguf, for llama.cpp" in refused.stderr


def test_a_gguf_file_becomes_an_onnx_bundle(in_process: Call, tmp_path: Path, model: tuple[Path, Any]) -> None:
    """A model of any format can be exported."""
    in_process("convert", str(model[0]), "model.gguf", "--dtype", "float32")
    made = in_process("export", "--model_path", "model.gguf", "--output_path", "inference/llama")
    assert made.returncode == 0, made.stderr
    told = in_process("infer", "--model_dir", "inference")
    own = tmp_path / "inference" / "llama"  # GGUF makes the token of bos, here a byte, one without text
    assert answers_in(told.stdout) == wanted_answers(own, lambda ids: likeliest(model[1], ids, 100))


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("q4_1", "int4, with zero points and offsets, blocks of 32; "),
        ("q8_0", "int8, symmetric, blocks of 32; "),
        ("f16", "fp32"),
    ],
)
def test_a_gguf_file_of_few_bits_stays_one(
    in_process: Call, tmp_path: Path, model: tuple[Path, Any], kind: str, weights: str
) -> None:
    in_process("convert", str(model[0]), "model.gguf", "--gguf_type", kind)
    made = in_process(
        "export", "--model_path", "model.gguf", "--output_path", "inference/llama", "--accuracy_level", "0"
    )
    if weights == "fp32":
        made = in_process("export", "--model_path", "model.gguf", "--output_path", "inference/llama")
    assert made.returncode == 0, made.stderr
    manifest = json.loads((tmp_path / "inference" / "llama" / MANIFEST).read_text())
    assert manifest["weights"].startswith(weights)
    assert manifest["check"]["original_difference"] < {"q4_1": 0.05, "q8_0": 2e-3, "f16": 1e-4}[kind]


def test_a_gguf_file_of_mixed_types_keeps_the_wider_ones(
    in_process: Call, tmp_path: Path, model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "q4_1", replace(KINDS["q4_1"], mix="M"))
    in_process("convert", str(model[0]), "model.gguf", "--gguf_type", "q4_1")
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    wide = {name for name, kind in stored.items() if name.startswith("blk.") and kind == "Q8_0"}
    assert "blk.1.ffn_down.weight" in wide
    made = in_process(
        "export", "--model_path", "model.gguf", "--output_path", "inference/llama", "--accuracy_level", "0"
    )
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "inference" / "llama"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert f" ({len(wide)} of its matrices int8, symmetric, blocks of 32); " in manifest["weights"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    bits = {node.name: part.i for node in graph.node for part in node.attribute if part.name == "bits"}
    for layer in range(2):
        assert bits[f"model.layers.{layer}.mlp.down_proj"] == (8 if f"blk.{layer}.ffn_down.weight" in wide else 4)
        assert bits[f"model.layers.{layer}.self_attn.qkv_proj"] == (8 if f"blk.{layer}.attn_v.weight" in wide else 4)
        assert bits[f"model.layers.{layer}.mlp.gate_up_proj"] == 4


def edited(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(values | changes))


def spoil_weights(folder: Path) -> None:
    with (folder / "weights.bin").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x01")


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited weights": (spoil_weights, "weights.bin: is not what was written (its SHA-256 differs)"),
    "half-written": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json: cannot be read"),
    "cut": (lambda folder: os.truncate(folder / "model.onnx", 100), "model.onnx: has 100 bytes, and "),
    "missing": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "newer arriero": (lambda folder: edited(folder, format=2), "is of format 2, and this version of arriero reads 1"),
    "newer runtime": (
        lambda folder: edited(folder, versions={"onnxruntime": "99.0.0"}),
        "is made for onnxruntime 99.0.0, and ",
    ),
    "other kind": (
        lambda folder: edited(folder, kind="tensorrt"),
        "the kind 'tensorrt' is not known; known are onnx",
    ),
    "other processor": (lambda folder: edited(folder, isa="sparc"), "of the kind sparc"),
    "other device": (lambda folder: edited(folder, device="cuda"), "is made for 'cuda', and onnx bundles run on cpu"),
    "another prefix": (lambda folder: edited(folder, prefix_length=4), "prefix.npy: cannot be read"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_bundle_that_is_not_as_it_was_written(bundle: Path, in_process: Call, name: str) -> None:
    spoil, text = SPOILED[name]
    spoil(bundle)
    for arguments in (
        ["infer", "--model_dir", "inference"],
        ["chat", "--model_name_or_path", str(bundle), "--prompt", "x"],
    ):
        if arguments[0] == "chat" and name == "half-written":
            continue  # it is no bundle then, and no model either
        told = in_process(*arguments)
        assert told.returncode == 2, told.stderr
        assert text in told.stderr
        assert len(told.stderr.splitlines()) == 1
        assert told.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["infer", "--model_dir", "nowhere"], "nowhere: holds no bundle, nor is there one in nowhere/llama"),
        (["infer", "--model_dir", "MODEL"], "is a model and no bundle: make one with `arriero export --model_path"),
        (["infer", "--model_dir", "BUNDLE", "--device", "gpu"], "is made for cpu; leave it out"),
        (
            ["infer", "--model_dir", "BUNDLE", "--max_new_tokens", "640"],
            "has a context of 640 tokens, prompts included",
        ),
        (["infer", "--model_dir", "BUNDLE", "--data_file", "none.jsonl"], "none.jsonl"),
        (["chat", "--model_name_or_path", "BUNDLE", "--lora_path", "x"], "is a bundle, whose weights are fixed"),
        (["chat", "--model_name_or_path", "BUNDLE", "--kv_cache_dtype", "int8"], "a bundle decides this itself"),
        (["chat", "--model_name_or_path", "BUNDLE", "--torch_compile"], "which is what it was compiled to"),
        (["chat", "--model_name_or_path", "BUNDLE", "--device", "gpu"], "is made for cpu; leave it out"),
        (
            ["predict", "--model_name_or_path", "BUNDLE", "--device", "cpu"],
            "is a bundle of arriero export, which infer",
        ),
        (["export", "--model_path", "BUNDLE"], "is a bundle already: give the model it was made from"),
        (["export", "--model_path", "nowhere"], "nowhere"),
        (["export", "--model_path", "MODEL", "--output_path", "used"], "used: holds other files (mine.txt)"),
        (
            ["export", "--model_path", "MODEL", "--weights", "int4", "--block_size", "48"],
            "blocks of 48 are not supported",
        ),
        (["export", "--model_path", "MODEL", "--block_size", "64"], "block_size is for int8 and int4 weights"),
        (["export", "--model_path", "MODEL", "--context", "641"], "a context of 641 cannot be exported"),
        (["export", "--model_path", "MODEL", "--dtype", "bfloat16"], "--weights bf16 is for torch, aoti and gguf"),
        (["export", "--model_path", "MODEL", "--dtype", "fp16", "--weights", "int8"], "say two things"),
        (["export", "--model_path", "MODEL", "--device", "gpu"], "are made for CPUs; leave it out"),
        (["export", "--model_path", "MODEL", "--lora_path", "x", "--merge_weights", "no"], "holds one set of weights"),
        (
            ["export", "--model_path", "MODEL", "--format", "gguf", "--block_size", "64"],
            "--block_size is not for --format gguf",
        ),
        (["export", "--model_path", "MODEL", "--format", "vulkan"], "vulkan"),
        (["export", "--model_path", "MODEL", "--format", "torch", "--weights", "int4"], "is for onnx, aoti and gguf"),
        (
            ["export", "--model_path", "MODEL", "--format", "torch", "--head_bits", "4"],
            "--head_bits is not for --format torch",
        ),
        (
            ["export", "--model_path", "MODEL", "--format", "aoti", "--weights", "int4", "--block_size", "64"],
            "--block_size is not for --format aoti",
        ),
        (
            ["export", "--model_path", "MODEL", "--format", "aoti", "--weights", "int8", "--device", "gpu"],
            "--weights int8 is for CPUs: a bundle for a GPU has fp32, fp16 or bf16",
        ),
        (
            ["export", "--model_path", "MODEL", "--output_path", "q/x.gguf", "--format", "gguf"],
            "name a folder, such as q/x; the file alone is made by `arriero convert ",
        ),
        (["export", "--model_path", "MODEL", "--output_path", "x.ONNX"], "a bundle is a folder"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(
    exported: Path, model: tuple[Path, Any], in_process: Call, tmp_path: Path, arguments: list[str], text: str
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    places = {"BUNDLE": str(exported), "MODEL": str(model[0])}
    told = in_process(*(places.get(word, word) for word in arguments))
    assert told.returncode == 2, told.stdout
    assert text in told.stderr
    assert len([line for line in told.stderr.splitlines() if "warning" not in line]) == 1
    assert not any((tmp_path / place).exists() for place in ("inference", "q", "x.ONNX"))
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]


def test_what_a_kind_lacks_names_one_that_has_it(in_process: Call, tmp_path: Path) -> None:
    folder, _ = save_byte_model(tmp_path / "hf", hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    refused = in_process("export", "--model_path", str(folder))
    assert refused.returncode == 2
    assert "a head_dim of 8 cannot be exported to onnx" in refused.stderr
    assert "export gguf" in refused.stderr
    assert in_process("export", "--model_path", str(folder), "--format", "gguf").returncode == 0


def test_an_adapter_is_no_model(in_process: Call, tmp_path: Path, model: tuple[Path, Any]) -> None:
    adapted = peft.get_peft_model(save_byte_model(tmp_path / "hf")[1], peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "lora")
    refused = in_process("export", "--model_path", "lora")
    assert refused.returncode == 2
    assert "lora is an adapter and no model" in refused.stderr
    assert "`arriero export --model_name_or_path BASE --lora_path lora`" in refused.stderr


def test_a_model_without_a_tokenizer_and_a_bundle_in_the_place(
    in_process: Call, tmp_path: Path, model: tuple[Path, Any]
) -> None:
    copied = Path(shutil.copytree(model[0], tmp_path / "copy"))
    argv = ("export", "--model_path", str(copied), "--output_path", str(tmp_path / "made"))
    assert "in place of" not in in_process(*argv).stdout
    assert "MB, in place of the bundle that was there\n" in in_process(*argv).stdout
    shutil.rmtree(tmp_path / "made")
    template = copied / "chat_template.jinja"
    template.write_text("{% for x in %}")
    assert "warning: chat and serve will not work with this bundle: its chat template fails" in in_process(*argv).stdout
    template.unlink()
    shutil.rmtree(tmp_path / "made")
    whole = (copied / "tokenizer.json").read_text()
    values = json.loads(whole)
    token = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    values["added_tokens"].append({**token, "id": 10**6, "content": "<beyond>"})
    for content, said in ((whole[:2000], "tokenizer.json: not a tokenizer"), (json.dumps(values), "another model")):
        (copied / "tokenizer.json").write_text(content)
        refused = in_process(*argv)
        assert refused.returncode == 2
        assert said in refused.stderr
        assert not (tmp_path / "made").exists()
    (copied / "tokenizer.json").unlink()
    refused = in_process(*argv)
    assert refused.returncode == 2
    assert "has neither tokenizer.json nor tokenizer.model, and a bundle needs a tokenizer" in refused.stderr
    assert not (tmp_path / "made").exists()
