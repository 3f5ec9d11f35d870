"""Tokenizers into GGUF metadata: what the converter of llama.cpp writes, and the same ids after reading it back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf")
sentencepiece = pytest.importorskip("sentencepiece")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from test_gguf_tokenizer import CORPUS, FAMILIES, TEXTS, spm, train  # noqa: E402, F401
from tokenizers import Tokenizer, normalizers  # noqa: E402
from tokenizers import pre_tokenizers as pre  # noqa: E402

from arriero.errors import FormatError  # noqa: E402
from arriero.formats.gguf.pre_tokenizers import PRE_TOKENIZERS  # noqa: E402
from arriero.formats.gguf.tokenizer import tokenizer_files  # noqa: E402
from arriero.formats.gguf.tokenizer_writer import tokenizer_metadata  # noqa: E402
from arriero.formats.sentencepiece_model import (  # noqa: E402
    PieceType,
    read_sentencepiece_model,
    write_sentencepiece_model,
)
from arriero.models.config import LlamaConfig  # noqa: E402


def config_of(rows: int, **changes: Any) -> LlamaConfig:
    values = {
        "vocab_size": rows,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }
    return LlamaConfig(**values | changes)


def files_of(tokenizer: Tokenizer | dict[str, Any], **settings: Any) -> dict[str, bytes]:
    body = tokenizer if isinstance(tokenizer, dict) else json.loads(tokenizer.to_str())
    return {"tokenizer.json": json.dumps(body).encode(), "tokenizer_config.json": json.dumps(settings).encode()}


def again(keys: dict[str, Any], rows: int, folder: Path) -> Tokenizer:
    """The tokenizer that our reader makes of the metadata."""
    path = folder / "again.json"
    path.write_bytes(tokenizer_files(keys, rows, "x")["tokenizer.json"])
    return Tokenizer.from_file(str(path))


@pytest.mark.parametrize("specials_first", [True, False], ids=["specials first", "specials last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_byte_level(tmp_path: Path, family: str, specials_first: bool) -> None:
    original = train(family, specials_first)
    size = original.get_vocab_size()
    files = files_of(original, bos_token="<|start|>", eos_token="<|end|>", add_bos_token=True, chat_template="hello")
    keys, lines = tokenizer_metadata(files, config_of(size + 3), "x")
    assert lines == []
    ids = original.get_vocab(with_added_tokens=True)
    special = {"<|start|>": 3, "<|end|>": 3, "<think>": 4}
    by_id = sorted(ids, key=ids.__getitem__)
    assert keys == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": family,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": [*by_id, *(f"[PAD{index}]" for index in range(size, size + 3))],
        "tokenizer.ggml.token_type": [*(special.get(token, 1) for token in by_id), 5, 5, 5],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in json.loads(original.to_str())["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": ids["<|start|>"],
        "tokenizer.ggml.eos_token_id": ids["<|end|>"],
        "tokenizer.chat_template": "hello",
    }
    read = again(keys, size + 3, tmp_path)
    for text in [*TEXTS, *CORPUS.splitlines()[:50], "<|start|>user\nhi<|end|>\n<think>so</think>"]:
        assert read.encode(text, add_special_tokens=False).ids == original.encode(text, add_special_tokens=False).ids


GOOD = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_way_of_splitting_is_found_again(name: str) -> None:
    read = tokenizer_files({**GOOD, "tokenizer.ggml.pre": name}, 4, "x")
    keys, _ = tokenizer_metadata(read, config_of(4), "x")
    # one of the names that stand for the same
    assert PRE_TOKENIZERS[str(keys["tokenizer.ggml.pre"])] == PRE_TOKENIZERS[name]
    assert {key: keys[key] for key in GOOD} == GOOD
    assert keys["tokenizer.ggml.add_bos_token"] == PRE_TOKENIZERS[name].add_bos


def test_sentencepiece_model_beside_its_json(tmp_path: Path, spm: Any) -> None:  # noqa: F811
    content = spm.serialized_model_proto()
    size = spm.get_piece_size()
    files = {"tokenizer.model": content, "tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": "</s>"}'}
    alone, _ = tokenizer_metadata(files, config_of(size + 2), "x")
    assert alone["tokenizer.ggml.tokens"] == [spm.id_to_piece(i) for i in range(size)] + [
        f"[PAD{size}]",
        f"[PAD{size + 1}]",
    ]
    assert alone["tokenizer.ggml.scores"] == [spm.get_score(i) for i in range(size)] + [-10000.0] * 2
    assert alone["tokenizer.ggml.model"] == "llama"
    assert alone["tokenizer.ggml.pre"] == "default"
    assert (alone["tokenizer.ggml.add_bos_token"], alone["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert alone["tokenizer.ggml.add_space_prefix"] is True
    kinds = list(alone["tokenizer.ggml.token_type"])  # type: ignore[arg-type]
    assert kinds[:4] == [2, 3, 3, 6]
    assert kinds[-3:] == [1, 5, 5]
    read = again(alone, size + 2, tmp_path)
    for text in TEXTS:
        if "<s>" not in text:
            assert read.encode(text, add_special_tokens=False).ids == spm.encode(text)

    # the same from tokenizer.json, with the scores of tokenizer.model or without them
    written = tokenizer_files(alone, size + 2, "x")
    beside, _ = tokenizer_metadata({**written, "tokenizer.model": content}, config_of(size + 2), "x")
    special = {1, 2}  # a control token's score means nothing
    for key, value in alone.items():
        if isinstance(value, list):
            assert [v for i, v in enumerate(value) if i not in special] == [
                v
                for i, v in enumerate(beside[key])
                if i not in special  # type: ignore[arg-type]
            ], key
        else:
            assert beside[key] == value, key
    json_only, _ = tokenizer_metadata(
        {k: v for k, v in written.items() if k != "tokenizer.model"}, config_of(size), "x"
    )
    read = again(json_only, size, tmp_path)
    for text in [*TEXTS, *CORPUS.splitlines()[:50]]:
        if "<s>" not in text:
            assert read.encode(text, add_special_tokens=False).ids == spm.encode(text)


def test_tokens_on_top_of_a_sentencepiece_model(spm: Any) -> None:  # noqa: F811
    size = spm.get_piece_size()
    decoder = {str(size): {"content": "<|im_end|>", "special": True}, str(size + 1): {"content": "<tool>"}}
    files = {
        "tokenizer.model": spm.serialized_model_proto(),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}).encode(),
        "added_tokens.json": json.dumps({"<tool>": size + 1}).encode(),
    }
    keys, _ = tokenizer_metadata(files, config_of(size + 2), "x")
    assert keys["tokenizer.ggml.tokens"][-2:] == ["<|im_end|>", "<tool>"]  # type: ignore[index]
    assert keys["tokenizer.ggml.token_type"][-2:] == [3, 4]  # type: ignore[index]
    assert keys["tokenizer.ggml.eos_token_id"] == size


def test_several_ends_and_named_templates() -> None:
    read = tokenizer_files({**GOOD, "tokenizer.ggml.pre": "llama-bpe"}, 4, "x")
    body = json.loads(read["tokenizer.json"])
    for index, content in enumerate(("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), start=4):
        body["added_tokens"].append({"id": index, "content": content, "special": True})
    templates = [{"name": "default", "template": "plain"}, {"name": "tool-use", "template": "tools"}]
    files = files_of(
        body, bos_token="<s>", eos_token="<|eot_id|>", pad_token="<|end_of_text|>", chat_template=templates
    )
    files["generation_config.json"] = b'{"eos_token_id": [4, 5, 6]}'
    keys, _ = tokenizer_metadata(files, config_of(7, eos_token_id=[4, 5, 6]), "x")
    roles = {key: value for key, value in keys.items() if key.endswith("_token_id")}
    assert roles == {
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.eos_token_id": 6,
        "tokenizer.ggml.padding_token_id": 4,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.eom_token_id": 5,
    }
    assert keys["tokenizer.chat_template"] == "plain"
    assert keys["tokenizer.chat_template.tool_use"] == "tools"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
    jinja, _ = tokenizer_metadata({**files, "chat_template.jinja": b"file"}, config_of(7), "x")
    assert jinja["tokenizer.chat_template"] == "file"


def body_of(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    }
    return body | changes


SPLIT = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
REFUSED = {
    "no tokenizer": ({}, "neither tokenizer.json nor tokenizer.model"),
    "WordPiece": (files_of(body_of(model={"type": "WordPiece"})), "no BPE"),
    "another expression": (
        files_of(body_of(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, LEVEL]})),
        "no `tokenizer.ggml.pre`",
    ),
    "a normalizer": (files_of(body_of(normalizer={"type": "Lowercase"})), "no `tokenizer.ggml.pre`"),
    "ignored merges": (
        files_of(body_of(model={"type": "BPE", "vocab": {"a": 0}, "merges": [], "ignore_merges": True})),
        "no `tokenizer.ggml.pre`",
    ),
    "dropout": (files_of(body_of(model={"type": "BPE", "vocab": {"a": 0}, "dropout": 0.1})), "model.dropout"),
    "one id twice": (files_of(body_of(model={"type": "BPE", "vocab": {"a": 0, "b": 0}})), "one id to two tokens"),
    "no vocabulary": (files_of(body_of(model={"type": "BPE"})), "model.vocab"),
    "an odd merge": (files_of(body_of(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]})), "'a b c'"),
    "too many tokens": (files_of(body_of(model={"type": "BPE", "vocab": {"a": 9}})), "id 9"),
    "added without an id": (files_of(body_of(added_tokens=[{"content": "x"}])), "without an id"),
    "no JSON": ({"tokenizer.json": b"{"}, "not valid JSON"),
    "a list": ({"tokenizer.json": b"[]"}, "JSON object"),
    "a template of numbers": (files_of(body_of(), chat_template=[1]), "chat_template"),
    "no SentencePiece model": ({"tokenizer.model": b"\x01\x02"}, "not a SentencePiece model"),
    "other pieces": (
        files_of(body_of(pre_tokenizer={"type": "Metaspace", "prepend_scheme": "first", "split": True})),
        "'Metaspace' has no equal",
    ),
    "other merges": (
        files_of(body_of(pre_tokenizer=None, model={"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []})),
        "merges are not those of a SentencePiece model",
    ),
}


@pytest.mark.parametrize(("files", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_llama_cpp_has_no_equal_of(files: dict[str, bytes], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        tokenizer_metadata(files, config_of(4), "a folder")
    assert str(caught.value).startswith("a folder: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_kinds_of_sentencepiece_models(spm: Any) -> None:  # noqa: F811
    tokens, scores, types = ["<unk>", "a"], [0.0, -1.5], [2, 1]
    ours = write_sentencepiece_model(tokens, scores, types, add_dummy_prefix=False)
    model = read_sentencepiece_model(ours, "x")
    assert (model.tokens, model.scores, model.types, model.add_dummy_prefix) == (tokens, scores, types, False)
    whole = read_sentencepiece_model(spm.serialized_model_proto(), "x")
    assert whole.tokens == [spm.id_to_piece(index) for index in range(spm.get_piece_size())]
    assert whole.types.count(PieceType.BYTE) == 256
    with pytest.raises(FormatError, match="another type than BPE"):
        read_sentencepiece_model(ours.replace(b"\x18\x02\x20", b"\x18\x01\x20"), "x")
    with pytest.raises(FormatError, match="replaces characters"):
        read_sentencepiece_model(ours + b"\x1a\x04\x12\x02ab", "x")


SAMPLE = write_sentencepiece_model(
    ["<unk>", "a", "b", "ab"], [0.0, -1.0, -2.0, -3.0], [2, 1, 1, 1], add_dummy_prefix=True
)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_of_a_sentencepiece_model(changes: list[tuple[int, int]]) -> None:
    content = bytearray(SAMPLE)
    for at, value in changes:
        content[at] = value
    try:
        read_sentencepiece_model(bytes(content), "x")
    except FormatError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_normalizers_and_blanks_of_llama(spm: Any) -> None:  # noqa: F811
    """The two forms in which transformers writes the blank before a text."""
    written = tokenizer_files(
        tokenizer_metadata({"tokenizer.model": spm.serialized_model_proto()}, config_of(700), "x")[0], 700, "x"
    )
    tokenizer = Tokenizer.from_str(written["tokenizer.json"].decode())
    del written["tokenizer.model"]
    for scheme, prefix in (("first", True), ("never", False)):
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        body = json.loads(tokenizer.to_str())
        keys, _ = tokenizer_metadata({**written, "tokenizer.json": json.dumps(body).encode()}, config_of(700), "x")
        assert keys["tokenizer.ggml.add_space_prefix"] is prefix


@pytest.mark.parametrize("removes", [True, False, None])
def test_blanks_that_a_model_takes_out_are_told(tmp_path: Path, removes: bool | None) -> None:
    settings = {} if removes is None else {"remove_extra_whitespaces": removes}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["low lower lowest new newer newest wide wider widest"] * 20),
        model_prefix=str(tmp_path / "t"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    content = (tmp_path / "t.model").read_bytes()
    library = sentencepiece.SentencePieceProcessor(model_proto=content)
    takes_out = library.encode("  low   new ") == library.encode("low new")
    assert takes_out == (removes is not False)
    _, lines = tokenizer_metadata({"tokenizer.model": content}, config_of(library.get_piece_size()), "x")
    assert [("remove_extra_whitespaces" in line) for line in lines] == [True] * takes_out
