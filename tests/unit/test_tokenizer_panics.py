"""Descriptions at which the tokenizers library panics, or ends the whole process: one clear error each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from arriero.data.tokenizer import load_tokenizer
from arriero.data.tokenizer_checks import check_description
from arriero.errors import FormatError


def description(**changes: Any) -> dict[str, Any]:
    """Of the merges a + b, ab + Ġc and é + a."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abĠc", "Ġc", "Ã©"]
    merges = [("a", "b"), ("Ġ", "c"), ("ab", "Ġc"), ("Ã", "©")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return {**json.loads(tokenizer.to_str()), **changes}


def written(folder: Path, value: dict[str, Any]) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(value))
    return folder


def template(part: dict[str, Any], **special: Any) -> dict[str, Any]:
    single = [part, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


def test_a_prefix_that_merges_lack_does_not_end_the_process(tmp_path: Path) -> None:
    """In a process of its own, which the library ends by SIGABRT."""
    value = description()
    value["model"]["continuing_subword_prefix"] = "x"
    code = (
        "import sys; from pathlib import Path; from arriero.data.tokenizer import load_tokenizer;"
        "load_tokenizer(Path(sys.argv[1]))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(written(tmp_path, value))], capture_output=True, text=True, check=False
    )
    assert told.returncode == 1, told.stderr
    assert "FormatError" in told.stderr
    assert "the merge ['a', 'b'] does not begin with the continuing_subword_prefix 'x'" in told.stderr


@pytest.mark.parametrize("merge", ["a b", ["a", "b"]])
def test_the_prefix_of_merges(merge: Any, tmp_path: Path) -> None:
    model = {"type": "BPE", "continuing_subword_prefix": "##", "merges": [merge]}
    with pytest.raises(FormatError, match="continuing_subword_prefix '##'"):
        check_description({"model": model}, tmp_path)
    check_description({"model": {**model, "merges": ["a ##b", ["a", "##b"]]}}, tmp_path)
    check_description({"model": {**model, "continuing_subword_prefix": None}}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"post_processor": template({"SpecialToken": {"id": "<q>", "type_id": 0}})},
            "its post_processor puts in '<q>', which its special_tokens lack",
        ),
        ({"post_processor": template({"Sequence": {"id": "B", "type_id": 0}})}, "asks for a second text"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "into pieces of length 0"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 0}]}},
            "into pieces of length 0",
        ),
        ({"normalizer": {"type": "Prepend", "prepend": ""}}, "puts an empty text before each"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}}, "replaces an empty text"),
        # what nothing tells before, the library does
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "b*"}, "content": "x"}}, "breaks off with it"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "breaks off with it"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="}}, "breaks off with it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_library_panics_at(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json: ") as caught:
        load_tokenizer(written(tmp_path, description(**changes)))
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_panic_at_some_text_is_an_error_of_the_file(tmp_path: Path) -> None:
    """A pattern that matches before one letter only, which no probe has."""
    normalizer = {"type": "Replace", "pattern": {"Regex": "(?=Q)"}, "content": "x"}
    tokenizer = load_tokenizer(written(tmp_path, description(normalizer=normalizer)))
    assert tokenizer.encode("ab") == tokenizer.encode_batch(["ab"])[0]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text]), tokenizer.encode_with_offsets):
        with pytest.raises(FormatError, match="breaks off with it"):
            encode("Qa")


@pytest.mark.parametrize("broken", [None, 7, [], {"processors": 3}, {"type": "Sequence", "processors": [1, None]}])
def test_what_is_no_description_is_left_to_the_library(broken: Any, tmp_path: Path) -> None:
    check_description(broken, tmp_path)
    check_description(
        {"model": broken, "post_processor": broken, "pre_tokenizer": broken, "normalizer": broken}, tmp_path
    )
    check_description({"model": {"continuing_subword_prefix": "x", "merges": [None, [], 3, [1, 2]]}}, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config", {"bos_token": "\ud800"}),
        ("tokenizer_config", {"eos_token": {"content": "<\udfff>"}}),
        ("tokenizer_config", {"added_tokens_decoder": {"5": {"content": "\ud800"}}}),
        ("special_tokens_map", {"additional_special_tokens": ["\ud800"]}),
        ("added_tokens", {"\ud800": 300}),
    ],
)
def test_half_a_character_is_no_token(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    written(tmp_path, description())
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=rf"{name}\.json: .* holds half a character"):
        load_tokenizer(tmp_path)
