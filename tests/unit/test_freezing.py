"""Freezing by pattern: what is chosen keeps its values, the rest trains as before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from arriero.cli import main as arriero
from arriero.errors import ConfigError
from arriero.training.freezing import freeze

sys.path.insert(0, str(Path(__file__).parent))
from test_run_endings import make_model, make_trainer


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("model.embed_tokens", {"model.embed_tokens.weight"}),
        ("lm_head.weight", {"lm_head.weight"}),
        ("model.*_tokens*", {"model.embed_tokens.weight"}),
        ("model.layers.[0-3].mlp", {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}),
        (
            "*norm.weight",
            {"model.norm.weight"} | {f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")},
        ),
    ],
)
def test_patterns(pattern: str, names: set[str]) -> None:
    model = make_model()
    count = freeze(model, [pattern])
    frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen.keys() == names
    assert count == sum(frozen.values())


def test_frozen_parameters_stay_and_the_first_step_of_the_others_is_that_of_the_whole(tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in make_model().named_parameters()}
    models = [make_model(), make_model()]
    freeze(models[1], ["model.embed_tokens", "*.mlp"])
    for number, model in enumerate(models):
        make_trainer(tmp_path / str(number), model=model, steps=1, max_grad_norm=0.0).train()
    whole = dict(models[0].named_parameters())
    for name, parameter in models[1].named_parameters():
        expected = before[name] if "embed_tokens" in name or ".mlp." in name else whole[name]
        assert torch.equal(parameter, expected), name
        assert not torch.equal(whole[name], before[name]), name


def test_bad_patterns() -> None:
    with pytest.raises(
        ConfigError, match=r"--freeze model.layer.0 matches no parameter: the names are like model.embed"
    ):
        freeze(make_model(), ["model.embed_tokens", "model.layer.0"])
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        freeze(make_model(), ["model", "lm_head"])


@pytest.mark.parametrize("method", ["--lora", "--prefix_tuning"])
def test_refused_with_adapters(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["finetune", "--model_name_or_path", "m", "--dataset_path", "d", "--output_dir", "x"]
    assert arriero([*run, method, "--freeze", "lm_head"]) == 2
    assert f"--freeze and {method} do not go together" in capsys.readouterr().err
