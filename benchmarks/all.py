"""All benchmarks in a row, each a process of its own, and one table: what was measured beside what must be reached.

    make bench BENCH=all                                what can run here, about 50 minutes on 2 quiet cores
    make bench BENCH=all ARGS="--list"                  the commands, their minutes, and which peers are missing
    make bench BENCH=all ARGS="--only startup train"    some of them
    make bench BENCH=all ARGS="--install"               make the environments of missing peers first (many minutes)
    make bench BENCH=all ARGS="--table"                 measure nothing: the table of what was measured last

Records are added to benchmarks/results/all.jsonl; the table of the newest of each is benchmarks/results/all.md, and with
`--write` in docs/performance.md, beside a picture of the ratios. What each program prints is in runs/benchmarks/. A peer that
is not there is named in the table.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import goals
import litgpt_side
import paddlenlp_side
import ratio_picture
import records
import torchtune_side
from records import Record
from sides import make_environment

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results/all.jsonl"
TABLE = HERE / "results/all.md"
DOCUMENT = ROOT / "docs/performance.md"
PICTURE, SHORT_PICTURE = ROOT / "docs/performance.png", ROOT / "docs/peers.png"  # the second is the README's
LOGS = ROOT / "runs/benchmarks"
GENAI = ROOT / ".venv-genai"
GENAI_PACKAGES = ("onnxruntime-genai==0.18.0", "onnx-ir", "torch==2.13.0", "transformers==5.23.0")
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Peer:
    """A program to compare with.

    Attributes:
        python: of the environment that has it.
        module: to import there.
        how: to get it, in words.
        install: the command that makes its environment, for `--install`.
    """

    python: Path
    module: str
    how: str
    install: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.module!r}) is None)"
        return self.python.is_file() and not subprocess.run([str(self.python), "-c", code], check=False).returncode


OWN = Path(sys.executable)
DEV = "pip install --constraint constraints.txt '.[dev]'"
PEERS = {
    "transformers": Peer(OWN, "transformers", DEV),
    "peft": Peer(OWN, "peft", DEV),
    "bitsandbytes": Peer(OWN, "bitsandbytes", DEV),
    "datasets": Peer(OWN, "datasets", DEV),
    "litgpt": Peer(
        litgpt_side.ENVIRONMENT / "bin/python",
        "litgpt",
        'make bench BENCH=litgpt_side ARGS="--install"',
        (sys.executable, str(HERE / "litgpt_side.py"), "--install"),
    ),
    "torchtune": Peer(
        torchtune_side.ENVIRONMENT / "bin/python",
        "torchtune",
        'make bench BENCH=torchtune_side ARGS="--install"',
        (sys.executable, str(HERE / "torchtune_side.py"), "--install"),
    ),
    "paddlenlp": Peer(
        paddlenlp_side.ENVIRONMENT / "bin/python",
        "paddlenlp",
        'make bench BENCH=paddlenlp_side ARGS="--install"',
        (sys.executable, str(HERE / "paddlenlp_side.py"), "--install"),
    ),
    "llama-cpp-python": Peer(
        PEERS_PYTHON,
        "llama_cpp",
        "make .venv-peers/.installed (compiles llama.cpp, 20 minutes)",
        ("make", "-C", str(ROOT), ".venv-peers/.installed"),
    ),
    "onnxruntime-genai": Peer(
        GENAI / "bin/python",
        "onnxruntime_genai",
        'make bench BENCH=all ARGS="--install --only export"',
        (sys.executable, str(HERE / "all.py"), "--install-genai"),
    ),
}


@dataclass(frozen=True)
class Case:
    """A program with its options.

    Attributes:
        minutes: on 2 quiet cores.
        peers: names in `PEERS` without which it does not run.
        extra: peers that it compares with where they are there.
    """

    program: str
    options: tuple[str, ...]
    minutes: float
    peers: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


KINDS = ("int4", "int4, symmetric", "int4, symmetric, head int4", "aoti int4", "aoti fp32", "eager fp32")
SETTLED = ("--skip", "2")  # the first two steps still get their memory from the kernel
CASES = {
    "startup": Case("startup", (), 0.5),
    "train": Case(
        "train", ("--full_rows", "128", "--batch", "8", "--steps", "6", *SETTLED, "--rounds", "3"), 5, ("transformers",)
    ),
    "finetune": Case("train", ("--batch", "8", "--steps", "5", *SETTLED, "--rounds", "2"), 4, ("transformers",)),
    "lora": Case(
        "train", ("--method", "lora", "--batch", "8", "--steps", "5", *SETTLED, "--rounds", "2"), 4, ("transformers", "peft")
    ),
    "qlora": Case(
        "train", ("--method", "qlora", "--batch", "8", "--steps", "3", "--rounds", "2"), 4,
        ("transformers", "peft", "bitsandbytes"),
    ),
    "recompute": Case(
        "train", ("--recompute", "--full_rows", "256", "--batch", "8", "--steps", "3", "--rounds", "2"), 4, ("transformers",)
    ),
    "compile": Case(
        "train",
        ("--compile", "--full_rows", "128", "--batch", "8", "--steps", "5", *SETTLED, "--rounds", "1"), 5,
        ("transformers",),
    ),
    "train15m": Case(
        "train", ("--full_rows", "256", "--batch", "16", "--steps", "6", "--rounds", "3"), 2, ("transformers",)
    ),
    "load": Case("load", (), 1, ("transformers",)),
    "packing": Case("packing", ("--steps", "3", "--rounds", "2"), 6, ("transformers", "peft")),
    "litgpt": Case("litgpt_side", ("--steps", "3", "--rounds", "2"), 4, ("litgpt",)),
    "torchtune": Case("torchtune_side", ("--steps", "3", "--rounds", "2"), 6, ("torchtune",)),
    "paddlenlp": Case("paddlenlp_side", ("--steps", "2", "--rounds", "1"), 3, ("paddlenlp",)),
    "paddlenlp_lora": Case("paddlenlp_side", ("--lora", "--steps", "2", "--rounds", "1"), 3, ("paddlenlp",)),
    "preprocess": Case("preprocess", ("--megabytes", "32", "--rounds", "3"), 3, ("datasets",)),
    "generate": Case("generate", ("--compile", "--rounds", "2"), 8, ("transformers",)),
    "export": Case(
        "export", ("--kinds", *KINDS, "--rounds", "5"), 12,
        extra=("onnxruntime-genai", "llama-cpp-python"),
    ),
    "serve": Case("serve", ("--rounds", "2", "--threads", "1"), 2),
    "served": Case(
        "serve", ("--peer", "--clients", "16", "--requests", "48", "--tokens", "64", "--threads", "2"), 4,
        ("llama-cpp-python",),
    ),
    "convert": Case("convert", ("--layers", "8", "--runs", "2", "--to", "hf", "paddle", "meta", "gguf"), 5),
    "roofline": Case("roofline", (), 5),
    "growth": Case("growth", (), 6),
}  # fmt: skip
OWN_TABLES = ("roofline", "growth")  # those have one in the document, which `--write` makes


def genai_model(model: Path, folder: Path) -> Path:
    """onnxruntime-genai's own int4 build of the model, made once."""
    if not (folder / "genai_config.json").is_file():
        command = [
            str(GENAI / "bin/python"),
            "-m",
            "onnxruntime_genai.models.builder",
            "-m",
            str(model),
            "-o",
            str(folder),
        ]
        command += ["-p", "int4", "-e", "cpu", "-c", str(folder / "cache")]
        command += ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("w", encoding="utf-8") as output:
            subprocess.run(command, check=True, stdout=output, stderr=output)
    return folder


def more_options(name: str, case: Case, scratch: Path, there: dict[str, bool], write: bool) -> list[str]:
    """What can only be said here: folders, and the peers that are there."""
    if write and name in OWN_TABLES:
        return ["--write"]
    if name == "train15m":
        from small_model import save_small

        return ["--model", str(save_small(scratch / "15M"))]
    if name == "convert":
        return ["--folder", str(scratch / "convert")]
    if name != "export":
        return []
    from serve import published_gguf

    from arriero.formats.download import resolve_model

    model = resolve_model(MODEL)
    found = ["--model", str(model), "--folder", str(scratch / "bundles")]
    if there["onnxruntime-genai"]:
        python = str(PEERS["onnxruntime-genai"].python)
        found += ["--genai", str(genai_model(model, LOGS / "genai")), "--genai-python", python]
    if there["llama-cpp-python"]:
        found += ["--llama", str(published_gguf()), "--llama-python", str(PEERS_PYTHON)]
    return found


def missing(name: str, case: Case, there: dict[str, bool]) -> list[Record]:
    """A record for each peer that is not there: what is not compared, and how to get it."""
    lacking = [peer for peer in (*case.peers, *case.extra) if not there[peer]]
    return [
        Record(
            case.program, f"{name}, beside {peer}", None, "", peer_name=peer, note=f"not installed: {PEERS[peer].how}"
        )
        for peer in lacking
    ]


def run(name: str, case: Case, scratch: Path, there: dict[str, bool], write: bool) -> list[Record]:
    """Run a case and read what it found; a failure is a record too."""
    found, target = missing(name, case, there), scratch / f"{name}.jsonl"
    if any(not there[peer] for peer in case.peers):
        return found
    log = LOGS / f"{name}.log"
    log.unlink(missing_ok=True)
    try:
        options = more_options(name, case, scratch, there, write)
        command = [sys.executable, str(HERE / f"{case.program}.py"), *case.options, *options, "--json", str(target)]
        with log.open("w", encoding="utf-8") as output:
            output.write(" ".join(command) + "\n")
            output.flush()
            subprocess.run(command, check=True, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    except subprocess.CalledProcessError as error:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1][:200] if log.is_file() else str(error)
        return [*found, Record(case.program, name, None, "", note=f"failed ({log.relative_to(ROOT)}): {last}")]
    return [*found, *records.read(target)]


def newest(path: Path) -> list[Record]:
    """The last record of each figure, in the order in which programs, and in them cases, came first.

    What names no missing thing any more is gone.
    """
    kept: dict[tuple[str, str, str], Record] = {}
    for record in records.read(path):
        kept[record.program, record.what, record.peer_name] = record
    there = {name: peer.installed for name, peer in PEERS.items()}
    gone = [
        key for key, record in kept.items()
        if record.note.startswith("not installed") and there.get(record.peer_name, False)
    ]  # fmt: skip
    found = [record for key, record in kept.items() if key not in gone]
    programs = list(dict.fromkeys(record.program for record in found))
    cases = list(dict.fromkeys(map(_case, found)))
    return sorted(found, key=lambda record: (programs.index(record.program), cases.index(_case(record))))


def _case(record: Record) -> tuple[str, str]:
    """What stands together: `batch_1: ...` and `batch_1, compiled: ...`, say."""
    return record.program, re.split("[,:]", record.what)[0]


def table(found: list[Record]) -> str:
    """Markdown: a row a record, and what they were measured with."""
    places = [f"{record.date}, {record.machine}" if record.ours is not None else "" for record in found]
    machines = [place for place in dict.fromkeys(places) if place]
    letters = {"": ""} | {place: chr(ord("a") + at) for at, place in enumerate(machines)}
    rows = [goals.row(record, letters[place]) for record, place in zip(found, places, strict=True)]
    packages: dict[str, set[str]] = {}
    for record in found:
        for name, number in record.versions.items():
            packages.setdefault(name, set()).add(number)
    told = ", ".join(f"{name} {' and '.join(sorted(numbers))}" for name, numbers in packages.items())
    where = "; ".join(f"{letters[place]}: {place}" for place in machines)
    return "\n".join([goals.HEADING, *rows, "", f"{where}. {told}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--table", action="store_true", help="run nothing; make the table anew")
    parser.add_argument("--install", action="store_true", help="make the environments of missing peers first")
    parser.add_argument("--install-genai", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines are added to it")
    parser.add_argument(
        "--write", action="store_true", help="the tables go into docs/performance.md too, with their pictures"
    )
    given = parser.parse_args()
    if given.install_genai:
        make_environment(GENAI, GENAI_PACKAGES)
        return
    chosen = {name: CASES[name] for name in given.only}
    wanted = dict.fromkeys(peer for case in chosen.values() for peer in (*case.peers, *case.extra))
    there = {peer: PEERS[peer].installed for peer in wanted}
    if given.list:
        for name, case in chosen.items():
            lacking = "; ".join(record.note for record in missing(name, case, there))
            print(f"{name:11} {case.minutes:4g} min  {case.program}.py {' '.join(case.options)}  {lacking}")
        print(f"{sum(case.minutes for case in chosen.values()):g} minutes in all")
        return
    if given.install:
        for peer in [name for name, installed in there.items() if not installed and PEERS[name].install]:
            print(f"installing {peer}", flush=True)
            subprocess.run(PEERS[peer].install, check=False)
            there[peer] = PEERS[peer].installed
    if not given.table:
        LOGS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=LOGS) as scratch:
            for name, case in chosen.items():
                start = time.monotonic()
                found = run(name, case, Path(scratch), there, given.write)
                records.write(given.results, found)
                print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
                print("\n".join(map(goals.row, found)), flush=True)
    latest = newest(given.results)
    text = table(latest)
    given.results.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    if given.write:
        records.between(DOCUMENT, "all.py", text)
        ratio_picture.draw(PICTURE, latest)
        ratio_picture.draw_few(SHORT_PICTURE, latest)


if __name__ == "__main__":
    main()
