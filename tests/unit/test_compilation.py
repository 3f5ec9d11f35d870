"""Compiled layers compute what plain ones do, and are compiled once for all batches of packed rows."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arriero.data.batch import Batch, pack
from arriero.data.sft import IGNORE, Example
from arriero.errors import ConfigError
from arriero.models.compiler import check_compiler, check_own_library
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.activation_checkpointing import apply_activation_checkpointing
from arriero.parallel.compilation import apply_compile
from arriero.training.execution import DirectExecution, Layers
from arriero.training.precision import Precision


def make_model() -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig.from_dict(
            {
                "model_type": "llama",
                "vocab_size": 61,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "rms_norm_eps": 1e-5,
                "initializer_range": 0.1,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
        )
    )
    model.init_weights(3)
    return model


def matrix(rows: int, length: int) -> Batch:
    ids = torch.randint(3, 61, (rows, length + 1), generator=torch.Generator().manual_seed(rows))
    return Batch(ids[:, :-1], ids[:, 1:], ((length,),) * rows, rows, rows * length, rows * length)


def packed(lengths: list[int]) -> Batch:
    rows = []
    for seed, length in enumerate(lengths):
        ids = torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        rows.append(Example(ids, [*ids[1:], IGNORE]))
    return pack(rows)


def loss_and_gradients(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    device = torch.device("cpu")
    sums = DirectExecution(Layers(model, Precision(torch.float32, "O1", device), device)).batch_loss(batch)
    (sums.loss / sums.count).backward()
    return sums.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.peers)])
def test_compiled_layers_compute_the_same(backend: str, recompute: bool) -> None:
    torch._dynamo.reset()
    plain, compiled = make_model(), make_model()
    names = list(compiled.state_dict())
    if recompute:
        apply_activation_checkpointing(compiled.model.layers)
    apply_compile(compiled.model.layers, backend)
    assert list(compiled.state_dict()) == names
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch in (matrix(2, 16), packed([5, 9, 12]), packed([7, 7, 3, 11]), matrix(3, 16)):
        expected, gradients = loss_and_gradients(plain, batch)
        loss, found = loss_and_gradients(compiled, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "something was compiled"


def test_packed_batches_are_not_compiled_one_by_one() -> None:
    torch._dynamo.reset()
    model = make_model()
    apply_compile(model.model.layers, "aot_eager")
    counters = torch._dynamo.utils.counters
    loss_and_gradients(model, packed([5, 9, 12]))
    loss_and_gradients(model, packed([8, 9, 13]))  # another length: dynamic shapes from here on
    before = counters["stats"]["unique_graphs"]
    for lengths in ([4, 4, 4, 9], [17, 2], [3, 30], [6] * 7):
        loss_and_gradients(model, packed(lengths))
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (
            "echo 'g++: no cc1plus' >&2; echo more >&2; exit 1",
            "fails \\(g\\+\\+: no cc1plus\\): repair",
        ),
        ("exit 3", "fails \\(exit code 3\\)"),
        (None, "and there is none: install g\\+\\+"),
    ],
)
def test_a_compiler_that_fails_is_not_told_to_be_missing(tmp_path: Path, script: str | None, text: str) -> None:
    from torch._inductor import config

    compiler = tmp_path / "g++"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    with (
        config.patch({"cpp.cxx": (None, str(compiler))}),
        pytest.raises(ConfigError, match=text) as told,
    ):
        check_compiler("--format aoti", "use --format torch")
    assert "--format aoti needs a C++ compiler, and " in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux")
@pytest.mark.parametrize("static", [False, True])
def test_a_compiler_that_brings_its_own_library(static: bool, tmp_path: Path) -> None:
    """As the g++ of some images does: what AOTInductor compiles with it dies when it is loaded."""
    from torch._inductor import config

    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" {"-static-libstdc++" if static else ""}\n')
    compiler.chmod(0o755)
    with config.patch({"cpp.cxx": (None, str(compiler))}):
        if not static:
            check_own_library("--format aoti", "use --format torch")
            return
        expected = f"{re.escape(str(compiler))} links its own into what it makes: name another one"
        with pytest.raises(ConfigError, match=expected) as told:
            check_own_library("--format aoti", "use --format torch")
    assert "\n" not in str(told.value)
