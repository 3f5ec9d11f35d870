"""How near this machine's limits the work comes: peaks measured first, then each kind of work as a share of its limit.

The limit of arithmetic is the faster of two matrix products (MKL by torch, oneDNN as the engine calls it), that of decoding the
bandwidth of reading memory, that of a corpus `tokenizers.encode_batch` alone, that of a conversion `cp`. FLOPs are those that
the model needs: 6 a weight and token and attention (LoRA about 4), head included, nothing that is computed again.

    make bench BENCH=roofline                                   all, about 5 minutes on 2 quiet cores
    make bench BENCH=roofline ARGS="--write"                    and the table of docs/performance.md
    make bench BENCH=roofline ARGS="--only peaks decode"        some of it
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import convert
import generate
import numpy as np
import peaks
import preprocess
import records
from peaks import Peaks
from records import Record
from sides import run_side
from small_model import save_small, small_config

from arriero.formats.download import resolve_model
from arriero.models.config import LlamaConfig
from arriero.models.presets import find_preset

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs/performance.md"
MODEL = "smollm2-135m-instruct"
ROW, ROWS = 256, 4  # tokens of a row, rows of a step
KINDS = ("peaks", "train", "lora", "decode", "preprocess", "convert")


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        limit: by name; `limit_value` and `value` in `unit`.
        shares: of each round.
    """

    what: str
    limit: str
    limit_value: float
    value: float
    unit: str
    shares: tuple[float, ...]

    @property
    def share(self) -> float:
        return median(self.shares)

    def against(self, peak: Peaks) -> Result:
        """The same beside peaks that were measured later; other limits stay what they are."""
        value = {"matrix product": peak.flops / 1e9, "memory read": peak.read / 1e9}.get(self.limit, self.limit_value)
        shares = tuple(share * self.limit_value / value for share in self.shares)
        return dataclasses.replace(self, limit_value=value, shares=shares)

    def record(self, threads: int) -> Record:
        return Record(
            "roofline",
            self.what,
            self.value,
            self.unit,
            peer_name=self.limit,
            peer=self.limit_value,
            ratios=self.shares,
            threads=threads,
        )

    def row(self) -> str:
        each = f" ({', '.join(f'{share:.0%}' for share in self.shares)})" if len(self.shares) > 1 else ""
        return (
            f"| {self.what} | {self.limit} | {self.limit_value:,.4g} {self.unit} | {self.value:,.4g} {self.unit} "
            f"| **{self.share:.0%}**{each} |"
        )


def noise(count: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Rows of random tokens, all of them learned, as `train.py` takes them."""
    drawn = np.random.default_rng(0).integers(0, vocabulary, (count, ROW + 1)).tolist()
    return [{"input_ids": ids[:-1], "labels": ids[1:], "hf_labels": ids[:-1]} for ids in drawn]


def trained(what: str, model: Path, method: str, rows: int, peak: Peaks, given: argparse.Namespace) -> Result:
    """Steps of `train.py`'s own side; the first is not counted."""
    steps = given.steps + 1
    options = ["--method", method, "--model", str(model), "--batch", str(rows), "--steps", str(steps)]
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.json"
        data.write_text(json.dumps(noise(rows * steps, LlamaConfig.from_file(model).vocab_size)))
        threads = str(given.threads)
        found = run_side(str(HERE / "train.py"), options, "arriero", data, OMP_NUM_THREADS=threads)
    rates = [flops / seconds for flops, seconds in zip(found["flops"][1:], found["seconds"][1:], strict=True)]
    name = f"{what}, {rows} x {ROW} tokens"
    shares = tuple(rate / peak.flops for rate in rates)
    return Result(name, "matrix product", peak.flops / 1e9, median(rates) / 1e9, "GFLOP/s", shares)


def train(peak: Peaks, given: argparse.Namespace) -> list[Result]:
    with tempfile.TemporaryDirectory() as scratch:
        small = save_small(Path(scratch) / "small")
        size = small_config().num_parameters() / 1e6
        return [
            trained(f"pre-training step, {size:.0f}M", small, "full", 4 * ROWS, peak, given),
            trained("pre-training step, 135M", resolve_model(given.model), "full", ROWS, peak, given),
        ]


def lora(peak: Peaks, given: argparse.Namespace) -> list[Result]:
    return [trained("LoRA step (rank 8), 135M", resolve_model(given.model), "lora", ROWS, peak, given)]


def decode(peak: Peaks, given: argparse.Namespace) -> list[Result]:
    """`generate.py`'s own side."""
    cases = {
        "batch_1": ("decoding, 1 sequence", "answers"),
        "batch_8": ("decoding, 8 sequences", "answers"),
        "prefill_512": ("prompt of 512", "prompts"),
        "prefill": ("prompt of 2,048", "prompts"),
    }
    options = ["--model", given.model, "--threads", str(given.threads), "--cases", *cases]
    names = argparse.Namespace(cases=list(cases))
    jobs = generate.make_jobs(names, resolve_model(given.model))
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "jobs.json"
        data.write_text(json.dumps({case: asdict(job) for case, job in jobs.items()}))
        threads = str(given.threads)
        runs = [
            run_side(str(HERE / "generate.py"), options, "arriero", data, OMP_NUM_THREADS=threads)["cases"]
            for _ in range(given.rounds)
        ]
    found = []
    for case, (what, phase) in cases.items():
        rates = [run[case]["record"][phase] for run in runs]
        computed = median(rate["gflops"] * 1e9 / peak.flops for rate in rates)
        read = median(rate["gigabytes"] * 1e9 / peak.read for rate in rates)
        key, limit, unit = (
            ("gflops", peak.flops, "GFLOP/s") if computed > read else ("gigabytes", peak.read, "GB/s")
        )  # the nearer limit is the one that holds
        values = [rate[key] for rate in rates]
        name = "matrix product" if key == "gflops" else "memory read"
        shares = tuple(value * 1e9 / limit for value in values)
        found.append(Result(what, name, limit / 1e9, median(values), unit, shares))
    return found


def corpus(_: Peaks, given: argparse.Namespace) -> list[Result]:
    """`preprocess.py`'s ways "raw" and "arriero", in turns."""
    folder = resolve_model(given.model)
    speeds: dict[str, list[float]] = {"raw": [], "arriero": []}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "documents.jsonl"
        preprocess.write_documents(preprocess.TEXT, path, given.megabytes)
        for _ in range(given.rounds):
            for way, found in speeds.items():
                tokens, seconds, _ = preprocess.measure_apart(way, path, folder)
                found.append(tokens / seconds / 1e6)
    raw, own = speeds["raw"], speeds["arriero"]
    shares = tuple(a / b for a, b in zip(own, raw, strict=True))
    what = f"preprocess, 1 worker, {given.megabytes:g} MB"
    return [Result(what, "tokenizers.encode_batch, 1 thread", median(raw), median(own), "M tokens/s", shares)]


def converted(_: Peaks, given: argparse.Namespace) -> list[Result]:
    """`convert.py`'s runs of some layers of LLaMA-7B's shape, beside `cp`, in turns."""
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        source, copy = Path(scratch) / "model", Path(scratch) / "copy"
        config = dataclasses.replace(find_preset(convert.MODEL).config, num_hidden_layers=given.layers, layer_types=())
        size, _ = convert.make_model(source, config)
        targets = {to: Path(scratch) / ("new.gguf" if to == "gguf" else "new") for to in ("hf", "gguf")}
        plain: list[float] = []
        spent: dict[str, list[float]] = {to: [] for to in targets}
        for _ in range(given.rounds):
            plain.append(convert.once(source, copy, partial(convert.copied, source, copy, compared=False))[0])
            for to, target in targets.items():
                line = convert.command(source, target, to, verify=False)
                spent[to].append(convert.once(source, target, partial(convert.measured, line))[0])
    found = []
    for to, seconds in spent.items():
        shares = tuple(a / b for a, b in zip(plain, seconds, strict=True))
        rates = [size / 1e9 / median(times) for times in (plain, seconds)]
        what = f"convert to {to}, {size / 1e9:.1f} GB, start-up included"
        found.append(Result(what, "cp, and the disk has it", rates[0], rates[1], "GB/s", shares))
    return found


WORK: dict[str, Callable[[Peaks, argparse.Namespace], list[Result]]] = {
    "train": train,
    "lora": lora,
    "decode": decode,
    "preprocess": corpus,
    "convert": converted,
}


def peak_table(found: dict[int, Peaks]) -> str:
    """Markdown."""
    lines = [
        "| Peak | " + " | ".join(f"{n} thread{'s' * (n > 1)}" for n in found) + " |",
        "| --- |" + " ---: |" * len(found),
    ]
    names = {
        "mkl": ("matrix product by MKL (`torch.mm`, 1,024 x 1,024, fp32)", "GFLOP/s"),
        "onednn": ("the same by oneDNN, weights in its layout (the engine's)", "GFLOP/s"),
        "copy": ("copying 256 MiB", "GB/s"),
        "read": ("reading 256 MiB in a sum", "GB/s"),
    }
    for key, (name, unit) in names.items():
        values = [getattr(peak, key) / 1e9 for peak in found.values()]
        lines.append(f"| {name} | " + " | ".join(f"{value:,.1f} {unit}" for value in values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steps", type=int, default=3, help="of training, after one that is not counted")
    parser.add_argument("--rounds", type=int, default=2, help="of all other work")
    parser.add_argument("--megabytes", type=float, default=16, help="of the corpus")
    parser.add_argument("--layers", type=int, default=8, help="of LLaMA-7B's, that are converted")
    parser.add_argument("--folder", type=Path, help="on the disk to convert on; default: that of temporary files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="rewrite the tables of docs/performance.md")
    records.add_json(parser)
    given = parser.parse_args()
    counts = sorted({1, given.threads})
    before = {count: peaks.measure(count) for count in counts}
    found: list[Result] = []
    for kind, work in WORK.items():
        for result in work(before[given.threads], given) if kind in given.only else ():
            found.append(result)
            print(result.row(), file=sys.stderr, flush=True)
    after = {count: before[count].best(peaks.measure(count)) for count in counts}
    found = [result.against(after[given.threads]) for result in found]
    stamp = Record("roofline", "", None, "")
    text = "\n".join(
        [
            peak_table(after),
            "",
            "| What | Limit | of the machine | reached | share (each round) |",
            "| --- | --- | ---: | ---: | ---: |",
            *(result.row() for result in found),
            "",
            f"{stamp.date}, {stamp.machine}, {given.threads} threads, torch {stamp.versions['torch']}, fp32, {given.model}; "
            "peaks: the best before and after.",
        ]
    )
    print(text)
    records.write(given.json, (result.record(given.threads) for result in found))
    if given.write:
        records.between(DOCUMENT, "roofline.py", text)


if __name__ == "__main__":
    main()
