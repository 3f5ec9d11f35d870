"""What the benchmarks make of figures: laws against closed forms, exponents, goals, records."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HIDDEN, INNER, LAYERS, WORDS, HEADS, HEAD = 288, 768, 6, 32000, 6, 48  # of configs/models/llama-15m
LAYER = 4 * HIDDEN**2 + 3 * HIDDEN * INNER
INFINITE = math.inf
Load = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A program of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_law_of_training_is_6n_and_attention(module: Load) -> None:
    peak = module("peaks").Peaks(mkl=1.0, onednn=1.0, copy=1.0, read=1.0)
    tokens = 512
    weights = 6 * (LAYERS * LAYER + WORDS * HIDDEN) * tokens
    attention = 12 * HEADS * HEAD * LAYERS * tokens * (tokens + 1) / 2
    found = module("growth_laws").law("train-sequence", tokens, peak)
    assert found.seconds == pytest.approx(weights + attention)


def test_the_law_of_decoding_is_what_is_slower(module: Load) -> None:
    laws, peaks = module("growth_laws"), module("peaks").Peaks
    seen = 128 + 12 + 1  # tokens, in the mean over a point's steps
    norms = (2 * LAYERS + 1) * HIDDEN
    read = 4 * (LAYERS * LAYER + norms + WORDS * HIDDEN + 8 * 2 * LAYERS * HEADS * HEAD * seen)
    reading = laws.law("decode", 8, peaks(INFINITE, INFINITE, 1.0, 1.0)).seconds
    assert reading == pytest.approx(read)
    computing = laws.law("decode", 8, peaks(1.0, 1.0, 1.0, INFINITE)).seconds
    assert computing == pytest.approx(8 * (2 * (LAYERS * LAYER + WORDS * HIDDEN) + 4 * HEADS * HEAD * LAYERS * seen))


def test_processes_follow_the_cores_and_then_the_plan(module: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    laws = module("growth_laws")
    monkeypatch.setattr(laws.os, "cpu_count", lambda: 2)
    peak = module("peaks").Peaks(1e11, 1e11, 1e10, 1e10)
    one, two, four, eight = (laws.law("ranks", x, peak) for x in (1, 2, 4, 8))
    assert two.seconds == four.seconds == pytest.approx(one.seconds / 2)
    assert one.seconds / 8 <= eight.seconds < one.seconds / 4
    assert one.bytes > two.bytes > four.bytes > eight.bytes


@pytest.mark.parametrize(("power", "fast"), [(1.0, False), (1.1, False), (1.2, True)])
def test_what_grows_faster_than_its_law_is_marked(module: Load, power: float, fast: bool) -> None:
    growth, law = module("growth"), module("growth_laws").Law
    points = [growth.Point(x, 3.0 * x**power, 2.0**20 * x**power, law(x * 0.5, 2.0**20 * x)) for x in (16, 64, 256)]
    found = growth.Found("prefill", points)
    assert found.exponents("seconds") == (pytest.approx(power), pytest.approx(1.0))
    assert [found.too_fast(kind) for kind in ("seconds", "bytes")] == [fast, fast]
    assert [bool(record.note) for record in found.records(2)] == [fast, fast]
    assert len(found.rows()) == 2


def test_ratios_say_that_ours_is_better(module: Load) -> None:
    record = module("records").Record
    faster = record.of_rounds("train", "x", "tok/s", [10.0, 30.0, 20.0], [5.0, 10.0, 20.0])
    assert (faster.ours, faster.peer, faster.ratios, faster.ratio) == (20.0, 10.0, (2.0, 3.0, 1.0), 2.0)
    smaller = record.of_costs("train", "x", "GiB", [2.0], [3.0])
    assert smaller.ratio == 1.5


def test_records_come_back_from_their_file(module: Load, tmp_path: Path) -> None:
    records = module("records")
    told = [
        records.Record.of_rounds("train", "x", "tok/s", [2.0, 3.0], [1.0, 1.0]),
        records.Record("a", "b", None, "s"),
    ]
    for record in told:
        records.write(tmp_path / "new" / "found.jsonl", [record])
    assert records.read(tmp_path / "new" / "found.jsonl") == told


def test_goals_of_figures(module: Load) -> None:
    record, goals = module("records").Record, module("goals")

    def met(program: str, what: str, ours: float, theirs: float) -> bool | None:
        one = record.of_rounds(program, what, "x", [ours], [theirs])
        goal = goals.goal_of(one)
        return None if goal is None else goal.met(one)

    assert met("train", "full fine-tune of 135M, real rows", 1.4, 1.0) is True
    assert met("train", "full fine-tune of 135M, real rows", 1.2, 1.0) is False
    assert met("train", "full fine-tune of 135M, real rows: peak memory", 1.1, 1.0) is True
    assert met("export", "int4 bundle, decode 1, beside llama.cpp, a.gguf", 1.2, 1.0) is False
    assert met("export", "int4 bundle, decode 1, beside onnxruntime-genai int4", 1.2, 1.0) is True
    assert met("roofline", "convert to hf", 0.1, 1.0) is None
    missing = record("export", "export, beside x", None, "", peer_name="x", note="not installed: how")
    assert "not installed: how" in goals.row(missing)
    slow = record("startup", "arriero --help", 0.4, "s")
    assert "**no**" in goals.row(slow)


def test_a_missing_peer_is_named_and_not_skipped(module: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = module("all")
    peer = everything.Peer(tmp_path / "no/python", "litgpt", "make it so")
    monkeypatch.setitem(everything.PEERS, "litgpt", peer)
    assert not peer.installed
    found = everything.run("litgpt", everything.CASES["litgpt"], tmp_path, {"litgpt": False}, write=False)
    assert [(one.ours, one.peer_name, one.note) for one in found] == [(None, "litgpt", "not installed: make it so")]


def test_a_page_is_rewritten_between_its_marks(module: Load, tmp_path: Path) -> None:
    records, page = module("records"), tmp_path / "a.md"
    page.write_text(
        "before\n<!-- made by benchmarks/x.py: begin -->\nold\n<!-- made by benchmarks/x.py: end -->\nafter\n"
    )
    records.between(page, "x.py", "new")
    assert page.read_text().splitlines()[2] == "new"
    assert page.read_text().endswith("end -->\nafter\n")
    with pytest.raises(SystemExit, match="no part"):
        records.between(page, "y.py", "new")


def test_shares_are_of_the_best_peak(module: Load) -> None:
    roofline, peaks = module("roofline"), module("peaks").Peaks
    best = peaks(100e9, 90e9, 1e9, 10e9).best(peaks(80e9, 200e9, 2e9, 5e9))
    assert best == peaks(100e9, 200e9, 2e9, 10e9)
    step = roofline.Result("x", "matrix product", 100.0, 60.0, "GFLOP/s", (0.6, 0.5)).against(best)
    assert (step.limit_value, step.shares) == (200.0, (0.3, 0.25))
    copied = roofline.Result("x", "cp", 1.0, 0.5, "GB/s", (0.5,))
    assert copied.against(best) == copied
