"""The real model against transformers: its logits and the ids of its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arriero.data.tokenizer import load_tokenizer
from arriero.formats.hf import load_model

transformers = pytest.importorskip("transformers")

TEXT = "\n".join(line for line in (Path(__file__).parent.parent.parent / "LICENSE").read_text().splitlines()[:15])


def test_logits_equal_transformers(smollm2: Path) -> None:
    """In fp64 by number; in fp32, where kernels and so roundings differ from processor to processor, by size."""
    ids = torch.tensor([load_tokenizer(smollm2).encode(TEXT)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, expected = load_model(smollm2, dtype=torch.float32)(ids), theirs(ids).logits
        assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        ours, expected = load_model(smollm2, dtype=torch.float64)(ids), theirs.double()(ids).logits
        assert float((ours - expected).abs().max()) <= 5e-5  # both take their RoPE angles in fp32


def test_token_ids_equal_transformers_on_real_text(smollm2: Path) -> None:
    ours, theirs = load_tokenizer(smollm2), transformers.AutoTokenizer.from_pretrained(smollm2)
    for file in ("LICENSE", "README.md", "src/arriero/assets/quickstart/dev.json", "src/arriero/cli.py"):
        text = (Path(__file__).parent.parent.parent / file).read_text(encoding="utf-8")
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
