"""Time and memory of what happens between a token corpus and its first row, at the scale of a real corpus.

The corpus has synthetic document lengths (log-normal, mean about `--mean`) and no ids: nothing here reads them. Each step runs
in a process of its own (Linux only); memory is the peak of that process above what it had before the step
(mapped files included).

    .venv/bin/python benchmarks/corpus_index.py --tokens 1e9
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from arriero.data.corpus.best_fit import pack_best_fit
from arriero.data.corpus.blend import blend_schedule
from arriero.data.corpus.index_cache import IndexCache
from arriero.data.corpus.sample_index import build_sample_indexes, plan_epochs, samples_in_epochs
from arriero.data.corpus.token_files import TokenCorpus
from arriero.data.corpus.token_ids import id_range


def document_lengths(tokens: int, mean: int) -> np.ndarray:
    """(D,) int32 lengths, each at most 100,000, that sum to about `tokens`."""
    rng = np.random.default_rng(0)
    sigma = 1.2
    lengths = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, int(tokens / mean * 1.05)).astype(np.int64) + 1
    lengths = np.minimum(lengths, 100_000)
    return lengths[np.cumsum(lengths) <= tokens].astype(np.int32)


def index(arguments: argparse.Namespace, order: str, epochs: float) -> Callable[[], str]:
    lengths = document_lengths(int(arguments.tokens), arguments.mean)
    tokens = int(lengths.sum(dtype=np.int64))

    def step() -> str:
        samples = samples_in_epochs(tokens, arguments.sequence, epochs)
        plan = plan_epochs(tokens, arguments.sequence, samples)
        with tempfile.TemporaryDirectory() as scratch:
            cache = IndexCache([Path(scratch)])
            cache.get(
                {"kind": "benchmark"},
                lambda: build_sample_indexes(lengths, range(len(lengths)), arguments.sequence, plan, 42, order),
                "benchmark",
            )
        return f"{tokens:,} tokens, {len(lengths):,} documents, {plan.samples:,} samples, written to disk"

    return step


def packing(arguments: argparse.Namespace) -> Callable[[], str]:
    lengths = document_lengths(int(arguments.tokens), arguments.mean)
    offsets = np.cumsum(lengths, dtype=np.int64) - lengths

    def step() -> str:
        packs = pack_best_fit(lengths, offsets, arguments.sequence + 1)
        samples = len(packs["sample_pieces"]) - 1
        padding = 1 - int(lengths.sum(dtype=np.int64)) / (samples * (arguments.sequence + 1))
        return f"{len(lengths):,} documents into {samples:,} samples, {padding:.4%} padding"

    return step


def blending(arguments: argparse.Namespace, corpora: int) -> Callable[[], str]:
    weights = np.random.default_rng(0).random(corpora)
    weights /= weights.sum()

    def step() -> str:
        blend_schedule(weights, int(arguments.samples))
        return f"{int(arguments.samples):,} samples of {corpora} corpora"

    return step


def checking(arguments: argparse.Namespace) -> Callable[[], str]:
    scratch = tempfile.NamedTemporaryFile()  # noqa: SIM115 (the file lives as long as the process)
    count = int(arguments.tokens)
    for start in range(0, count, 1 << 24):
        scratch.write(np.full(min(1 << 24, count - start), 7, np.uint16).tobytes())
    scratch.flush()
    tokens = np.asarray(np.memmap(scratch.name, np.uint16, "r"))
    corpus = TokenCorpus(Path("x"), "mmap", tokens, np.array([count], np.int32), np.zeros(1, np.int64))

    def step() -> str:
        id_range(corpus)
        return f"{count:,} ids of 2 bytes, in the page cache"

    step.scratch = scratch  # type: ignore[attr-defined]
    return step


STEPS: dict[str, Callable[[argparse.Namespace], Callable[[], str]]] = {
    "index, file order": lambda a: index(a, "file", 1),
    "index, shuffled documents": lambda a: index(a, "shuffled", 1),
    "index, 3.5 epochs": lambda a: index(a, "shuffled", 3.5),
    "best-fit packing": packing,
    "blend of 2": lambda a: blending(a, 2),
    "blend of 50": lambda a: blending(a, 50),
    "check of the ids": checking,
}


def memory(field: str) -> float:
    """MiB of a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def run_step(name: str, arguments: argparse.Namespace, results: Connection) -> None:
    step = STEPS[name](arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: making the input took memory, too
    before = memory("VmRSS")
    start = time.perf_counter()
    text = step()
    seconds = time.perf_counter() - start
    results.send((text, seconds, memory("VmHWM") - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e9, help="tokens of the corpus")
    parser.add_argument("--mean", type=int, default=500, help="mean tokens of a document")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--samples", type=float, default=1e7, help="samples of a blend")
    arguments = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, one process, numpy {np.__version__}")
    context = multiprocessing.get_context("spawn")
    for name in STEPS:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=run_step, args=(name, arguments, sender))
        process.start()
        text, seconds, peak = receiver.recv()
        process.join()
        print(f"{name:27}{seconds:8.2f} s {peak:8.0f} MiB   {text}", flush=True)


if __name__ == "__main__":
    main()
