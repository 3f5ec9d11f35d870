"""Data sets by name, through the real `datasets` library on folders that look like those of the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.data.sources import load_samples
from arriero.errors import ConfigError, DataError

pytest.importorskip("datasets")


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_squad_as_the_hub_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "squad"
    folder.mkdir()
    row = {
        "id": "7",
        "title": "Rivers",
        "context": "The Ebro is 930 km long.",
        "question": "How long is the Ebro?",
        "answers": {"text": ["930 km", "930"], "answer_start": [12, 12]},
    }
    write(folder / "train.jsonl", [row, row])
    write(folder / "validation.jsonl", [row])
    samples = load_samples(None, str(folder), "squad_qa", ["train", "dev"])
    assert [len(samples[split]) for split in ("train", "dev")] == [2, 1]
    assert samples["dev"][0].target == "930 km"
    assert samples["dev"][0].references == ("930 km", "930")
    assert "How long is the Ebro?" in samples["dev"][0].prompt


def test_conversations(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    write(folder / "train.jsonl", [{"messages": turns}])
    (sample,) = load_samples(None, str(folder), "chat", ["train"])["train"]
    assert (sample.prompt, sample.target, sample.chat) == ("2+2?", "4", True)


def test_a_missing_split_or_data_set_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "only_train"
    folder.mkdir()
    write(folder / "train.jsonl", [{"src": "a", "tgt": "b"}])
    with pytest.raises(ConfigError, match="has no validation"):
        load_samples(None, str(folder), "chat", ["train", "dev"])
    with pytest.raises(DataError, match="--data_name"):
        load_samples(None, str(tmp_path / "nothing"), "chat", ["train"])


def test_without_data_or_network_it_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """datasets asks six times and waits between."""
    import datasets

    class ConnectError(Exception):
        """As the HTTP libraries call it."""

    asked: list[bool] = []

    def load_dataset(name: str) -> None:
        asked.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("not in the cache")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectError

    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(ConfigError, match=r"give --dataset_path .*the Hub cannot be reached, and the local"):
        load_samples(None, None, None, ["train"])
    assert asked == [True]
    assert datasets.config.HF_HUB_OFFLINE is False
    said = "no data is given: SQuAD v1.1 is taken (rajpurkar/squad of the Hub); --dataset_path FOLDER names your own\n"
    assert capsys.readouterr().out == said
