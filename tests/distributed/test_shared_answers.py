"""Scores of lm-eval's requests, and generated answers, of several processes: those of one, each computed once.

Run as a program, this file is one of the processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from layout_runs import append, read_lines, run_ranks

from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.config.parallel import ParallelOptions
from arriero.engine.engine import Engine
from arriero.engine.loading import load_for_inference
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.shared_generation import generate_shared
from arriero.errors import ArrieroError
from arriero.parallel.processes import Processes, start, stop

TP, PP = {"tensor_parallel_degree": 2}, {"pipeline_parallel_degree": 2}
# name: processes, flags, in how many parts requests and answers are shared out
LAYOUTS: dict[str, tuple[int, dict[str, Any], int, int]] = {
    "copies": (2, {}, 2, 2),
    "shards": (2, {"sharding": ["stage3"]}, 2, 1),
    "tp2": (2, TP, 1, 1),
    "pp2": (2, PP, 1, 1),
    "tp2, copies": (4, TP, 2, 1),
    "pp2 x shards": (4, PP | {"sharding": ["stage2"]}, 2, 1),
}
REQUESTS, BATCH = 23, 4  # the last batch is smaller, and no number of processes has as many each


def answer(name: str, processes: Processes) -> dict[str, Any]:
    """What one process tells of a layout, and how many rows and prompts it computed itself."""
    from lm_eval.api.instance import Instance

    from arriero.training.harness import HarnessModel

    loaded = load_for_inference(
        ModelOptions(model_name_or_path="tiny-random-llama", device="cpu", dtype="float32"),
        AdapterPathOptions(),
        processes,
    )
    harness = HarnessModel(loaded, BATCH)
    generator = np.random.default_rng(4)
    words = "a mule carries loads over the hills and never once complains of stones".split()  # noqa: SIM905

    def text(most: int) -> str:
        return " ".join(generator.choice(words, int(generator.integers(1, most))))

    pairs = [(text(12), " " + text(5)) for _ in range(REQUESTS)]
    prompts = [harness.tok_encode(context) for context, _ in pairs]
    params = [SamplingParams(max_new_tokens=3 + i % 5, do_sample=i % 2 == 0, seed=i) for i in range(REQUESTS)]
    counted = {"rows": 0, "prompts": 0}
    score, generate = harness._score, Engine.generate

    def counting_score(rows: Any) -> Any:
        counted["rows"] += len(rows)
        return score(rows)

    def counting_generate(self: Engine, prompts: Any, *given: Any, **more: Any) -> Any:
        counted["prompts"] += len(prompts)
        return generate(self, prompts, *given, **more)

    finished: list[int] = []
    with (
        mock.patch.object(harness, "_score", counting_score),
        mock.patch.object(Engine, "generate", counting_generate),
    ):
        likelihoods = harness.loglikelihood(
            [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
        )
        model, tokenizer = loaded.model, loaded.tokenizer
        answers = generate_shared(model, tokenizer, prompts, params, max_running=BATCH, on_done=finished.append)
        few = generate_shared(model, tokenizer, prompts[:1], params[:1])  # fewer than processes
    with pytest.raises(ArrieroError, match="prompt 5: the prompt is empty"):  # whoever has it
        generate_shared(model, tokenizer, [*prompts[:5], []], params[:6])
    assert [few[0].token_ids, sum(finished)] == [answers[0].token_ids, REQUESTS]
    told = {"likelihoods": likelihoods, "answers": [[made.token_ids, made.text] for made in answers]}
    return {"layout": name, "rank": processes.rank, **told, **counted}


def main(folder: Path) -> None:
    world, processes = int(os.environ["WORLD_SIZE"]), Processes()
    for name in [name for name, (size, *_) in LAYOUTS.items() if size == world]:
        processes = start(ParallelOptions(**LAYOUTS[name][1]).layout(world), torch.device("cpu"))
        found = answer(name, processes)
        for line in processes.exchange(found):
            if processes.first:
                append(folder / "results.jsonl", line)
    stop(processes)


def check(worlds: tuple[int, ...], folder: Path) -> None:
    for world in worlds:
        run_ranks(world, Path(__file__), str(folder), timeout=400)
    lines = read_lines(folder / "results.jsonl")
    one = answer("one process", Processes())
    assert one["rows"] == REQUESTS
    for name, (world, _, shares, parts) in LAYOUTS.items():
        found = [line for line in lines if line["layout"] == name]
        assert len(found) == (world if world in worlds else 0)
        for line in found:
            for (logp, greedy), (right, wanted) in zip(line["likelihoods"], one["likelihoods"], strict=True):
                assert (logp, greedy) == (pytest.approx(right, rel=1e-5), wanted), name
            assert line["answers"] == one["answers"], name
            assert line["rows"] <= REQUESTS / shares + BATCH, name
            if parts == 1:  # rank 0 asks the model, the others follow it
                assert line["prompts"] == (REQUESTS + 1 if line["rank"] == 0 else 0), name
            else:
                assert abs(line["prompts"] - (REQUESTS + 1) / parts) <= 1, name


@pytest.mark.timeout(500)
def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    check((2,), tmp_path)


@pytest.mark.peers
@pytest.mark.timeout(500)
def test_four_processes_answer_as_one(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    check((4,), tmp_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
