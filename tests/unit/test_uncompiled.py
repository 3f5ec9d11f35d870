"""Functions that torch.compile leaves alone, without its import where nothing is compiled."""

from __future__ import annotations

import subprocess
import sys

import torch

from arriero.models.uncompiled import uncompiled

MODEL_ANSWERS = """
import sys, torch
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.weight_shapes import weight_shapes
shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
config = LlamaConfig.from_dict({"model_type": "llama", **shape})
assert weight_shapes(config)["model.embed_tokens.weight"] == (50, 16)
model = LlamaForCausalLM(config)
model.init_weights(0)
with torch.no_grad():
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 50)
assert "torch._dynamo" not in sys.modules, "the compiler was imported"
"""


def test_a_model_answers_without_the_compiler() -> None:
    subprocess.run([sys.executable, "-c", MODEL_ANSWERS], check=True, timeout=100)


def test_what_a_compiled_function_calls_is_left_alone() -> None:
    seen: list[bool] = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    @uncompiled
    def left(x: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):  # each count would be a graph of its own
            x = inner(x)
        return x

    graphs: list[torch.fx.GraphModule] = []

    def counted(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=counted)
    def whole(x: torch.Tensor, count: int) -> torch.Tensor:
        return left(x * 2, count) * 3

    for count in range(1, 13):  # torch gives up on a function after 8 graphs
        assert whole(torch.ones(2), count).tolist() == [3.0 * (2 + count)] * 2
    assert len(graphs) <= 6  # before and after it, for one count and for any
    assert seen == [False] * sum(range(1, 13))
