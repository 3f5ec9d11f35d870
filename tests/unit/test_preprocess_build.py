"""Corpora against an oracle that reads the inputs in the plainest way; resuming, shards, bad input."""

from __future__ import annotations

import errno
import json
import random
import shlex
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.config.parser import parse
from arriero.config.preprocessing import PreprocessOptions
from arriero.data.corpus import encoding, parts, publishing, units
from arriero.data.corpus.admission import CorpusTotals
from arriero.data.corpus.build import CorpusBuilder
from arriero.data.corpus.documents import sentences_of
from arriero.data.corpus.encoding import EMPTY, KEPT, EncodedUnit, Encoder, EncodingRules
from arriero.data.corpus.fingerprint import check_tokenizer
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.errors import ArrieroError, ConfigError, DataError
from arriero.formats.download import resolve_model

WORDS = [
    "the",
    "a",
    "llama",
    "driver",
    "好",
    "naïve",
    "</s>",
    "<s>",
    "<unk>",
    "------",
    "end.",
    "Why?",
    "12",
    "\n",
    "\n\n",
]


class Interruption(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("__internal_testing__/tiny-random-llama")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 700)


def make_texts(count: int = 150, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    texts = [" ".join(source.choices(WORDS, k=source.choice([0, 1, 3, 20, 60]))) for _ in range(count)]
    texts[7] = "-" * 300
    texts[11] = "   "
    for number in range(20, count, 9):
        texts[number] = texts[number - source.randint(1, 15)]
    return texts


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder of JSON lines files, and its texts in order."""
    texts = make_texts()
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        rows = texts[number * 50 : number * 50 + 50]
        (data / f"{number}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows), encoding="utf-8")
    return data, texts


def options(folder: Path, data: Path, prefix: Path, **values: Any) -> PreprocessOptions:
    return PreprocessOptions(model_name_or_path=str(folder), input_path=str(data), output_prefix=str(prefix), **values)


def run(*arguments: Any, report: Callable[[str], None] = lambda line: None, **values: Any) -> CorpusTotals:
    return CorpusBuilder(options(*arguments, **values), report).build()


def oracle(tokenizer: Tokenizer, texts: list[str], **values: Any) -> tuple[list[int], list[int], list[int]]:
    """(ids, lens, docs) by the written rules, a document at a time."""
    ids: list[int] = []
    lens: list[int] = []
    docs = [0]
    seen = set()
    for text in texts[: values.get("max_doc_num")]:
        if not text.strip() or not values.get("min_doc_length", 0) <= len(text) <= values.get("max_doc_length", 10**9):
            continue
        longest = values.get("max_repeated_len", 100)
        kept = "".join(c for i, c in enumerate(text) if not longest or text[max(0, i - longest) : i] != c * longest)
        if values.get("deduplicate") and kept in seen:
            continue
        seen.add(kept)
        sentences = sentences_of(kept) if values.get("split_sentences") else [kept]
        encoded = [tokenizer.encode(sentence) for sentence in sentences]
        if values.get("append_eos"):
            assert tokenizer.eos_token_id is not None
            encoded[-1] = [*encoded[-1], tokenizer.eos_token_id]
        lens += map(len, encoded)
        ids += [token for sentence in encoded for token in sentence]
        docs.append(len(lens))
    return ids, lens, docs


def read_npy(prefix: Path) -> tuple[list[int], list[int], list[int]]:
    """As PaddleNLP's data set opens the pair, but never unpickling."""
    ids = np.load(f"{prefix}_ids.npy", mmap_mode="r", allow_pickle=False)
    with np.load(f"{prefix}_idx.npz", allow_pickle=False) as index:
        assert sorted(index.files) == ["docs", "lens"]
        assert (ids.dtype, index["lens"].dtype, index["docs"].dtype) == (np.uint16, np.int32, np.int64)
        assert ids.ndim == 1
        assert int(index["lens"].sum()) == len(ids)
        return ids.tolist(), index["lens"].tolist(), index["docs"].tolist()


def read_megatron(prefix: Path) -> tuple[list[int], list[int], list[int]]:
    """By the layout in Megatron-LM's _IndexReader: 34 bytes of header, sizes, byte pointers, document index."""
    index = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sentences, documents = struct.unpack("<9sQBQQ", index[:34])
    assert (magic, version, code) == (b"MMIDIDX\x00\x00", 1, 8)
    sizes = np.frombuffer(index, np.int32, sentences, 34)
    pointers = np.frombuffer(index, np.int64, sentences, 34 + 4 * sentences)
    docs = np.frombuffer(index, np.int64, documents, 34 + 12 * sentences)
    assert len(index) == 34 + 12 * sentences + 8 * documents
    content = Path(f"{prefix}.bin").read_bytes()
    ids: list[int] = []
    for size, pointer in zip(sizes, pointers, strict=True):
        ids += np.frombuffer(content, np.uint16, size, pointer).tolist()
    assert len(content) == 2 * len(ids)
    return ids, sizes.tolist(), docs.tolist()


def files_of(prefix: Path) -> dict[str, bytes]:
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in prefix.parent.iterdir()
        if path.name.startswith(prefix.name)
    }


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"append_eos": True, "deduplicate": True},
        {"split_sentences": True, "append_eos": True, "deduplicate": True},
        {"min_doc_length": 20, "max_doc_length": 200, "max_repeated_len": 3},
        {"max_repeated_len": 0, "max_doc_num": 60},
        {"deduplicate": True, "max_doc_num": 77},
    ],
    ids=lambda values: "+".join(values) or "plain",
)
@pytest.mark.parametrize("data_impl", ["npy", "mmap"])
def test_the_corpus_is_what_the_rules_say(
    values: dict[str, Any],
    data_impl: str,
    inputs: tuple[Path, list[str]],
    folder: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    data, texts = inputs
    totals = run(folder, data, tmp_path / "out" / "c", data_impl=data_impl, **values)
    read = read_npy if data_impl == "npy" else read_megatron
    ids, lens, docs = read(tmp_path / "out" / "c")
    assert (ids, lens, docs) == oracle(tokenizer, texts, **values)
    assert (totals.documents, totals.sentences, totals.tokens) == (len(docs) - 1, len(lens), len(ids))
    left_out = totals.empty + totals.too_short + totals.too_long + totals.duplicates
    assert totals.read == totals.documents + left_out == values.get("max_doc_num", len(texts))
    assert (totals.duplicates > 0) == ("deduplicate" in values)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(
        publishing.Publisher(tmp_path / "c", tmp_path, data_impl).names()
    )


def test_the_ids_are_those_of_encode_also_for_names_of_special_tokens(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text("Ends </s> here\n\n<s> begins", encoding="utf-8")
    run(folder, tmp_path / "x.txt", tmp_path / "c")
    ids = read_npy(tmp_path / "c")[0]
    assert ids == tokenizer.encode("Ends </s> here") + tokenizer.encode("<s> begins")
    assert not set(ids) & set(tokenizer.special_tokens.values())


def test_a_damaged_meta_file_is_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    meta = tmp_path / "c_meta.json"
    for text in ("{", "[]", "{}", "[" * 100_000):
        meta.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"c_meta\.json: is damaged; delete it"):
            check_tokenizer(meta, tokenizer)


def test_meta_tells_where_the_corpus_comes_from(inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path) -> None:
    import hashlib

    run(folder, inputs[0], tmp_path / "c", data_impl="mmap", append_eos=True)
    meta = json.loads((tmp_path / "c_meta.json").read_text(encoding="utf-8"))
    assert meta["tokens_sha256"] == hashlib.sha256((tmp_path / "c.bin").read_bytes()).hexdigest()
    assert meta["files"]["c.bin"]["size"] == (tmp_path / "c.bin").stat().st_size
    assert meta["files"]["c.idx"]["sha256"] == hashlib.sha256((tmp_path / "c.idx").read_bytes()).hexdigest()
    tokenizer_json = (folder / "tokenizer.json").read_bytes()
    assert meta["tokenizer"]["files"]["tokenizer.json"] == hashlib.sha256(tokenizer_json).hexdigest()
    assert meta["options"]["append_eos"] is True
    assert meta["dtype"] == "uint16"


def interrupted(run_once: Callable[[], Any], step: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run and stop at the `step`-th write, in the middle of it; True if there were fewer."""
    written = 0

    def torn(file: Any, data: bytes) -> None:
        nonlocal written
        written += 1
        if written == step:
            file.write(data[: len(data) // 2])
            raise Interruption
        file.write(data)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_all", torn)
        try:
            run_once()
        except Interruption:
            return False
    return True


def test_stopped_at_any_write_it_goes_on_to_the_same_bytes(
    inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = inputs
    values = {"deduplicate": True, "append_eos": True, "max_doc_num": 140}
    run(folder, data, tmp_path / "whole" / "c", **values)
    expected = files_of(tmp_path / "whole" / "c")
    told: list[str] = []
    torn = tmp_path / "torn" / "c"
    stops = 0
    while not interrupted(
        lambda: run(folder, data, torn, report=told.append, **values), 2 + 5 * (stops % 3), monkeypatch
    ):
        stops += 1
        assert not files_of(torn)
        assert stops < 500
    assert stops > 20
    assert files_of(torn) == expected
    assert any(line.startswith("going on after") for line in told)
    assert not (tmp_path / "torn" / ".c.partial").exists()


@pytest.mark.parametrize("step", range(1, 12))
def test_stopped_while_it_publishes_it_goes_on(
    step: int, inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = inputs
    totals = run(folder, data, tmp_path / "whole" / "c")
    torn = tmp_path / "torn" / "c"
    calls = 0

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **values: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                raise Interruption
            return function(*arguments, **values)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(publishing.os, "replace", count(publishing.os.replace))
        patch.setattr(publishing, "sync_file", count(publishing.sync_file))
        patch.setattr(publishing.shutil, "rmtree", count(publishing.shutil.rmtree))
        with pytest.raises(Interruption):
            run(folder, data, torn)
    finished = (tmp_path / "torn" / "c_meta.json").exists()
    if finished:
        assert files_of(torn) == files_of(tmp_path / "whole" / "c")
    ready = (tmp_path / "torn" / ".c.partial" / "ready").is_dir()
    told: list[str] = []
    run(folder, data, torn, report=told.append)
    # Nothing is encoded a second time.
    assert finished or ready or told == [f"going on after 150 documents ({totals.tokens:,} tokens) of an earlier run"]
    assert files_of(torn) == files_of(tmp_path / "whole" / "c")
    assert not (tmp_path / "torn" / ".c.partial").exists()


def test_what_a_power_cut_took_is_found(
    inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = inputs
    run(folder, data, tmp_path / "whole" / "c")
    torn = tmp_path / "torn" / "c"
    assert not interrupted(lambda: run(folder, data, torn), 80, monkeypatch)
    tokens = tmp_path / "torn" / ".c.partial" / "tokens"
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8] = bytes(8)
    tokens.write_bytes(content)
    run(folder, data, torn)
    assert files_of(torn) == files_of(tmp_path / "whole" / "c")


@pytest.mark.parametrize("change", ["options", "inputs"])
def test_left_overs_of_another_run_are_thrown_away(
    change: str, inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = inputs
    assert not interrupted(lambda: run(folder, data, tmp_path / "c"), 40, monkeypatch)
    if change == "inputs":
        with (data / "2.jsonl").open("a") as file:
            file.write('{"text": "one more"}\n')
    told: list[str] = []
    run(folder, data, tmp_path / "c", report=told.append, append_eos=change == "options")
    assert f"left-overs of a run with other {change} are thrown away" in told[0]
    run(folder, data, tmp_path / "other", append_eos=change == "options")
    expected, found = files_of(tmp_path / "other"), files_of(tmp_path / "c")
    assert (found["_ids.npy"], found["_idx.npz"]) == (expected["_ids.npy"], expected["_idx.npz"])


def test_a_complete_corpus_is_not_made_again_and_another_not_overwritten(
    inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path
) -> None:
    data, _ = inputs
    totals = run(folder, data, tmp_path / "c")
    before = files_of(tmp_path / "c")
    told: list[str] = []
    assert run(folder, data, tmp_path / "c", report=told.append) == totals
    assert "is complete already" in told[0]
    with pytest.raises(ConfigError, match="exists already; add --overwrite"):
        run(folder, data, tmp_path / "c", append_eos=True)
    assert files_of(tmp_path / "c") == before
    run(folder, data, tmp_path / "c", append_eos=True, data_impl="mmap", overwrite=True)
    assert sorted(files_of(tmp_path / "c")) == [".bin", ".idx", "_meta.json"]


@pytest.mark.parametrize("values", [{}, {"deduplicate": True}, {"deduplicate": True, "max_doc_num": 101}])
@pytest.mark.parametrize("data_impl", ["npy", "mmap"])
def test_merged_shards_are_the_corpus_of_one_run(
    values: dict[str, Any], data_impl: str, inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path
) -> None:
    data, texts = inputs
    (data / "1b.txt").write_text("\n\n".join(text for text in texts[:40] if text.strip()), encoding="utf-8")
    values = values | {"data_impl": data_impl}
    run(folder, data, tmp_path / "whole" / "c", **values)
    for shard_id in (2, 0, 1):
        run(folder, data, tmp_path / "cut" / "c", num_shards=3, shard_id=shard_id, **values)
        assert not list((tmp_path / "cut").glob("c_*"))
    run(folder, data, tmp_path / "cut" / "c", num_shards=3, merge_shards=True, **values)
    assert files_of(tmp_path / "cut" / "c") == files_of(tmp_path / "whole" / "c")
    told: list[str] = []
    run(folder, data, tmp_path / "cut" / "c", num_shards=3, merge_shards=True, report=told.append, **values)
    assert "is complete already" in told[0]


def test_a_shard_and_a_merge_go_on_after_a_stop(
    inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = inputs
    run(folder, data, tmp_path / "whole" / "c", deduplicate=True)
    torn = tmp_path / "torn" / "c"
    values: dict[str, Any] = {"num_shards": 2, "deduplicate": True}
    for step in (30, 40, 10**6):
        interrupted(lambda: run(folder, data, torn, shard_id=1, **values), step, monkeypatch)
    told: list[str] = []
    run(folder, data, torn, shard_id=1, report=told.append, **values)
    assert "is complete already" in told[0]
    run(folder, data, torn, **values)
    for step in (50, 100, 10**6):
        interrupted(lambda: run(folder, data, torn, merge_shards=True, **values), step, monkeypatch)
    assert files_of(torn) == files_of(tmp_path / "whole" / "c")


def test_missing_unfinished_foreign_and_damaged_shards_are_named(
    inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = inputs
    prefix = tmp_path / "c"
    merge: dict[str, Any] = {"num_shards": 4, "merge_shards": True}
    run(folder, data, prefix, num_shards=4, shard_id=2)
    assert not interrupted(lambda: run(folder, data, prefix, num_shards=4), 20, monkeypatch)
    with pytest.raises(ConfigError, match=r"of the 4 shards of .*/c, missing: 1, 3; not finished: 0; run"):
        run(folder, data, prefix, **merge)
    with pytest.raises(ConfigError, match=r"there are shards of --num_shards 4"):
        run(folder, data, prefix, num_shards=5, merge_shards=True)
    for shard_id in (0, 1):
        run(folder, data, prefix, num_shards=4, shard_id=shard_id)
    run(folder, data, prefix, num_shards=4, shard_id=3, append_eos=True)
    with pytest.raises(ConfigError, match=r"c\.shard-00003-of-00004: was made with other options"):
        run(folder, data, prefix, **merge)
    run(folder, data, prefix, num_shards=4, shard_id=3)
    tokens = tmp_path / "c.shard-00001-of-00004" / "tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"c\.shard-00001-of-00004: is damaged"):
        run(folder, data, prefix, **merge)
    assert not list(tmp_path.glob("c_*"))


@pytest.mark.parametrize(
    "values", [{"num_shards": 2, "shard_id": 2}, {"merge_shards": True}, {"min_doc_length": 5, "max_doc_length": 4}]
)
def test_options_that_cannot_go_together(values: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--"):
        options(folder, tmp_path, tmp_path / "c", **values)


def test_a_full_disk_is_one_line_and_nothing_is_lost(
    inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = inputs
    run(folder, data, tmp_path / "whole" / "c")
    torn = tmp_path / "torn" / "c"
    left = 5000

    def fill(file: Any, content: bytes) -> None:
        nonlocal left
        file.write(content[:left])
        left -= len(content)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_all", fill)
        with pytest.raises(DataError, match=r"No space left on device.*the same command goes on"):
            run(folder, data, torn)
    with monkeypatch.context() as patch:

        def no_space(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(publishing, "write_index", no_space)
        with pytest.raises(ArrieroError, match="the disk is full"):
            run(folder, data, torn)
    assert not files_of(torn)
    run(folder, data, torn)
    assert files_of(torn) == files_of(tmp_path / "whole" / "c")


def test_two_runs_in_one_place_are_refused(inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path) -> None:
    writer = parts.PartsWriter(tmp_path / ".c.partial")
    with pytest.raises(ConfigError, match="another process writes this corpus"):
        run(folder, inputs[0], tmp_path / "c")
    writer.close()
    run(folder, inputs[0], tmp_path / "c")


def test_a_corpus_without_documents_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    (tmp_path / "y.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match="no document is left of 0 read"):
        run(folder, tmp_path, tmp_path / "out" / "c")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shards", [{}, {"num_shards": 2, "shard_id": 0}])
def test_a_refused_first_document_leaves_nothing(folder: Path, tmp_path: Path, shards: dict[str, int]) -> None:
    (tmp_path / "x.txt").write_bytes(b"\x89PNG\xff\xfe\x00")
    (tmp_path / "kept").mkdir()
    for prefix in ("new/folders/c", "kept/new/c"):
        with pytest.raises(DataError, match="is no UTF-8 text"):
            run(folder, tmp_path / "x.txt", tmp_path / prefix, **shards)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "x.txt"]


def test_documents_of_one_token(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = next(t for t in map(tokenizer.id_to_token, range(300, 400)) if t and len(tokenizer.encode(t)) == 1)
    (tmp_path / "x.jsonl").write_text((json.dumps({"text": text}) + "\n") * 5, encoding="utf-8")
    run(folder, tmp_path / "x.jsonl", tmp_path / "c")
    assert read_npy(tmp_path / "c") == (tokenizer.encode(text) * 5, [1] * 5, [0, 1, 2, 3, 4, 5])


def test_an_id_outside_the_vocabulary_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.vocab_size = 10
    with pytest.raises(DataError, match=r"gives the id .* and its vocabulary has 10"):
        Encoder(tokenizer, EncodingRules()).encode("text", b"hello world", 11)


def test_long_texts_are_not_encoded_all_at_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text in make_texts() if text.strip()]
    sizes: list[int] = []
    encode_batch = tokenizer.encode_batch

    def counted(batch: list[str]) -> list[list[int]]:
        sizes.append(sum(map(len, batch)))
        return encode_batch(batch)

    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(tokenizer, "encode_batch", counted)
    encoded = Encoder(tokenizer, EncodingRules()).encode("rows", texts, 0)
    assert isinstance(encoded, EncodedUnit)
    assert encoded.tokens.tolist() == [token for text in texts for token in tokenizer.encode(text)]
    assert sum(sizes) == sum(map(len, texts))
    assert max(sizes) <= max(300, *map(len, texts))
    assert len(sizes) > sum(sizes) // 600


def test_a_text_without_tokens_is_empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(folder)
    # Some normalizers leave nothing of a text that is not white space.
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [[] if text == "b" else [7, 8] for text in texts])
    unit = Encoder(tokenizer, EncodingRules(append_eos=True)).encode("text", b"a\n\nb\n\nc", 7)
    assert isinstance(unit, EncodedUnit)
    assert unit.tokens.tolist() == [7, 8, tokenizer.eos_token_id] * 2
    assert (unit.lens.tolist(), unit.counts.tolist()) == ([3, 3], [1, 1])
    assert unit.marks.tolist() == [KEPT, EMPTY, KEPT]


def test_no_end_of_text_token_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token_id = None
    with pytest.raises(ConfigError, match=r"--append_eos: the tokenizer in .* has no end-of-text token"):
        Encoder(tokenizer, EncodingRules(append_eos=True))


def test_a_bad_line_late_in_a_file_is_named(inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path) -> None:
    data, _ = inputs
    with (data / "1.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"txt": "x"}\n')
    with pytest.raises(DataError, match=r"1\.jsonl: line 51 has no field 'text'"):
        run(folder, data, tmp_path / "c")
    assert not list(tmp_path.glob("c_*"))


def test_the_seeds_command_runs(
    inputs: tuple[Path, list[str]], folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    # PaddleNLP's create_pretraining_data.py, as its documentation calls it; the script swapped for the verb.
    command = (
        f'--model_name "{folder}" --tokenizer_name LlamaTokenizer --data_format JSON --input_path {inputs[0]} '
        f"--output_prefix {tmp_path / 'c'} --json_key text --data_impl mmap --append_eos --log_interval 5 --workers 1"
    )
    (parsed,) = parse((PreprocessOptions,), shlex.split(command), "arriero preprocess")
    assert isinstance(parsed, PreprocessOptions)
    CorpusBuilder(parsed, report=lambda line: None).build()
    assert read_megatron(tmp_path / "c") == oracle(tokenizer, inputs[1], append_eos=True)


def test_the_seeds_tokenizer_class_is_taken_for_what_it_is(
    inputs: tuple[Path, list[str]], folder: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    run(folder, inputs[0], tmp_path / "c", tokenizer_name_or_path="LlamaTokenizer", report=told.append)
    assert "LlamaTokenizer" in told[0]


def test_a_killed_worker_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    from arriero.data.corpus import workers

    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def submit(self, *_: Any) -> Any:
            raise BrokenProcessPool

        def shutdown(self, **_: Any) -> None: ...

    def one_unit() -> Iterator[units.Unit]:
        yield units.Unit((0, 0), "text", b"x", 0, 1)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    with pytest.raises(DataError, match="a worker process was killed"):
        list(workers.encode_units(one_unit(), workers.EncodingJob("", EncodingRules()), 2, "local"))


def test_only_the_tokenizer_is_downloaded(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    from arriero.formats.download import resolve_tokenizer

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **values: Any) -> str:
        asked.update(values, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name, hub_id in (("facebook/llama-7b", "huggyllama/llama-7b"), ("some/model", "some/model")):
        assert resolve_tokenizer(name) == folder
        assert asked["name"] == hub_id
        patterns = " ".join(asked["allow_patterns"])
        assert "tokenizer" in patterns
        assert "safetensors" not in patterns
        assert "*.json" not in asked["allow_patterns"]
    assert resolve_tokenizer(folder) == folder


def test_replaced_documents_are_counted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"good\n\nb\xffd\n\n" + b"-" * 200)
    with pytest.raises(DataError, match=r"x\.txt: line 3 byte 2 of it is no UTF-8 text; mend it, or give --errors rep"):
        run(folder, tmp_path / "x.txt", tmp_path / "c")
    totals = run(folder, tmp_path / "x.txt", tmp_path / "c", errors="replace")
    assert replace(totals, tokens=0) == CorpusTotals(
        documents=3, sentences=3, read=3, shortened=1, replaced=1, text_bytes=211
    )
