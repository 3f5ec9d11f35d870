"""Pre-training that cannot go well: full disks, damaged checkpoints, tokenizers and corpora of other models."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from arriero.cli import main

TRAINING = (
    *("--input_dir", "corpus", "--max_seq_length", "16", "--per_device_train_batch_size", "2", "--max_steps", "6"),
    *(
        "--learning_rate",
        "1e-3",
        "--save_steps",
        "2",
        "--logging_steps",
        "1",
        "--report_to",
        "none",
        "--split",
        "1,0,0",
    ),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of ids below 500, and a run of six steps from scratch."""
    folder = tmp_path_factory.mktemp("work")
    random = np.random.default_rng(4)
    lens = random.integers(5, 40, 60).astype(np.int32)
    (folder / "corpus").mkdir()
    np.save(folder / "corpus" / "a_ids.npy", random.integers(3, 500, lens.sum()).astype(np.uint16))
    np.savez(folder / "corpus" / "a_idx.npz", lens=lens, docs=np.arange(61))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["pretrain", *TRAINING, "--output_dir", "whole"]) == 0
    return folder


@dataclass(frozen=True)
class Pretrain:
    """The command in this process, in the folder of the corpus."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str, file_limit: int | None = None) -> str:
        """What it prints; with a limit the system refuses to let any file grow beyond it, in the middle of a write."""
        assert self._main(arguments, file_limit) == 0, self.capsys.readouterr()
        return self.capsys.readouterr().out

    def refused(self, *arguments: str, file_limit: int | None = None) -> str:
        """The one line of an error that the user can mend."""
        self.capsys.readouterr()
        assert self._main(arguments, file_limit) == 2, self.capsys.readouterr()
        lines = [line for line in self.capsys.readouterr().err.splitlines() if line.startswith("arriero: ")]
        lines = [line for line in lines if "warning: " not in line]
        assert len(lines) == 1, lines
        return lines[0]

    def _main(self, arguments: tuple[str, ...], file_limit: int | None) -> int:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit or soft, hard))  # Python ignores the signal of it
        try:
            return main(["pretrain", *TRAINING, *arguments])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def pretrain(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pretrain:
    monkeypatch.chdir(work)
    return Pretrain(capsys)


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def interrupted(work: Path, run: Path) -> Path:
    """A copy of the whole run as if it had died after step 4."""
    shutil.copytree(work / "whole", run)
    shutil.rmtree(run / "checkpoint-6")
    (run / "model.safetensors").unlink()
    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("more", [(), ("--async_save",)], ids=["", "async"])
@pytest.mark.parametrize("share", [0.5, 1.5], ids=["weights", "optimizer"])
def test_a_save_that_breaks_off_in_the_middle(
    share: float, more: tuple[str, ...], work: Path, pretrain: Pretrain, tmp_path: Path
) -> None:
    """In the weights, or after them in the optimizer: told in one line, nothing half-written, and the run can go on."""
    torn = interrupted(work, tmp_path / "torn")
    before = contents(torn / "checkpoint-2") | contents(torn / "checkpoint-4")
    size = (work / "whole" / "model.safetensors").stat().st_size
    options = ("--output_dir", str(torn), "--resume_from_checkpoint", "auto", *more)
    line = pretrain.refused(*options, file_limit=int(size * share))
    assert f"{torn}/checkpoint-6: the checkpoint could not be written" in line
    assert "earlier checkpoints are intact" in line
    assert contents(torn / "checkpoint-2") | contents(torn / "checkpoint-4") == before
    assert [path.name for path in torn.iterdir() if "partial" in path.name or path.name == "checkpoint-6"] == []
    assert "at step 4" in pretrain(*options)
    assert same_weights(torn, work / "whole")


def test_a_final_model_that_does_not_fit(work: Path, pretrain: Pretrain, tmp_path: Path) -> None:
    """No part of it stays in the folder or beside it."""
    run = tmp_path / "run"
    size = (work / "whole" / "model.safetensors").stat().st_size
    line = pretrain.refused("--output_dir", str(run), "--save_strategy", "no", file_limit=size // 2)
    assert f"{run}: " in line
    assert "limit on file sizes" in line
    assert not list(run.glob("*.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_log_that_cannot_grow(pretrain: Pretrain, tmp_path: Path) -> None:
    log = tmp_path / "run" / "train_log.jsonl"
    options = ("--output_dir", str(log.parent), "--save_strategy", "no", "--max_steps", "40")
    assert f"{log}: cannot be written (File too large)" in pretrain.refused(*options, file_limit=8192)
    assert not (log.parent / "model.safetensors").exists()


def test_a_damaged_checkpoint_is_named_and_not_kept_in_place_of_a_whole_one(
    work: Path, pretrain: Pretrain, tmp_path: Path
) -> None:
    torn = interrupted(work, tmp_path / "torn")
    shutil.copytree(work / "whole" / "checkpoint-6", torn / "checkpoint-6")
    path = torn / "checkpoint-6" / "optimizer" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    options = ("--output_dir", str(torn), "--save_total_limit", "1", "--save_steps", "1")
    printed = pretrain(*options, "--resume_from_checkpoint", "auto")
    assert f"warning: {path}: differs from manifest.json" in printed
    assert f"resumed from {torn}/checkpoint-4 at step 4" in printed
    assert [entry.name for entry in torn.glob("checkpoint-*")] == ["checkpoint-6"]
    assert same_weights(torn / "checkpoint-6", work / "whole" / "checkpoint-6")
    assert same_weights(torn, work / "whole")


def test_tokenizer_corpus_and_model_must_belong_together(work: Path, pretrain: Pretrain, smollm2: Path) -> None:
    # a tokenizer of 49,152 tokens with a model of 2,048
    into = ("--output_dir", "refused")
    line = pretrain.refused(*into, "--continue_training", "--tokenizer_name_or_path", str(smollm2))
    assert "49152 tokens and the model only 2048 embeddings" in line
    assert "--tokenizer_name_or_path" in line
    # an id beyond the tokenizer's
    (work / "large").mkdir()
    np.save(work / "large" / "b_ids.npy", np.array([5, 7, 2048, *[9] * 40], np.uint16))
    np.savez(work / "large" / "b_idx.npz", lens=np.array([2, 41], np.int32), docs=np.arange(3))
    for more in ((), ("--continue_training",)):
        line = pretrain.refused(*into, "--input_dir", "large", *more)
        assert "large/b: token id 2048 in document 1 (its token 0) is outside the vocabulary of 2,048" in line
    assert not (work / "refused").exists()
    # a fresh model grows to its tokenizer instead
    shape = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    (work / "small.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2, **shape}))
    pretrain(
        "--config_name",
        "small.json",
        "--tokenizer_name_or_path",
        "__internal_testing__/tiny-random-llama",
        "--save_strategy",
        "no",
        "--max_steps",
        "1",
        "--output_dir",
        "grown",
    )
    assert json.loads((work / "grown" / "config.json").read_text())["vocab_size"] == 2048


def test_a_resumed_run_must_see_the_same_data(work: Path, pretrain: Pretrain, tmp_path: Path) -> None:
    """Anything that would put the samples into another order is refused by name, and a shorter run; a longer one is not."""
    run = tmp_path / "run"
    shutil.copytree(work / "whole", run)
    before = contents(run / "checkpoint-6")
    options = ("--output_dir", str(run), "--resume_from_checkpoint", "1")
    for change, said in (
        (("--seed", "7"), "parts.0.seed was 42 and is 7"),
        (("--max_seq_length", "15"), "sequence_length was 16 and is 15"),
        (("--split", "9,1,0"), "parts.0.documents.1 was 60 and is 54"),
        (("--document_order", "shuffled"), "parts.0.document_order was file and is shuffled"),
        (("--per_device_train_batch_size", "3"), "rows_per_step was 2 and is 3"),
        (("--reset_attention_mask",), "reset_attention_mask was False and is True"),
    ):
        line = pretrain.refused(*options, *change)
        assert "checkpoint-6 was trained on other data: " in line
        assert said in line
    line = pretrain.refused(*options, "--max_steps", "5")
    assert "checkpoint-6 is 6 steps into its run and this one would end after 5" in line
    pretrain(*options, "--max_steps", "7")
    assert json.loads((run / "all_results.json").read_text())["train_steps"] == 7
    assert contents(run / "checkpoint-6") == before


def write_pair(prefix: Path, ids: list[int], lens: list[int]) -> str:
    prefix.parent.mkdir(exist_ok=True)
    np.save(f"{prefix}_ids.npy", np.array(ids, np.uint16))
    np.savez(f"{prefix}_idx.npz", lens=np.array(lens, np.int32), docs=np.arange(len(lens) + 1))
    return str(prefix)


@pytest.mark.parametrize(
    ("ids", "lens", "said"),
    [
        ([5] * 100, [40, 50], ("100", "90")),
        ([5] * 100, [40, 70], ("100", "110")),
        ([], [], ("no ",)),
        ([5] * 16, [10, 6], ("16 tokens", "--max_seq_length")),
    ],
    ids=["ids-left-over", "ids-missing", "empty", "sequence-too-long"],
)
def test_corpora_that_cannot_be_trained_on(
    ids: list[int], lens: list[int], said: tuple[str, ...], pretrain: Pretrain, tmp_path: Path
) -> None:
    prefix = write_pair(tmp_path / "bad" / "corpus", ids, lens)
    line = pretrain.refused("--input_dir", prefix, "--output_dir", str(tmp_path / "run"))
    assert prefix in line
    assert all(part in line for part in said), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [(), ("--reset_attention_mask",), ("--best_fit_packing", "--reset_attention_mask")])
def test_documents_of_one_token(more: tuple[str, ...], pretrain: Pretrain, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "ones" / "corpus", [3 + i % 50 for i in range(400)], [1] * 400)
    pretrain("--input_dir", prefix, "--output_dir", str(tmp_path / "run"), "--save_strategy", "no", *more)
    records = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(0 < record["loss"] < 9 for record in records)


def test_an_index_cache_that_was_half_written_is_made_anew(work: Path, pretrain: Pretrain, tmp_path: Path) -> None:
    shutil.copytree(work / "corpus", tmp_path / "corpus", ignore=shutil.ignore_patterns("index-cache"))
    options = ("--input_dir", str(tmp_path / "corpus"), "--save_strategy", "no", "--output_dir")
    pretrain(*options, str(tmp_path / "first"))
    [order] = (tmp_path / "corpus" / "index-cache").rglob("shuffle_idx.npy")
    whole = order.read_bytes()
    order.write_bytes(whole[:-9])
    pretrain(*options, str(tmp_path / "second"))
    assert same_weights(tmp_path / "second", work / "whole")
    assert order.read_bytes() == whole
