"""What a run that is resumed must have in common with its checkpoint, besides its data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from arriero.cli import main
from arriero.errors import ConfigError
from arriero.formats import fingerprint, hf
from arriero.formats.tiny_model import tiny_tokenizer_files
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes
from arriero.training.agreement import check_same_weights

CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = LlamaForCausalLM(CONFIG)
    model.init_weights(1)
    hf.save_model(model, CONFIG, tmp_path / "base")
    for name, content in tiny_tokenizer_files().items():
        (tmp_path / "base" / name).write_bytes(content)
    rows = [{"src": f"what follows {n} ?", "tgt": str(n + 1)} for n in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "base"


def finetuned(model: Path, folder: Path, *flags: str) -> int:
    command = ["finetune", "--model_name_or_path", str(model), "--dataset_path", str(folder.parent / "train.jsonl")]
    command += [
        "--output_dir",
        str(folder),
        "--do_train",
        "--max_steps",
        "4",
        "--save_steps",
        "2",
        "--report_to",
        "none",
    ]
    command += ["--learning_rate", "1e-2", "--logging_steps", "1", "--disable_tqdm", "True"]
    return main([*command, "--per_device_train_batch_size", "4", *flags])


def last_loss(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return float(next(line["loss"] for line in reversed(lines) if "loss" in line))


def resumed(folder: Path) -> tuple[str, str]:
    return "--resume_from_checkpoint", str(folder / "checkpoint-2")


def test_another_base_or_optimizer_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetuned(base, tmp_path / "run", "--lora") == 0
    model = hf.load_model(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    hf.save_model(model, CONFIG, tmp_path / "other", extra_files_from=base)
    for folder, flags, reason in (
        (tmp_path / "other", (), "was trained on another base model"),
        (base, ("--qlora",), "was trained with --quantize_base none and this run has nf4"),
        (base, ("--optim", "lion"), "was trained with --optim adamw and this run has lion"),
        (base, ("--optim", "sgd"), "was trained with --optim adamw and this run has sgd"),
    ):
        assert finetuned(folder, tmp_path / "refused", "--lora", *flags, *resumed(tmp_path / "run")) == 2
        assert reason in capsys.readouterr().err
    assert not list((tmp_path / "refused").glob("checkpoint-*"))


def test_a_copy_of_the_base_and_adamw_with_8_bit_moments_are_the_same(base: Path, tmp_path: Path) -> None:
    assert finetuned(base, tmp_path / "run", "--lora") == 0
    hf.save_model(hf.load_model(base), CONFIG, tmp_path / "moved", extra_files_from=base, max_shard_size="100KB")
    assert len(list((tmp_path / "moved").glob("*.safetensors"))) > 1
    shutil.rmtree(base)
    for name, flags in (("moved on", ()), ("8 bits", ("--optim", "adamw_8bit"))):
        assert finetuned(tmp_path / "moved", tmp_path / name, "--lora", *flags, *resumed(tmp_path / "run")) == 0
        assert last_loss(tmp_path / name) == pytest.approx(last_loss(tmp_path / "run"), rel=1e-6 if not flags else 1e-2)


def test_a_checkpoint_of_another_kind_says_so(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"full": (), "lora": ("--lora",), "prefix": ("--prefix_tuning",)}
    for name, flags in kinds.items():
        assert finetuned(base, tmp_path / name, *flags) == 0
    for resumes, run, reason in (
        ("lora", "full", "trained an adapter (--lora): add --lora"),
        ("prefix", "full", "trained an adapter (--prefix_tuning): add --prefix_tuning"),
        ("full", "lora", "trained all weights: leave out --lora"),
        ("lora", "prefix", "trained an adapter (--lora): leave out --prefix_tuning, and add --lora"),
    ):
        capsys.readouterr()
        assert finetuned(base, tmp_path / "refused", *kinds[run], *resumed(tmp_path / resumes)) == 2
        assert reason in capsys.readouterr().err


def test_written_options_are_those_of_the_adapter_that_is_trained_on(base: Path, tmp_path: Path) -> None:
    own = ("--lora", "--lora_rank", "3", "--lora_target_modules", "q_proj", "down_proj", "--lora_rslora")
    assert finetuned(base, tmp_path / "first", *own) == 0
    more = ("--lora_path", str(tmp_path / "first"), "--lora_rank", "4", "--lora_alpha", "99")
    assert finetuned(base, tmp_path / "second", *more) == 0
    written = yaml.safe_load((tmp_path / "second/config.yaml").read_text())
    assert (written["lora_rank"], written["lora_alpha"], written["lora_rslora"]) == (3, 6.0, True)
    assert sorted(written["lora_target_modules"]) == ["down_proj", "q_proj"]


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp8", "a8w8"])
def test_an_adapter_of_a_quantized_folder(base: Path, tmp_path: Path, kind: str) -> None:
    group = "32" if kind == "nf4" else "16"
    quantize = ["quantize", "--model_name_or_path", str(base), "--quant_type", kind, "--group_size", group]
    quantize = quantize[: -2 if kind in ("int8", "fp8", "a8w8") else None]
    assert main([*quantize, "--output_path", str(tmp_path / kind)]) == 0
    assert finetuned(tmp_path / kind, tmp_path / "run", "--lora") == 0
    assert finetuned(tmp_path / kind, tmp_path / "on", "--lora", *resumed(tmp_path / "run")) == 0
    assert last_loss(tmp_path / "on") == last_loss(tmp_path / "run")
    assert finetuned(base, tmp_path / "refused", "--lora", *resumed(tmp_path / "run")) == 2


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8", "a8w8"])
def test_weights_that_are_no_numbers_are_not_quantized(
    base: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hf.load_model(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    hf.save_model(model, CONFIG, tmp_path / "broken", extra_files_from=base)
    command = ["quantize", "--model_name_or_path", str(tmp_path / "broken"), "--quant_type", kind]
    assert main([*command, "--output_path", str(tmp_path / "out")]) == 2
    assert "model.layers.1.mlp.up_proj.weight has values that are infinite or no numbers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if kind in ("int8", "nf4"):
        assert finetuned(tmp_path / "broken", tmp_path / "run", "--lora", "--quantize_base", kind) == 2
        assert "up_proj.weight has values that are" in capsys.readouterr().err


class Asked(Processes):
    """Rank 1 of two, to which rank 0 has said something."""

    def __init__(self, first: dict[str, str]) -> None:
        super().__init__(rank=1)
        self.answer = first

    @property
    def alone(self) -> bool:
        return False

    def exchange(self, value: Any) -> list[Any]:
        return [self.answer, value]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "sampled"])
def test_weights_that_one_rank_does_not_have(
    whole: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is the same; one with another number in any one tensor, or another config.json, is not."""
    if not whole:
        monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 0)
    first = fingerprint.model_files(base)
    said = {f"{name} of the model": value for name, value in first.items()}
    other = tmp_path / "other"
    shutil.copytree(base, other)
    check_same_weights(Asked(said), other)
    weights = load_file(base / "model.safetensors")
    for name in weights:
        changed = {**weights, name: weights[name].clone()}
        changed[name].view(-1)[-1] += 1
        save_file(changed, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            ConfigError, match=r"rank 1 has another model\.safetensors of the model \(\w+\) than rank 0"
        ):
            check_same_weights(Asked(said), other)
    shutil.copy(base / "model.safetensors", other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    with pytest.raises(ConfigError, match=r"another config\.json of the model"):
        check_same_weights(Asked(said), other)
    check_same_weights(Processes(), other)
