"""How the curves of `growth.py` should grow: computed from the model and the machine's peaks, not fitted to what is measured.

Training is what `arriero plan` computes, bytes as they are and seconds at the peak; answers are by what a step must compute and
read (`engine/benchmark/work_cost.py`). Seconds are those of a machine that reaches its peaks, so that only their growth is
compared.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from growth_cases import ASKED_EACH, ASKED_NEW, DECODED_NEW, DECODED_PROMPT, training_setup
from peaks import Peaks
from small_model import small_config

from arriero.engine.benchmark.work_cost import Piece, WorkCost
from arriero.engine.runner import BLOCK_SIZE
from arriero.models.llama import LlamaForCausalLM
from arriero.training.planning.machine import LINK_UTILIZATION, Links
from arriero.training.planning.memory import HOST_IMPORTS, training_memory
from arriero.training.planning.setup import ModelFacts, model_facts
from arriero.training.planning.speed import training_speed

CHUNK = 2048  # tokens that the engine computes in a step
NETWORK = Links(*(2 * [12.5e9 * LINK_UTILIZATION]), "100 Gb/s, 80 % of it")  # of processes on cores of their own
FLOAT = 4


@dataclass(frozen=True)
class Law:
    """What a point should take.

    Attributes:
        seconds: at the machine's peaks.
        bytes: None where only growth is known: then there is none.
    """

    seconds: float
    bytes: float | None


def step_seconds(peaks: Peaks, pieces: list[Piece]) -> float:
    """Of a step of the engine: what takes longer, its arithmetic or the bytes it reads."""
    return max(_cost().flops(pieces) / peaks.flops, _cost().bytes(pieces) / peaks.read)


@lru_cache
def _facts(layers: int) -> ModelFacts:
    return model_facts(small_config(layers))


@lru_cache
def _cost() -> WorkCost:
    with torch.device("meta"):
        return WorkCost.of(LlamaForCausalLM(small_config()))


def law(curve: str, x: int, peaks: Peaks, prompt_tokens: int = 0) -> Law:
    """The law of a point.

    Args:
        prompt_tokens: of a question of "clients".
    """
    if curve.startswith("train-"):
        layers, setup = training_setup(curve, x)
        seconds = training_speed(_facts(layers), setup, peaks.flops, 1.0).step_seconds
        assert seconds is not None
        return Law(seconds, training_memory(_facts(layers), setup).peak - HOST_IMPORTS)
    if curve == "ranks":
        return _ranks(x, peaks)
    if curve == "prefill":
        return Law(_prompt(x, peaks), _held(1, x + 1, min(x, CHUNK)))
    if curve == "decode":
        between = DECODED_PROMPT + DECODED_NEW // 2
        seconds = step_seconds(peaks, [Piece(between, 1, 1)] * x)
        return Law(seconds, _held(x, DECODED_PROMPT + DECODED_NEW, min(x * DECODED_PROMPT, CHUNK)))
    if curve == "clients":
        step = step_seconds(peaks, [Piece(prompt_tokens + ASKED_NEW // 2, 1, 1)] * x)
        prompts = step_seconds(peaks, [Piece(0, prompt_tokens, 1)] * x)
        seconds = ASKED_EACH * (prompts + ASKED_NEW * step)
        return Law(seconds, _held(x, prompt_tokens + ASKED_NEW, min(x * prompt_tokens, CHUNK)))
    return Law(float(x), None)  # a corpus: each byte once, one unit of the file in memory at a time


def _ranks(x: int, peaks: Peaks) -> Law:
    """On this machine 1/min(x, cores); beyond as `plan` has it, each process on a core of its own behind a network."""
    layers, setup = training_setup("ranks", x)
    facts, cores = _facts(layers), os.cpu_count() or 1
    taken = training_memory(facts, setup).peak - HOST_IMPORTS
    if x > 4:
        seconds = training_speed(facts, setup, peaks.flops, 1.0, NETWORK).step_seconds
        assert seconds is not None
        return Law(seconds, taken)
    alone = training_speed(facts, replace(training_setup("ranks", 1)[1]), peaks.flops, 1.0).step_seconds
    assert alone is not None
    return Law(alone / min(x, cores), taken)


def _prompt(tokens: int, peaks: Peaks) -> float:
    """Seconds of a prompt, a chunk after the other."""
    chunks = [Piece(at, min(CHUNK, tokens - at), int(at + CHUNK >= tokens)) for at in range(0, tokens, CHUNK)]
    return sum(step_seconds(peaks, [chunk]) for chunk in chunks)


def _held(requests: int, tokens: int, chunk: int) -> float:
    """Bytes of keys and values in their blocks, and of what one layer works with: hidden states as they are and normed,
    queries, keys, values, attention's output, gate and up; and rows of logits with a copy to draw from."""
    config = small_config()
    blocks = requests * math.ceil(tokens / BLOCK_SIZE) * BLOCK_SIZE
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    working = chunk * (2 * config.hidden_size + 2 * query + 2 * key + 2 * config.intermediate_size)
    return FLOAT * (2 * key * config.num_hidden_layers * blocks + working + 2 * requests * config.vocab_size)
