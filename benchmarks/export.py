"""Tokens a second of ONNX bundles, beside onnxruntime-genai's own build of the same model.

Each side of each round is a process of its own; the sides take turns, and the medians of the rounds are shown with the ratios
to genai. Greedy, no tokenizer: a prompt of 128 random ids and then one token at a time for 1 and 8 sequences, and a prompt of
512. `load` is the time until a bundle is open, its hashes checked and its session ready; `MiB` the memory after all that.
`--perplexity` scores the first tokens of a text instead, by the engine, a run of PIECE tokens after the other.

    python -m onnxruntime_genai.models.builder -m MODEL -o /tmp/genai -p int4 -e cpu -c /tmp/cache \\
        --extra_options int4_accuracy_level=4 int4_block_size=32
    .venv/bin/python benchmarks/export.py --model MODEL --folder /tmp/bundles --genai /tmp/genai --genai-python PYTHON
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

PROMPT, LONG, NEW, NEW_TOGETHER, TOGETHER = 128, 512, 32, 16, 8
SIDES = {
    "fp32": {"weights": "fp32"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "int4, head int4": {"weights": "int4", "head_bits": 4},
    "int4, zero points": {"weights": "int4", "symmetric": False},
    "int4, blocks of 64": {"weights": "int4", "block_size": 64},
    "int4, blocks of 128": {"weights": "int4", "block_size": 128},
}
PIECE = 512


def rate(tokens: int, compute: Callable[[], object]) -> float:
    start = time.perf_counter()
    compute()
    return tokens / (time.perf_counter() - start)


def ours(folder: Path, threads: int) -> dict[str, float]:
    from arriero.export.bundle import open_bundle
    from arriero.export.onnx_session import OnnxSession
    from arriero.export.slot_runner import SlotRunner

    start = time.perf_counter()
    bundle = open_bundle(folder)
    runner = SlotRunner(OnnxSession(bundle.graph, TOGETHER, threads))
    found = {"load": time.perf_counter() - start}
    ids = [7919 * at % runner.vocab_size for at in range(LONG)]

    def step(slot: int, start: int, tokens: list[int], salt: bytes = b"") -> Any:
        return SimpleNamespace(
            tokens=tokens, start=start, blocks=[slot], logits=1, salt=salt
        )  # without importing torch

    def prompt(slot: int, length: int) -> None:
        runner.run([step(slot, 0, ids[:length], secrets.token_bytes(8))])  # nothing of an earlier one

    def go_on(slots: int, count: int) -> None:
        for at in range(count):
            logits = runner.run([step(slot, PROMPT + at, [5]) for slot in range(slots)])
            logits.argmax(-1)

    for slot in range(TOGETHER):
        prompt(slot, PROMPT)
    found["decode 1"] = rate(NEW, lambda: go_on(1, NEW))
    found["decode 8"] = rate(TOGETHER * NEW_TOGETHER, lambda: go_on(TOGETHER, NEW_TOGETHER))
    found["prefill"] = rate(LONG, lambda: prompt(0, LONG))
    found["MiB"] = resident()
    return found


def genai(folder: Path, threads: int) -> dict[str, float]:
    import numpy as np
    import onnxruntime_genai as og  # type: ignore[import-not-found]

    start = time.perf_counter()
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    found = {"load": time.perf_counter() - start}

    def generate(rows: int, length: int, count: int) -> tuple[float, float]:
        params = og.GeneratorParams(model)
        params.set_search_options(
            max_length=length + count + 2, min_length=length + count + 2, batch_size=rows, do_sample=False
        )
        generator = og.Generator(model, params)
        ids = np.array([[7919 * at % 49152 for at in range(length)]] * rows, np.int32)

        def begin() -> None:
            generator.append_tokens(ids)
            generator.generate_next_token()

        def go_on() -> None:
            for _ in range(count):
                generator.generate_next_token()

        return rate(rows * length, begin), rate(rows * count, go_on)

    generate(1, PROMPT, 4)
    found["decode 1"] = generate(1, PROMPT, NEW)[1]
    found["decode 8"] = generate(TOGETHER, PROMPT, NEW_TOGETHER)[1]
    found["prefill"] = generate(1, LONG, 1)[0]
    found["MiB"] = resident()
    return found


def perplexity(folder: Path, text: Path, pieces: int, threads: int) -> float:
    """exp of the mean negative log-likelihood of each token of the text but the first of each piece."""
    from arriero.bundles.running import bundle_engine
    from arriero.engine.sampling_params import SamplingParams
    from arriero.export.bundle import open_bundle

    engine = bundle_engine(open_bundle(folder), 4, threads)
    ids = engine.tokenizer.encode(text.read_text(encoding="utf-8")[: pieces * PIECE * 8])
    rows = [ids[PIECE * at : PIECE * (at + 1)] for at in range(pieces)]
    assert len(rows[-1]) == PIECE, "the text is too short"
    found = engine.generate(rows, SamplingParams(max_new_tokens=1, prompt_logprobs=0))
    scores = [one.logprob for answer in found for one in answer.prompt_logprobs if one is not None]
    return math.exp(-sum(scores) / len(scores))


def resident() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def side(arguments: argparse.Namespace) -> None:
    kind, folder = arguments.side
    found = (genai if kind == "genai" else ours)(Path(folder), arguments.threads)
    print(json.dumps(found))


def export(model: Path, folder: Path, names: list[str]) -> dict[str, tuple[str, Path]]:
    from arriero.export.onnx_export import OnnxOptions, export_onnx

    found = {}
    for name in names:
        target = folder / name.replace(", ", "-").replace(" ", "-")
        if not target.exists():
            options: dict[str, Any] = SIDES[name]
            print(f"{name}: {export_onnx(model, target, OnnxOptions(**options)).manifest.check}", flush=True)
        found[name] = ("ours", target)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/arriero-export"))
    parser.add_argument("--kinds", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--genai", type=Path)
    parser.add_argument("--genai-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="0: only export")
    parser.add_argument("--perplexity", type=Path, help="a text to score")
    parser.add_argument("--pieces", type=int, default=16)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side(arguments)
        return
    sides = export(arguments.model, arguments.folder, arguments.kinds)
    if arguments.perplexity:
        for name, (_, folder) in sides.items():
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            found = perplexity(folder, arguments.perplexity, arguments.pieces, arguments.threads)
            print(f"{name:20s} {size:7.1f} MB  perplexity {found:.2f}", flush=True)
        return
    if arguments.genai:
        sides["genai"] = ("genai", arguments.genai)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, (kind, folder) in sides.items():
            python = arguments.genai_python if kind == "genai" else sys.executable
            command = [python, __file__, "--threads", str(arguments.threads), "--side", kind, str(folder)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rounds[name].append(json.loads(told.splitlines()[-1]))
    for name, results in rounds.items() if arguments.rounds else ():
        row = {key: median(result[key] for result in results) for key in results[0]}
        text = "  ".join(f"{key} {value:8.2f}" for key, value in row.items())
        if arguments.genai:
            ratios = {
                key: median(a[key] / b[key] for a, b in zip(results, rounds["genai"], strict=True))
                for key in ("decode 1", "decode 8", "prefill")
            }
            text += "  of genai's " + " ".join(f"{value:.2f}" for value in ratios.values())
        print(f"{name:20s} {text}", flush=True)


if __name__ == "__main__":
    main()
