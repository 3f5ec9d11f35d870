"""Tokenizers out of GGUF files: the ids of the tokenizer that went in, and those of transformers' own GGUF reader."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers  # noqa: E402
from tokenizers import pre_tokenizers as pre  # noqa: E402

from arriero.errors import FormatError  # noqa: E402
from arriero.formats.gguf.file import GGUFFile  # noqa: E402
from arriero.formats.gguf.tokenizer import tokenizer_files  # noqa: E402

CORPUS = (Path(__file__).parents[2] / "LICENSE").read_text() + Path(__file__).read_text()
TEXTS = [
    "",
    " ",
    "   three spaces and trailing   ",
    "Hello, world! It's 12345 o'clock, we'll see; I'd say they've won.",
    "HELLO'S WE'LL don'T",
    "line one\nline two\r\n\r\n\n\n   indented\ttab\t\t",
    "naïve café coöperate — “quotes” … ß ﬁ",
    "漢字かな交じり文 한국어 العربية हिन्दी ไทย",
    "🚀👩‍👩‍👧‍👦 emoji 🇫🇷",
    "x=1;y+=2**3//4 # comment_with_underscores camelCase HTTPServer",
    "1 22 333 4444 55555 3.14159 1,000,000 ½ ² ٣ Ⅷ",
    "a\u0301 e\u0301 decomposed \u00e9",
    "\u00a0nbsp\u3000ideographic\u200bzero",
    "\x00\x01\x7f control",
    "<s> </s> <|im_start|> not special",
    "the the the theft thermal",
]

# The pre-tokenizers of the models' published tokenizer.json files.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> Any:
    return pre.Sequence([pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])


FAMILIES: dict[str, tuple[Callable[[], Any], Any, bool]] = {
    "gpt-2": (lambda: pre.ByteLevel(add_prefix_space=False), None, False),
    "smollm": (
        lambda: pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),
        None,
        False,
    ),
    "llama-bpe": (lambda: split(LLAMA3), None, True),
    "qwen2": (lambda: split(QWEN2), normalizers.NFC(), False),
}


def train(family: str, specials_first: bool) -> Tokenizer:
    make, normalizer, ignore_merges = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = make(), decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    specials = [AddedToken(name, special=True, normalized=False) for name in ("<|start|>", "<|end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials if specials_first else [],
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def write(path: Path, fill: Callable[[Any], None]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_bpe(path: Path, tokenizer: Tokenizer, family: str, padding: int = 0) -> Path:
    values = json.loads(tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    special = {token["content"]: token["special"] for token in values["added_tokens"]}
    types = [3 if special.get(token) else 4 if token in special else 1 for token, _ in tokens]

    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(family)
        writer.add_token_list([token for token, _ in tokens] + [f"[PAD{len(tokens) + n}]" for n in range(padding)])
        writer.add_token_types(types + [5] * padding)
        writer.add_token_merges([" ".join(merge) for merge in values["model"]["merges"]])
        writer.add_bos_token_id(tokenizer.token_to_id("<|start|>"))
        writer.add_eos_token_id(tokenizer.token_to_id("<|end|>"))
        writer.add_add_bos_token(False)
        writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")

    return write(path, fill)


def convert(path: Path, folder: Path, rows: int = 10_000) -> Path:
    folder.mkdir(exist_ok=True)
    with GGUFFile(path) as file:
        for name, content in tokenizer_files(file.metadata, rows, str(path)).items():
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("specials_first", [True, False], ids=["specials first", "specials last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_byte_level_ids_are_those_of_the_original(tmp_path: Path, family: str, specials_first: bool) -> None:
    original = train(family, specials_first)
    folder = convert(write_bpe(tmp_path / "x.gguf", original, family, padding=7), tmp_path / "out")
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert plain.get_vocab_size() == len(auto) == original.get_vocab_size()
    texts = [*TEXTS, *CORPUS.splitlines(), "<|start|>user\nhi<|end|>\n<think>so</think>"]
    for text in texts:
        expected = original.encode(text, add_special_tokens=False).ids
        assert plain.encode(text, add_special_tokens=False).ids == expected
        assert auto(text).input_ids == expected
        assert plain.decode(expected, skip_special_tokens=False) == original.decode(expected, skip_special_tokens=False)
    assert auto.bos_token == "<|start|>"
    assert auto.eos_token == "<|end|>"
    assert "<think>" not in auto.all_special_tokens
    assert auto.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|end|>"


@pytest.mark.parametrize("family", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_ids_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """Its reader has no entry for "smollm" and no NFC; the texts that differ by that are not asked."""
    path = write_bpe(tmp_path / "x.gguf", train(family, False), family)
    reader = pytest.importorskip("transformers.integrations.gguf")
    # Its own configuration reader wants a model's keys, so it is asked for the tokenizer alone.
    architecture, values, config = reader.get_gguf_tokenizer(str(path))
    theirs, _ = reader.convert_gguf_tokenizer(architecture, values)
    ours = Tokenizer.from_file(str(convert(path, tmp_path / "out") / "tokenizer.json"))
    for text in [*TEXTS, *CORPUS.splitlines()]:
        if family == "qwen2" and normalizers.NFC().normalize_str(text) != text:
            continue
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False).ids, text
    assert config["bos_token"] == "<|start|>"


@pytest.fixture(scope="module")
def tokenizer_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp("pair")
    original = train("llama-bpe", False)
    converted = convert(write_bpe(folder / "x.gguf", original, "llama-bpe"), folder / "out")
    return original, Tokenizer.from_file(str(converted / "tokenizer.json"))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_byte_level_ids_of_any_text(tokenizer_pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    original, converted = tokenizer_pair
    ids = converted.encode(text, add_special_tokens=False).ids
    assert ids == original.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in ("<|start|>", "<|end|>")):
        assert converted.decode(ids) == text


# SentencePiece


@pytest.fixture(scope="module")
def spm() -> Any:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_spm(path: Path, processor: Any, **changes: Any) -> Path:
    count = processor.get_piece_size()

    def kind(index: int) -> int:
        if processor.is_unknown(index):
            return 2
        if processor.is_control(index):
            return 3
        return 6 if processor.is_byte(index) else 5 if processor.is_unused(index) else 1

    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(changes.get("tokens", [processor.id_to_piece(index) for index in range(count)]))
        writer.add_token_scores([processor.get_score(index) for index in range(count)])
        writer.add_token_types([kind(index) for index in range(count)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        if "prefix" in changes:
            writer.add_add_space_prefix(changes["prefix"])

    return write(path, fill)


def test_sentencepiece_ids_are_those_of_the_original(tmp_path: Path, spm: Any) -> None:
    folder = convert(write_spm(tmp_path / "x.gguf", spm), tmp_path / "out")
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    rebuilt = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in [*TEXTS, *CORPUS.splitlines()]:
        if "<s>" in text:  # SentencePiece never reads a control token in a text; tokenizers does when allowed to
            continue
        expected = spm.encode(text)
        assert rebuilt.encode(text) == expected
        assert plain.encode(text, add_special_tokens=False).ids == expected
        assert auto(text).input_ids == [1, *expected]
        assert plain.decode(expected) == spm.decode(expected)
        assert rebuilt.decode(expected) == spm.decode(expected)
    assert (rebuilt.bos_id(), rebuilt.eos_id(), rebuilt.unk_id(), rebuilt.pad_id()) == (1, 2, 0, -1)
    assert rebuilt.is_byte(3)
    assert rebuilt.is_control(1)


def test_sentencepiece_without_a_prefix_blank(tmp_path: Path, spm: Any) -> None:
    folder = convert(write_spm(tmp_path / "x.gguf", spm, prefix=False), tmp_path / "out")
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rebuilt = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in [*TEXTS[:-2], *CORPUS.splitlines()[:100]]:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert ids == rebuilt.encode(text)
        assert plain.decode(ids) == text


@pytest.fixture(scope="module")
def spm_pair(tmp_path_factory: pytest.TempPathFactory, spm: Any) -> tuple[Any, Tokenizer]:
    folder = tmp_path_factory.mktemp("spm")
    return spm, Tokenizer.from_file(str(convert(write_spm(folder / "x.gguf", spm), folder / "out") / "tokenizer.json"))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_sentencepiece_ids_of_any_text(spm_pair: tuple[Any, Tokenizer], text: str) -> None:
    original, converted = spm_pair
    if not any(token in text for token in ("<s>", "</s>", "<unk>")):
        assert converted.encode(text, add_special_tokens=False).ids == original.encode(text)


# What is refused

GOOD = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
}
BAD = {
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
    "tokens are numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "b", "ab", "a"]}, "'a' twice"),
    "an endless token": ({"tokenizer.ggml.tokens": ["a", "b", "ab", "x" * 5000]}, "1024"),
    "types too few": ({"tokenizer.ggml.token_type": [1]}, "token_type"),
    "types out of range": ({"tokenizer.ggml.token_type": [1, 1, 1, 9]}, "token_type"),
    "scores not numbers": ({"tokenizer.ggml.scores": [float("nan")] * 4}, "scores"),
    "unknown model": ({"tokenizer.ggml.model": "bert"}, "'bert'"),
    "no model": ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
    "unknown pre-tokenizer": ({"tokenizer.ggml.pre": "gpt-99"}, "'gpt-99'"),
    "no merges": ({"tokenizer.ggml.merges": None}, "merges"),
    "a merge of absent tokens": ({"tokenizer.ggml.merges": ["a b", "a z"]}, "merges[1]"),
    "a merge without a blank": ({"tokenizer.ggml.merges": ["ab"]}, "merges[0]"),
    "bos out of range": ({"tokenizer.ggml.bos_token_id": 4}, "bos_token_id"),
    "bos negative": ({"tokenizer.ggml.bos_token_id": -1}, "bos_token_id"),
    "add_bos a number": ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token"),
    "template a number": ({"tokenizer.chat_template": 1}, "chat_template"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "scores"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD.keys())
def test_bad_metadata(change: dict[str, Any], words: str) -> None:
    tokenizer_files(GOOD, 4, "x.gguf")
    values = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(FormatError) as caught:
        tokenizer_files(values, 4, "x.gguf")
    assert str(caught.value).startswith("x.gguf: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vocabulary_larger_than_the_embedding() -> None:
    with pytest.raises(FormatError, match=r"4 tokens but token_embd\.weight only 3 rows"):
        tokenizer_files(GOOD, 3, "x.gguf")


def test_named_chat_templates() -> None:
    values = {**GOOD, "tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "with tools"}
    config = json.loads(tokenizer_files(values, 4, "x")["tokenizer_config.json"])
    assert config["chat_template"] == [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with tools"},
    ]


def test_begin_and_end_tokens_are_added_when_asked(tmp_path: Path) -> None:
    values = {**GOOD, "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.add_eos_token": True}
    for name, content in tokenizer_files({**values, "tokenizer.ggml.add_bos_token": True}, 4, "x").items():
        (tmp_path / name).write_bytes(content)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ab").ids == [3, 2, 3]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == [3, 2, 3]
    assert np.array_equal(
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a", "b").ids, [3, 0, 3, 3, 1, 3]
    )
