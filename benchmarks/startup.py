"""What it takes to begin: `arriero --help`, `import arriero`, the packages that an installation brings, the size of the wheel.

    make bench BENCH=startup

Each start is a process of its own; the median of `--rounds` is told. Packages are those that the core needs, without extras,
beside torch and what torch needs itself. The wheel is built without a network, by the setuptools that is here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from statistics import median

import records
from packaging.requirements import Requirement
from records import Record

ROOT = Path(__file__).parents[1]
IMPORT = "import time; t = time.perf_counter(); import arriero; print(time.perf_counter() - t)"
WITHOUT_TORCH = "import sys, arriero; assert 'torch' not in sys.modules"


def seconds_of(command: list[str], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - start)
    return found[1:]  # the first fills the page cache


def seconds_of_import(rounds: int) -> list[float]:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True)
    command = [sys.executable, "-c", IMPORT]
    told = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(rounds + 1)]
    return [float(text) for text in told[1:]]


def needed(package: str) -> set[str]:
    """The package and all that it needs, as installed here, without extras but those that are asked for."""
    found: set[str] = set()
    waiting = [(package, frozenset[str]())]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        found.add(re.sub(r"[-_.]+", "-", name).lower())
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # of another platform
            continue
        for requirement in map(Requirement, lines):
            wanted = [{"extra": extra} for extra in ("", *extras)]
            if requirement.marker is not None and not any(requirement.marker.evaluate(dict(w)) for w in wanted):
                continue
            entry = (requirement.name, frozenset(requirement.extras))
            if entry not in seen:
                seen.add(entry)
                waiting.append(entry)
    return found


def wheel_bytes() -> int | None:
    """Of the wheel, built from a copy, so that nothing of an earlier build is in it; None where it cannot be built here."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--wheel-dir", scratch, str(source)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            print(built.stderr[-500:], file=sys.stderr)
            return None
        return next(Path(scratch).glob("arriero-*.whl")).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    records.add_json(parser)
    given = parser.parse_args()
    helped = seconds_of([sys.executable, "-m", "arriero", "--help"], given.rounds)
    imported = seconds_of_import(given.rounds)
    packages = needed("arriero") - needed("torch") - {"arriero"}
    size = wheel_bytes()
    told = [
        Record("startup", "arriero --help", median(helped), "s", threads=1, dtype=""),
        Record("startup", "import arriero, without torch", median(imported), "s", threads=1, dtype=""),
        Record(
            "startup",
            "packages beside torch",
            float(len(packages)),
            "packages",
            dtype="",
            note=", ".join(sorted(packages)),
        ),
    ]
    if size is not None:
        told.append(Record("startup", "wheel", size / 1e6, "MB", dtype=""))
    else:
        told.append(
            Record("startup", "wheel", None, "MB", dtype="", note="not built here: pip install 'setuptools>=77' wheel")
        )
    for record in told:
        print(f"{record.what:32} {'' if record.ours is None else f'{record.ours:.3g}'} {record.unit}  {record.note}")
    records.write(given.json, told)


if __name__ == "__main__":
    main()
