"""Every kind of adapter through the command line: trained, resumed to the bit, merged, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arriero.cli import main

TINY = "__internal_testing__/tiny-random-llama"
KINDS = {
    "dora": ["--lora_dora", "--lora_dropout", "0.1"],
    "pissa": ["--pissa", "True", "--use_rslora"],
    "lora+": ["--lora_plus_scale", "8"],
}
TRAINING = (
    *("finetune", "--model_name_or_path", TINY, "--dataset_path", "data", "--lora", "--lora_rank", "4"),
    *("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--per_device_train_batch_size", "2"),
    *("--learning_rate", "3e-3", "--lr_scheduler_type", "constant", "--disable_tqdm", "True", "--report_to", "none"),
    *("--src_length", "64", "--device", "cpu"),
)


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS.keys())
def test_a_run_resumes_and_merges(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path / "home"))
    Path("data").mkdir()
    rows = "".join(json.dumps({"src": f"what follows {i} ?", "tgt": str(i + 1)}) + "\n" for i in range(12))
    Path("data/train.jsonl").write_text(rows)
    assert main([*TRAINING, *flags, "--output_dir", "whole", "--merge_weights"]) == 0
    assert main([*TRAINING, *flags, "--output_dir", "parts", "--resume_from_checkpoint", "whole/checkpoint-2"]) == 0
    name = "adapter_model.safetensors"
    whole, parts, early = (load_file(Path(at) / name) for at in ("whole", "parts", "whole/checkpoint-2"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())
    assert any(not torch.equal(tensor, early[key]) for key, tensor in whole.items())
    assert main(["merge", "--model_name_or_path", TINY, "--lora_path", "whole", "--output_path", "merged"]) == 0
    mine, other = (load_file(Path(at) / "model.safetensors") for at in ("whole/merged", "merged"))
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-3, atol=1e-5)
    capsys.readouterr()
    assert main([*TRAINING, *flags, "--output_dir", "on", "--lora_path", "whole"]) == 0
    ranks = [json.loads((Path(at) / "adapter_config.json").read_text())["r"] for at in ("whole", "on")]
    assert ranks == [8 if "--pissa" in flags else 4] * 2
