"""New rows of embedding and head: the same numbers however they are shared out; options that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from arriero.cli import main
from arriero.config.vocabulary import VocabularyOptions
from arriero.engine import new_rows
from arriero.engine.new_rows import NewRows, mean_row
from arriero.errors import ConfigError
from arriero.formats.parts import Placement
from arriero.models.vocabulary import EMBEDDING, HEAD

HELD, WIDTH = 37, 6


def source(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(HELD, WIDTH, generator=generator).to(dtype) for name in (EMBEDDING, HEAD)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 48])
def test_any_boxes_make_the_same_matrix(parts: int, dtype: torch.dtype) -> None:
    stored = source(dtype)
    new = NewRows(known=33, tokens=35, held=HELD, rows=48)
    values = new.values(lambda name, where: stored[name][where.box])
    for name, old in stored.items():
        expected = torch.cat([old.float(), torch.zeros(11, WIDTH)])
        expected[[33, 34, *range(HELD, 48)]] = old[:33].double().mean(0).float()
        step = -(-48 // parts)
        boxes = [
            values(name, Placement((48, WIDTH), (first, 0), (min(step, 48 - first), WIDTH))).float()
            for first in range(0, 48, step)
        ]
        columns = [values(name, Placement((48, WIDTH), (0, at), (48, 2))).float() for at in (0, 2, 4)]
        assert torch.equal(torch.cat(boxes), torch.cat(columns, dim=1))
        assert torch.allclose(torch.cat(boxes), expected, rtol=1e-6, atol=1e-8)
        kept = [row for row in range(HELD) if row not in (33, 34)]
        assert torch.equal(torch.cat(boxes)[kept], expected[kept])


def test_other_parameters_are_as_they_were() -> None:
    norm = torch.ones(WIDTH)
    values = NewRows(33, 35, HELD, 48).values(lambda name, where: norm)
    assert values("model.norm.weight", Placement.whole((WIDTH,))) is norm


def test_the_mean_is_of_large_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = source()[EMBEDDING]
    whole = mean_row(lambda where: matrix[where.box], 30, (HELD, WIDTH))
    monkeypatch.setattr(new_rows, "READ_NUMBERS", 4 * WIDTH)
    cut = mean_row(lambda where: matrix[where.box], 30, (HELD, WIDTH))
    for mean in (whole, cut):
        assert torch.allclose(mean, matrix[:30].double().mean(0).float(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("held", "tokens", "multiple", "rows"), [(10, 8, None, 10), (10, 12, None, 12), (10, 8, 8, 16), (16, 8, 8, 16)]
)
def test_rows(held: int, tokens: int, multiple: int | None, rows: int) -> None:
    assert VocabularyOptions(pad_vocab_to_multiple_of=multiple).rows(held, tokens) == rows


def test_bad_lists_are_refused() -> None:
    with pytest.raises(ConfigError, match="a token is one or the other"):
        VocabularyOptions(add_tokens=["<a>", "<b>"], add_special_tokens=["<b>"])
    with pytest.raises(ConfigError, match="empty token"):
        VocabularyOptions(add_tokens=[" "])
    assert VocabularyOptions(add_tokens=["<a>", "<a>"]).add_tokens == ["<a>"]


@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
def test_adapters_are_refused_with_a_way_out(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["finetune", f"--{method}", "--add_tokens", "<a>", "--output_dir", str(tmp_path / "run")])
    assert code == 2
    assert f"--add_tokens and --{method} do not go together" in capsys.readouterr().err
