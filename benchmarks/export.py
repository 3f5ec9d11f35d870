"""Tokens a second of bundles, beside onnxruntime-genai's own build of the same model, llama.cpp, and the eager model.

Each side of each round is a process of its own; the sides take turns, and the medians of the rounds are shown with the ratios
to the other programs, round by round. Greedy, no tokenizer: a prompt of 128 ids and then one token at a time for 1 and 8
sequences, and a prompt of 512. `load` is the time until a bundle is open, its hashes checked and its session ready; `MiB` the
memory after all that, less what Python and the libraries took before; `stored` the size of the weights.
`--perplexity` scores the first tokens of a text instead, in runs of PIECE tokens.

    python3 -m venv /tmp/genai-env && /tmp/genai-env/bin/pip install onnxruntime-genai==0.18.0 onnx-ir torch transformers
    /tmp/genai-env/bin/python -m onnxruntime_genai.models.builder -m MODEL -o /tmp/genai -p int4 -e cpu -c /tmp/cache \\
        --extra_options int4_accuracy_level=4 int4_block_size=32
    .venv/bin/python benchmarks/export.py --model MODEL --folder /tmp/bundles --kinds int4 \\
        --genai /tmp/genai --genai-python /tmp/genai-env/bin/python --llama MODEL.gguf --llama-python .venv-peers/bin/python
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import records
from records import Record

PROMPT, LONG, NEW, NEW_TOGETHER, TOGETHER = 128, 512, 64, 32, 8
# A bundle's name -> its kind and the options of its export.
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("onnx", {"weights": "fp32"}),
    "int8": ("onnx", {"weights": "int8"}),
    "int4": ("onnx", {"weights": "int4"}),
    "int4, symmetric": ("onnx", {"weights": "int4", "symmetric": True}),
    "int4, head int4": ("onnx", {"weights": "int4", "head_bits": 4}),
    "int4, symmetric, head int4": (
        "onnx",
        {"weights": "int4", "symmetric": True, "head_bits": 4},
    ),  # as genai's own build
    "int4, blocks of 64": ("onnx", {"weights": "int4", "block_size": 64}),
    "int4, blocks of 128": ("onnx", {"weights": "int4", "block_size": 128}),
    "torch fp32": ("torch", {"weights": "fp32"}),
    "aoti fp32": ("aoti", {"weights": "fp32"}),
    "aoti fp16": ("aoti", {"weights": "fp16"}),
    "aoti int8": ("aoti", {"weights": "int8"}),
    "aoti int4": ("aoti", {"weights": "int4"}),
}
EAGER = "eager fp32"
PIECE = 512
RATES = ("decode 1", "decode 8", "prefill")
IDS = [7919 * at % 49152 for at in range(LONG)]


def rate(tokens: int, compute: Callable[[], object]) -> float:
    start = time.perf_counter()
    compute()
    return tokens / (time.perf_counter() - start)


def bundle(folder: Path, threads: int) -> dict[str, float]:
    from arriero.export.bundle import open_bundle
    from arriero.export.kinds import open_runner

    if json.loads((folder / "manifest.json").read_text())["kind"] != "onnx":
        import torch

        torch.set_num_threads(threads)
    else:
        import onnxruntime  # noqa: F401
    before, start = resident(), time.perf_counter()
    opened = open_bundle(folder)
    runner = open_runner(opened, slots=TOGETHER, threads=threads)
    found = {"load": time.perf_counter() - start} | measured(runner, [[slot] for slot in range(TOGETHER)])
    stored = max(noted["size"] for noted in opened.manifest.files.values()) / 2**20
    return found | {"MiB": resident() - before, "stored": stored}


def eager(folder: Path, threads: int) -> dict[str, float]:
    import torch

    from arriero.engine.runner import BLOCK_SIZE, TorchRunner
    from arriero.formats.hf import load_model

    torch.set_num_threads(threads)
    before, start = resident(), time.perf_counter()
    model = load_model(folder, torch.float32)
    room = LONG + BLOCK_SIZE
    runner = TorchRunner(model, max_tokens=TOGETHER * room, weight_copies=False)
    count = room // runner.block_size
    tables = [list(range(slot * count, (slot + 1) * count)) for slot in range(TOGETHER)]
    found = {"load": time.perf_counter() - start} | measured(runner, tables)
    stored = sum(value.numel() * value.element_size() for value in model.parameters()) / 2**20
    return found | {"MiB": resident() - before, "stored": stored}


def measured(runner: Any, tables: Sequence[list[int]]) -> dict[str, float]:
    """The rates of anything that runs an engine's work.

    Args:
        tables: the blocks of each sequence.
    """

    def step(slot: int, start: int, tokens: list[int], salt: bytes = b"") -> Any:
        return SimpleNamespace(tokens=tokens, start=start, blocks=tables[slot], logits=1, adapter=0, salt=salt)

    def prompt(slot: int, length: int) -> None:
        runner.run([step(slot, 0, IDS[:length], secrets.token_bytes(8))])  # nothing of an earlier one

    def go_on(slots: int, count: int) -> None:
        for at in range(count):
            logits = runner.run([step(slot, PROMPT + at, [5]) for slot in range(slots)])
            logits.argmax(-1)

    for slot in range(TOGETHER):
        prompt(slot, PROMPT)
    go_on(1, 2)
    go_on(TOGETHER, 2)
    return {
        "decode 1": rate(NEW, lambda: go_on(1, NEW)),
        "decode 8": rate(TOGETHER * NEW_TOGETHER, lambda: go_on(TOGETHER, NEW_TOGETHER)),
        "prefill": rate(LONG, lambda: prompt(0, LONG)),
    }


def genai(folder: Path, threads: int) -> dict[str, float]:
    import numpy as np
    import onnxruntime_genai as og  # type: ignore[import-not-found]

    before, start = resident(), time.perf_counter()
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
        ids = np.array([IDS[:length]] * rows, np.int32)

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
    stored = sum(path.stat().st_size for path in folder.glob("model.onnx*")) / 2**20
    return found | {"MiB": resident() - before, "stored": stored}


def llama(path: Path, threads: int) -> dict[str, float]:
    import llama_cpp  # type: ignore[import-not-found]

    before, start = resident(), time.perf_counter()
    model = llama_cpp.Llama(
        str(path), n_ctx=LONG + NEW, n_batch=LONG, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    found = {"load": time.perf_counter() - start}

    def begin(length: int) -> None:
        model.reset()
        model.eval(IDS[:length])

    def go_on() -> None:
        for _ in range(NEW):
            model.eval([model.sample(temp=0.0, top_k=1, repeat_penalty=1.0)])

    begin(PROMPT)
    found["decode 1"] = rate(NEW, go_on)
    found["prefill"] = rate(LONG, lambda: begin(LONG))
    return found | {"MiB": resident() - before, "stored": path.stat().st_size / 2**20}


def pieces_of(folder: Path, text: Path, count: int) -> list[list[int]]:
    from arriero.data.tokenizer import load_tokenizer

    ids = load_tokenizer(folder).encode(text.read_text(encoding="utf-8")[: count * PIECE * 8])
    rows = [ids[PIECE * at : PIECE * (at + 1)] for at in range(count)]
    assert len(rows[-1]) == PIECE, "the text is too short"
    return rows


def perplexity(folder: Path, text: Path, pieces: int, threads: int) -> float:
    """exp of the mean negative log-likelihood of each token of the text but the first of each piece."""
    from arriero.bundles.running import bundle_engine
    from arriero.engine.sampling_params import SamplingParams
    from arriero.export.bundle import open_bundle

    engine = bundle_engine(open_bundle(folder), 4, threads)
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    found = engine.generate(pieces_of(folder, text, pieces), params)
    scores = [one.logprob for answer in found for one in answer.prompt_logprobs if one is not None]
    return math.exp(-sum(scores) / len(scores))


def llama_perplexity(path: Path, rows: Sequence[Sequence[int]], threads: int) -> float:
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        str(path),
        n_ctx=PIECE,
        n_batch=PIECE,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    total, count = 0.0, 0
    for row in rows:
        model.reset()
        model.eval(list(row))
        logits = np.asarray(model.scores[: len(row) - 1], np.float64)
        logits -= logits.max(-1, keepdims=True)
        likely = logits[np.arange(len(row) - 1), row[1:]] - np.log(np.exp(logits).sum(-1))
        total, count = total - likely.sum(), count + len(row) - 1
    return math.exp(total / count)


def resident() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


SIDES = {"bundle": bundle, "eager": eager, "genai": genai, "llama": llama}


def side(arguments: argparse.Namespace) -> None:
    kind, path = arguments.side
    if arguments.pieces_from:
        rows = json.loads(Path(arguments.pieces_from).read_text())
        print(json.dumps(llama_perplexity(Path(path), rows, arguments.threads)))
        return
    print(json.dumps(SIDES[kind](Path(path), arguments.threads)))


def export(model: Path, folder: Path, names: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """The bundles of these names, made unless they are there."""
    from arriero.export.aoti_export import export_aoti
    from arriero.export.onnx_export import OnnxOptions, export_onnx
    from arriero.export.torch_export import TorchOptions, export_torch

    found = {}
    for name in names:
        target = folder / name.replace(", ", "-").replace(" ", "-")
        if not target.exists():
            kind, options = BUNDLES[name]
            start = time.perf_counter()
            if kind == "onnx":
                made = export_onnx(model, target, OnnxOptions(**options))
            else:
                made = (export_aoti if kind == "aoti" else export_torch)(model, target, TorchOptions(**options))
            print(f"{name}: {made.manifest.check}, {time.perf_counter() - start:.0f} s", flush=True)
        found[name] = ("bundle", target)
    return found


def show_perplexity(arguments: argparse.Namespace, sides: dict[str, tuple[str, Path]]) -> None:
    for name, (_, folder) in sides.items():
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        found = perplexity(folder, arguments.perplexity, arguments.pieces, arguments.threads)
        print(f"{name:20s} {size:7.1f} MB  perplexity {found:.2f}", flush=True)
    for path in arguments.llama:
        rows = arguments.folder / "pieces.json"
        rows.write_text(json.dumps(pieces_of(arguments.model, arguments.perplexity, arguments.pieces)))
        told = run(arguments, arguments.llama_python, "llama", path, "--pieces-from", str(rows))
        print(f"{path.name:20s} {path.stat().st_size / 1e6:7.1f} MB  perplexity {told:.2f}", flush=True)


def run(arguments: argparse.Namespace, python: str, kind: str, path: Path, *more: str) -> Any:
    """What a side prints in its last line."""
    command = [python, __file__, "--threads", str(arguments.threads), "--side", kind, str(path), *more]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(told.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an HF folder")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/arriero-export"), help="of the bundles")
    parser.add_argument("--kinds", nargs="+", default=["fp32", "int8", "int4"], choices=[*BUNDLES, EAGER])
    parser.add_argument("--genai", type=Path)
    parser.add_argument("--genai-python", default=sys.executable)
    parser.add_argument("--llama", type=Path, nargs="+", default=[], help="GGUF files")
    parser.add_argument("--llama-python", default=".venv-peers/bin/python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="0: only export")
    parser.add_argument("--perplexity", type=Path, help="a text to score")
    parser.add_argument("--pieces", type=int, default=16)
    records.add_json(parser)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--pieces-from", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side(arguments)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    sides = export(arguments.model, arguments.folder, [name for name in arguments.kinds if name != EAGER])
    if arguments.perplexity:
        show_perplexity(arguments, sides)
        return
    if EAGER in arguments.kinds:
        sides[EAGER] = ("eager", arguments.model)
    others = {path.name: ("llama", path) for path in arguments.llama}
    if arguments.genai:
        others["genai"] = ("genai", arguments.genai)
    pythons = {"genai": arguments.genai_python, "llama": arguments.llama_python}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides | others}
    for _ in range(arguments.rounds):
        for name, (kind, path) in (sides | others).items():
            rounds[name].append(run(arguments, pythons.get(kind, sys.executable), kind, path))
    beside = [*others, EAGER] if EAGER in sides else [*others]
    told = []
    for name, results in rounds.items() if arguments.rounds else ():
        row = {key: median(result[key] for result in results) for key in results[0]}
        print(f"{name:20s} " + "  ".join(f"{key} {value:8.2f}" for key, value in row.items()), flush=True)
        for other in beside if name in sides and name != EAGER else ():
            if (other == EAGER) != name.endswith("fp32"):
                continue  # few bits beside few bits
            shared = [key for key in RATES if key in rounds[other][0]]
            ratios = {key: [a[key] / b[key] for a, b in zip(results, rounds[other], strict=True)] for key in shared}
            words = (f"{key} {median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for key, v in ratios.items())
            print(f"{'':20s} of {other}'s: " + ", ".join(words), flush=True)
            peer = {"genai": "onnxruntime-genai int4", EAGER: EAGER}.get(other, f"llama.cpp, {other}")
            common: dict[str, Any] = {"peer_name": peer, "threads": arguments.threads, "dtype": name}
            told += [
                Record.of_rounds(
                    "export",
                    f"{name} bundle, {key}, beside {peer}",
                    "tok/s",
                    [run[key] for run in results],
                    [run[key] for run in rounds[other]],
                    **common,
                )
                for key in shared
            ]
    records.write(arguments.json, told)


if __name__ == "__main__":
    main()
