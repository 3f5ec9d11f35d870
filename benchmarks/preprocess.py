"""Speed of `arriero preprocess` against raw `tokenizers` and `datasets.map`: same tokenizer, same text, in turns.

    python benchmarks/preprocess.py --text ../shared/data/text/tinyshakespeare.txt --megabytes 32 --rounds 3

The text is repeated into a .jsonl file of documents of 1 to 2 kB. Five ways in turns, each in a fresh process:

    raw       `tokenizers.Tokenizer.encode_batch` of all documents, on one core; reading and JSON are not counted
    raw2      the same in two processes at once, half of the documents each: what two cores of this machine can do
    map       `datasets.map(batched=True)` with the same tokenizer, one process, from the file to ids in an Arrow file
    arriero   the corpus builder with 1 worker, from the file to the finished corpus
    arriero2  the same with 2 workers

What is timed is the work, not the imports. With more than one worker this includes starting them. Prints tokens a second,
the ratios of each round, and a row for benchmarks/README.md. Tokens a CPU second count everything, also reading and imports
of libraries inside the timed part; they tell more than seconds where others use the machine too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import records
from records import Record

WAYS = ("raw", "raw2", "map", "arriero", "arriero2")
TEXT = Path(__file__).parents[2] / "shared" / "data" / "text" / "tinyshakespeare.txt"


def write_documents(text: Path, path: Path, megabytes: float) -> None:
    """Paragraphs joined to documents of 1 to 2 kB, repeated; a running number keeps every document different."""
    paragraphs = text.read_text(encoding="utf-8").split("\n\n")
    size = number = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            document = ""
            for paragraph in paragraphs:
                document += paragraph + "\n\n"
                if len(document) >= 1000 + 97 * (number % 10):
                    size += file.write(json.dumps({"text": f"{number}. {document}"}) + "\n")
                    number += 1
                    document = ""


def read_texts(path: Path) -> list[str]:
    """All texts of the file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def raw(path: Path, folder: Path) -> tuple[int, float]:
    """(tokens, seconds) of the tokenizers library alone."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = read_texts(path)
    started = time.perf_counter()
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    seconds = time.perf_counter() - started
    return sum(len(encoding.ids) for encoding in encodings), seconds


def raw_part(path: Path, folder: Path, part: int, ready: Any, results: Any) -> None:
    """Encode every second document when all processes are ready."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = read_texts(path)[part::2]
    ready.wait()
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    results.put((sum(len(encoding.ids) for encoding in encodings), time.time()))


def raw_twice(path: Path, folder: Path) -> tuple[int, float]:
    """(tokens, seconds) of two processes at once."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(3), context.Queue()
    parts = [context.Process(target=raw_part, args=(path, folder, part, ready, results)) for part in range(2)]
    for process in parts:
        process.start()
    ready.wait()
    started = time.time()
    done = [results.get() for _ in parts]
    for process in parts:
        process.join()
    return sum(tokens for tokens, _ in done), max(ended for _, ended in done) - started


def mapped(path: Path, folder: Path, scratch: Path) -> tuple[int, float]:
    """(tokens, seconds) of the data sets library."""
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [e.ids for e in tokenizer.encode_batch(rows["text"], add_special_tokens=False)]}

    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(scratch / "cache"))
    done = rows.map(encode, batched=True, remove_columns=["text"], cache_file_name=str(scratch / "ids.arrow"))
    seconds = time.perf_counter() - started
    return sum(map(len, done["ids"])), seconds


def built(path: Path, folder: Path, scratch: Path, workers: int) -> tuple[int, float]:
    """(tokens, seconds) of arriero."""
    from arriero.config.preprocessing import PreprocessOptions
    from arriero.data.corpus.build import CorpusBuilder

    options = PreprocessOptions(
        model_name_or_path=str(folder),
        input_path=str(path),
        output_prefix=str(scratch / "corpus"),
        workers=workers,
        log_interval=10**9,
    )
    started = time.perf_counter()
    totals = CorpusBuilder(options).build()
    return totals.tokens, time.perf_counter() - started


def cpu_seconds() -> float:
    """Of this process and those it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(way: str, path: Path, folder: Path) -> tuple[int, float]:
    """(tokens, seconds) of one way, in this process."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        if way == "raw":
            return raw(path, folder)
        if way == "raw2":
            return raw_twice(path, folder)
        if way == "map":
            return mapped(path, folder, Path(scratch))
        return built(path, folder, Path(scratch), 2 if way == "arriero2" else 1)


def measure_apart(way: str, path: Path, folder: Path) -> tuple[int, float, float]:
    """`measure` in a fresh process: (tokens, seconds, CPU seconds of all of it, reading included)."""
    command = [sys.executable, __file__, "--way", way, "--input", str(path), "--tokenizer", str(folder)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    tokens, seconds, cpu = json.loads(output.splitlines()[-1])
    return int(tokens), float(seconds), float(cpu)


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json; default: that of SmolLM2")
    parser.add_argument("--megabytes", type=float, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    records.add_json(parser)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--input", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        before = cpu_seconds()
        print(json.dumps([*measure(arguments.way, arguments.input, arguments.tokenizer), cpu_seconds() - before]))
        return
    folder = arguments.tokenizer
    if folder is None:
        from arriero.formats.download import resolve_model

        folder = resolve_model("smollm2-135m-instruct")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "documents.jsonl"
        write_documents(arguments.text, path, arguments.megabytes)
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        for round_number in range(arguments.rounds):
            counts = set()
            for way in WAYS:
                tokens, seconds, cpu = measure_apart(way, path, folder)
                counts.add(tokens)
                speeds[way].append(tokens / seconds)
                print(
                    f"round {round_number + 1}: {way:8} {tokens / seconds:12,.0f} tokens/s, "
                    f"{tokens / cpu:12,.0f} tokens a CPU second",
                    flush=True,
                )
            if len(counts) != 1:
                raise SystemExit(f"the ways do not agree on the number of tokens: {sorted(counts)}")
    report(speeds, arguments.megabytes)
    peers = {"raw": "tokenizers.encode_batch", "map": "datasets.map"}
    what = f"preprocess of {arguments.megabytes:g} MB, 1 worker"
    told = [
        Record.of_rounds(
            "preprocess", f"{what}, beside {name}", "tok/s", speeds["arriero"], speeds[way], peer_name=name, threads=1
        )
        for way, name in peers.items()
    ]
    records.write(arguments.json, told)


def report(speeds: dict[str, list[float]], megabytes: float) -> None:
    """Print the row for benchmarks/README.md."""

    def ratio(above: str, below: str) -> str:
        each = [a / b for a, b in zip(speeds[above], speeds[below], strict=True)]
        return f"{statistics.median(each):.2f} ({', '.join(f'{value:.2f}' for value in each)})"

    speed = {way: f"{statistics.median(values):,.0f}" for way, values in speeds.items()}
    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "datasets", "numpy"))
    machine = f"{os.cpu_count()} cores {platform.machine()}"
    ways = ["raw", "raw, 2 processes", "map", "arriero, 1 worker", "2 workers"]
    print(f"\n| Date | Machine | Versions | Text | {' | '.join(ways)} | 1 / raw | 1 / map | 2 / 1 | raw 2 / raw |")
    print(f"|{' --- |' * 13}")
    print(
        f"| {datetime.date.today()} | {machine} | {versions} | {megabytes:g} MB jsonl | "
        f"{' | '.join(f'{speed[way]} tok/s' for way in WAYS)} | {ratio('arriero', 'raw')} | {ratio('arriero', 'map')} | "
        f"{ratio('arriero2', 'arriero')} | {ratio('raw2', 'raw')} |"
    )


if __name__ == "__main__":
    main()
