"""A program that generates with transformers, for `arriero bench --against transformers`; see `peer.py`, which starts it.

It is a process of its own. transformers is imported by name, here alone, and only because the user asked for the comparison.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any, TextIO

import torch


def generate(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers in batches of prompts as they come, padded on the left; each batch goes on until its longest answer is
    done.

    Args:
        job: prompts (token ids), new_tokens (of each answer), batch.

    Returns:
        seconds, and the answers cut to what was asked for.
    """
    prompts, counts, batch = job["prompts"], job["new_tokens"], job["batch"]
    answers: list[list[int]] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), batch):
        rows, wanted = prompts[first : first + batch], counts[first : first + batch]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=mask, max_new_tokens=max(wanted))
        made = output[:, longest:].tolist()
        answers += [row[:count] for row, count in zip(made, wanted, strict=True)]
    seconds = time.perf_counter() - start
    short = next((i for i, (a, n) in enumerate(zip(answers, counts, strict=True)) if len(a) != n), None)
    if short is not None:
        raise RuntimeError(f"answer {short} has {len(answers[short])} tokens in place of {counts[short]}")
    return {"seconds": seconds, "answers": answers}


def load(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model, ready to generate without an end, and what to tell of this side."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(settings["threads"])
    dtype, device = getattr(torch, settings["dtype"]), torch.device(settings["device"])
    load_model = transformers.AutoModelForCausalLM.from_pretrained
    model = load_model(settings["folder"], dtype=dtype, local_files_only=True).to(device).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model, {"version": transformers.__version__}


def serve(requests: TextIO, replies: TextIO) -> None:
    """One JSON object a line: settings, then jobs; each is answered by one line."""

    def reply(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=replies, flush=True)

    try:
        model, facts = load(json.loads(requests.readline()))
        reply(facts)
        for line in requests:
            reply(generate(model, json.loads(line)))
    except Exception as error:  # whatever it is: the other process tells the user
        reply({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})


if __name__ == "__main__":
    # what libraries print must not come between the answers
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, own)
