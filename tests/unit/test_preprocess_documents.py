"""Texts out of lines, blank-line documents, sentences, long runs, duplicates."""

from __future__ import annotations

import itertools
import json
import random
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.data.corpus.documents import RefusedDocument, RunShortener, documents_of, sentences_of
from arriero.data.corpus.encoding import HASH, text_hash, token_dtype
from arriero.data.corpus.seen import SeenDocuments


def trans_to_json(text: str) -> list[str]:
    """PaddleNLP's rule (trans_to_json.py): lines are gathered until one that strips to nothing."""
    documents, document = [], ""
    for line in text.splitlines(keepends=True):
        if line.strip() == "":
            documents.append(document)
            document = ""
        else:
            document += line
    documents.append(document)
    return [document.rstrip("\n") for document in documents if document]


@given(st.lists(st.sampled_from(["a line", "  x", "", " ", "\t", "é。", "end."]), max_size=12), st.booleans())
def test_text_is_cut_at_blank_lines_as_the_seed_cuts_it(lines: list[str], final_newline: bool) -> None:
    text = "\n".join(lines) + ("\n" if final_newline else "")
    texts, replaced = documents_of("text", text.encode(), "text", False)
    assert texts == trans_to_json(text)
    assert replaced == [False] * len(texts)


def test_windows_line_ends_are_line_ends() -> None:
    assert documents_of("text", b"a\r\nb\r\n\r\nc\r\n", "text", False)[0] == ["a\nb", "c"]


def test_a_file_can_be_one_document() -> None:
    assert documents_of("file", b"a\n\nb\n", "text", False)[0] == ["a\n\nb\n"]


def test_json_lines_give_the_texts_as_they_are() -> None:
    rows = [{"body": "  a\n\nb  "}, {"body": "", "id": 7}, {"body": "</s> ü 😀"}]
    payload = "\n".join([json.dumps(rows[0]), "", json.dumps(rows[1]), "  ", json.dumps(rows[2])]).encode()
    assert documents_of("jsonl", payload, "body", False)[0] == [row["body"] for row in rows]


def test_a_long_number_that_nobody_asked_for_does_not_matter() -> None:
    digits = "7" * (sys.get_int_max_str_digits() + 700)
    with pytest.raises(ValueError, match="integer string conversion"):
        json.loads(digits)
    payload = f'{{"id": {digits}, "text": "a"}}\n{{"more": [{{"id": -{digits}}}], "text": "b"}}'.encode()
    assert documents_of("jsonl", payload, "text", False)[0] == ["a", "b"]
    with pytest.raises(RefusedDocument, match="has a number and no text under 'id'"):
        documents_of("jsonl", payload, "id", False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1, 2]", "is no JSON object but a list"),
        (b"7", "is no JSON object but a number"),
        (b"null", "is no JSON object but null"),
        (b'{"body": "x"}', "has no field 'text'; its fields: body"),
        (b'{"text": 3}', "has a number and no text under 'text'"),
        (b'{"text": null}', "has null and no text under 'text'"),
        (b'{"text": "x"', "is not JSON"),
        (b'{"text": "caf\xe9"}', "byte 14 of it is no UTF-8"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str) -> None:
    with pytest.raises(RefusedDocument) as caught:
        documents_of("jsonl", b'{"text": "good"}\n\n' + line + b"\n", "text", False)
    assert caught.value.refusal.line == 2
    assert message in caught.value.refusal.reason


def test_bytes_that_are_no_utf8_are_named_or_replaced() -> None:
    payload = b"good\n\none\ntw\xffo\n\nlast"
    with pytest.raises(RefusedDocument) as caught:
        documents_of("text", payload, "text", False)
    assert caught.value.refusal.line == 3
    assert caught.value.refusal.reason.startswith("byte 3 of it")
    texts, replaced = documents_of("text", payload, "text", True)
    assert texts == ["good", "one\ntw�o", "last"]
    assert replaced == [False, True, False]


def test_sentences() -> None:
    text = 'He said: "Go!" Then 3.5 went… Why?\nA line without end\n\n  你好。再见！ok'
    assert sentences_of(text) == [
        'He said: "Go!"',
        "Then 3.5 went…",
        "Why?",
        "A line without end",
        "你好。",
        "再见！",
        "ok",
    ]
    assert sentences_of(" \n ") == []


@given(st.text(alphabet="ab.é", max_size=60), st.integers(1, 7))
def test_long_runs_are_cut_and_nothing_else(text: str, length: int) -> None:
    expected = "".join(character * min(length, len(list(run))) for character, run in itertools.groupby(text))
    assert RunShortener(length).shorten(text) == expected


def test_a_run_of_just_the_length_stays_wherever_it_begins() -> None:
    shortener = RunShortener(100)
    for start in range(0, 210, 7):
        for size in (99, 100, 101, 250):
            text = "xy" * start + "-" * size + "z"
            assert shortener.shorten(text) == "xy" * start + "-" * min(100, size) + "z"


def test_seen_documents_are_a_set() -> None:
    source = random.Random(3)
    seen, oracle = SeenDocuments(), set()
    for _ in range(60):
        # Few different texts, so that there are duplicates within and between the calls; some hashes end with a zero.
        batch = [source.randbytes(1) + bytes(14) + source.randbytes(1)[:1] for _ in range(source.randint(0, 40))]
        new = seen.add(np.frombuffer(b"".join(batch), HASH))
        expected = []
        for item in batch:
            expected.append(item not in oracle)
            oracle.add(item)
        assert new.tolist() == expected
    assert len(seen) == len(oracle) > 500


def test_a_hash_is_of_the_text_and_takes_what_utf8_cannot() -> None:
    assert len(text_hash("a")) == HASH.itemsize == 16
    assert text_hash("\ud800") != text_hash("\ud801")


def test_ids_have_the_type_of_the_seed() -> None:
    assert [token_dtype(size) for size in (32000, 65534, 65535, 65536, 128256)] == [
        *(np.uint16, np.uint16, np.int32, np.int32, np.int32)
    ]
