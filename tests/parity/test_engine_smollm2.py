"""The real model's greedy answers to real prompts are transformers', token for token."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.data.prompt_tokens import fit_prompt
from arriero.data.sources import read_samples
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.engine import Engine
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams
from arriero.formats.hf import load_model

transformers = pytest.importorskip("transformers")

DATA = Path(os.environ.get("ARRIERO_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
PROMPTS, NEW = 200, 32
TIE = 1e-4  # of the greater logit


def real_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """All seed tasks, and questions about passages, many of which share a passage."""
    tasks = read_samples(DATA / "instruct" / "seed_tasks.jsonl", None)
    questions = read_samples(DATA / "squad" / "dev.json", "squad_qa")
    samples = [*tasks, *questions][:PROMPTS]
    assert len(samples) == PROMPTS > len(tasks)
    return [fit_prompt(sample, tokenizer, 1024)[0] for sample in samples]


@torch.inference_mode()
def their_answer(model: Any, prompt: list[int], new: int) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=new
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


@torch.inference_mode()
def gap(model: Any, sequence: list[int], one: int, other: int) -> float:
    """How far two tokens' logits lie apart after a sequence, in transformers itself, as a share of the greater one."""
    logits = model(torch.tensor([sequence])).logits[0, -1]
    return float((logits[one] - logits[other]).abs() / logits.abs().max())


@pytest.mark.peers
@pytest.mark.timeout(7200)
def test_200_greedy_answers_are_those_of_transformers(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    prompts = real_prompts(tokenizer)
    engine = Engine(TorchRunner(load_model(smollm2, dtype=torch.float32), max_tokens=16384), tokenizer, max_running=16)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ties = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ours = answer.token_ids
        wanted = their_answer(theirs, prompt, NEW)
        while ours != wanted:
            at = next(i for i, (a, b) in enumerate(zip(ours, wanted, strict=False)) if a != b)
            apart = gap(theirs, prompt + ours[:at], ours[at], wanted[at])
            assert apart < TIE, (
                f"{tokenizer.decode(prompt)!r}, token {at}: {ours[at]} for {wanted[at]}, apart by {apart}"
            )
            ties += 1
            # from there on the answer must be what transformers says after our token
            end = at + 1
            going_on = end < NEW and ours[at] not in tokenizer.stop_token_ids
            wanted = ours[:end] + (their_answer(theirs, prompt + ours[:end], NEW - end) if going_on else [])
    print(f"{PROMPTS} prompts, {sum(len(a.token_ids) for a in answers)} tokens, {ties} ties")
