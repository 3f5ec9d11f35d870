"""Rows of the training files that are kept for the evaluation (--val_size)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.data.pairs import load_pairs
from arriero.data.sources import load_samples
from arriero.errors import DataError

ALL = ["train", "dev"]


def write(path: Path, names: list[str]) -> str:
    rows = [{"src": name, "tgt": "a"} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("size", "held"),
    [(0.2, ["3", "9"]), (3.0, ["2", "6", "10"]), (0.5, ["1", "3", "5", "7", "9", "11"]), (1.0, ["6"])],
)
def test_they_are_spread_over_the_file(size: float, held: list[str], tmp_path: Path) -> None:
    count = len(held)
    path = write(tmp_path / "rows.jsonl", [str(number) for number in range(12)])
    write(tmp_path / "dev.jsonl", ["of another file"])
    found = load_samples(path, None, None, ALL, data_format="src", val_size=size)
    names = {split: [sample.prompt for sample in samples] for split, samples in found.items()}
    assert len(names["dev"]) == count == (round(size * 12) if size < 1 else size)
    assert sorted(names["train"] + names["dev"], key=int) == [str(number) for number in range(12)]
    assert names["train"] == sorted(names["train"], key=int)
    pairs_path = tmp_path / "pairs.jsonl"
    pairs_path.write_text(Path(path).read_text().replace("src", "prompt").replace('"tgt"', '"rejected": "b", "chosen"'))
    pairs = load_pairs(str(pairs_path), ALL, {}, size)
    assert {split: [pair.chosen.prompt for pair in found] for split, found in pairs.items()} == names
    for split in ALL:  # each by itself too: `finetune` without --do_eval, `evaluate`
        alone = load_samples(path, None, None, [split], data_format="src", val_size=size)
        assert [sample.prompt for sample in alone[split]] == names[split]


def test_of_each_file_of_a_mixture_and_before_limits(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [f"a{number}" for number in range(10)])
    second = write(tmp_path / "b.jsonl", [f"b{number}" for number in range(4)])
    limits: dict[str, int | None] = {"train": 5, "dev": 2}
    found = load_samples(f"{first},{second}", None, None, ALL, data_format="src", limits=limits, val_size=0.5)
    assert [(sample.prompt, sample.source) for sample in found["train"]] == [
        *((f"a{number}", 0) for number in (0, 2, 4, 6, 8)), ("b0", 1), ("b2", 1),
    ]  # fmt: skip
    assert [(sample.prompt, sample.source) for sample in found["dev"]] == [("a1", 0), ("a3", 0), ("b1", 1), ("b3", 1)]


@pytest.mark.parametrize(("size", "count"), [(4.0, 4), (0.1, 0), (0.9, 4), (9.0, 9)])
def test_a_row_is_left_on_either_side(size: float, count: int, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", list("abcd"))
    with pytest.raises(DataError, match=f"rows.jsonl: --val_size {size:g} would hold out {count} of 4 rows"):
        load_samples(path, None, None, ["train"], data_format="src", val_size=size)
