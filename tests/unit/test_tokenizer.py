"""Tokenizer folders: what is read, what broken files lead to, and smollm's own when it is there."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from arriero.data.tokenizer import load_tokenizer
from arriero.errors import FormatError, TemplateError


def vocabulary(*special: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox"] * 3, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def folder_with(path: Path, *special: str, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    vocabulary(*special).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_stop_tokens_come_from_every_source(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        "<eos>",
        "<|eot_id|>",
        "<other>",
        tokenizer_config={"eos_token": {"content": "<eos>", "__type": "AddedToken"}},
        generation_config={"eos_token_id": [7, 9]},
        config={"eos_token_id": 3},
    )
    tokenizer = load_tokenizer(folder)
    eos, turn = tokenizer.token_to_id("<eos>"), tokenizer.token_to_id("<|eot_id|>")
    assert tokenizer.eos_token_id == eos
    assert tokenizer.stop_token_ids == [eos, 7, 9, turn]


def test_model_configuration_is_the_last_resort(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, config={"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": None})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3, None)
    assert tokenizer.stop_token_ids == [3]


def test_special_tokens_map_is_read_and_tokenizer_config_wins(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        "<a>",
        "<b>",
        special_tokens_map={"bos_token": "<a>", "eos_token": "<a>"},
        tokenizer_config={"eos_token": "<b>", "bos_token": None},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_token_id == tokenizer.token_to_id("<a>")
    assert tokenizer.eos_token_id == tokenizer.token_to_id("<b>")


def test_a_named_token_that_the_vocabulary_lacks_is_added(tmp_path: Path) -> None:
    plain = load_tokenizer(folder_with(tmp_path))
    assert plain.pad_token_id is None
    padded = load_tokenizer(folder_with(tmp_path, tokenizer_config={"pad_token": "[PAD]"}))
    assert padded.pad_token_id == plain.vocab_size
    assert padded.vocab_size == plain.vocab_size + 1
    assert padded.pad_token_id not in padded.encode("[PAD]")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_explicit_framing(tmp_path: Path, bos: bool, eos: bool) -> None:
    config = {"bos_token": "<a>", "eos_token": "<b>", "add_bos_token": bos, "add_eos_token": eos}
    tokenizer = load_tokenizer(folder_with(tmp_path, "<a>", "<b>", tokenizer_config=config))
    a, b = tokenizer.bos_token_id, tokenizer.eos_token_id
    body = tokenizer.encode("the fox")
    expected = ([a] if bos else []) + body + ([b] if eos else [])
    assert tokenizer.encode("the fox", add_special_tokens=True) == expected
    assert tokenizer.encode("", add_special_tokens=True) == ([a] if bos else []) + ([b] if eos else [])


def test_lone_surrogates_do_no_harm(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path))
    ids = tokenizer.encode("a\ud800b")
    assert tokenizer.decode(ids) == "a\ufffdb"
    assert tokenizer.encode_batch(["a\ud800b", "c"])[0] == ids
    assert tokenizer.encode_with_offsets("a\ud800b")[0] == ids
    template = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    chatting = load_tokenizer(folder_with(tmp_path, tokenizer_config=template))
    assert chatting.chat([{"role": "user", "content": "a\ud800b"}]) == ids


def test_ids_out_of_range_decode_to_nothing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path))
    ids = tokenizer.encode("the fox")
    assert tokenizer.decode([10**6, *ids, tokenizer.vocab_size, -1]) == "the fox"
    assert tokenizer.id_to_token(-1) is None
    assert tokenizer.token_to_id("no such token") is None


def test_templates_from_every_place(tmp_path: Path) -> None:
    folder_with(tmp_path, chat_template={"chat_template": "A"})
    assert load_tokenizer(tmp_path).render_chat([{"role": "user", "content": ""}]) == "A"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "X"}, {"name": "default", "template": "B"}]})
    )
    assert load_tokenizer(tmp_path).render_chat([{"role": "user", "content": ""}]) == "B"
    (tmp_path / "chat_template.jinja").write_text("C")
    assert load_tokenizer(tmp_path).render_chat([{"role": "user", "content": ""}]) == "C"


TOOL = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def test_a_template_for_tools_is_taken_for_tools(tmp_path: Path) -> None:
    hello = [{"role": "user", "content": "hi"}]
    named = [{"name": "tool_use", "template": "the fox"}, {"name": "default", "template": "the"}]
    listed = load_tokenizer(folder_with(tmp_path / "list", tokenizer_config={"chat_template": named}))
    folder = folder_with(tmp_path / "files")
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("the")
    (folder / "additional_chat_templates/tool_use.jinja").write_text("the fox")
    (folder / "additional_chat_templates/rag.jinja").write_text("rag")
    load_tokenizer(folder).save(tmp_path / "saved")
    assert (tmp_path / "saved/additional_chat_templates/rag.jinja").read_text() == "rag"
    for tokenizer in (listed, load_tokenizer(folder), load_tokenizer(tmp_path / "saved")):
        assert tokenizer.chat(hello) == tokenizer.chat(hello, tools=[]) == tokenizer.encode("the")
        assert tokenizer.chat(hello, tools=TOOL) == tokenizer.encode("the fox")
        assert (tokenizer.chat_template, tokenizer.tool_template) == ("the", "the fox")
    (folder / "additional_chat_templates/tool_use.jinja").unlink()
    alone = load_tokenizer(folder)
    assert alone.chat(hello, tools=TOOL) == alone.encode("the")
    assert alone.tool_template == "the"


def test_blocks_of_the_assistant_count_where_all_templates_have_them(tmp_path: Path) -> None:
    marks = "{% generation %}the{% endgeneration %}"
    for other, expected in (("the", False), (marks, True)):
        named = [{"name": "tool_use", "template": other}, {"name": "default", "template": marks}]
        tokenizer = load_tokenizer(folder_with(tmp_path, tokenizer_config={"chat_template": named}))
        assert tokenizer.marks_generation is expected


def test_no_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path))
    assert not tokenizer.has_chat_template()
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_a_broken_template_leaves_the_tokenizer_usable(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tokenizer_config={"chat_template": "{% if %}"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    with pytest.raises(TemplateError, match="syntax error"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}}}'),
        ("tokenizer.json", b"[]"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"eos_token": 3}'),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": "x"}]}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}'.replace(b"[]", b"[1]")),
        ("tokenizer_config.json", b'{"additional_special_tokens": "x"}'),
        ("special_tokens_map.json", b"nonsense"),
        ("added_tokens.json", b'{"x": "1"}'),
        ("generation_config.json", b"{,}"),
        ("chat_template.jinja", b"\xff"),
        ("config.json", b"[" * 100_000),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder_with(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_decoder_is_refused(tmp_path: Path) -> None:
    tokenizer = vocabulary()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FormatError, match="WordPiece"):
        load_tokenizer(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FormatError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")


def test_broken_sentencepiece_models(tmp_path: Path) -> None:
    # The last one is the beginning of a tiktoken file, which Meta ships under this name for Llama 3.
    for content in (b"", b"nonsense", b"\x0a\xff\xff\xff\xff\x0f", b"IQ== 0\nIg== 1\nIw== 2\n"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(FormatError, match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)


def test_a_full_disk_names_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tokenizer = load_tokenizer(folder_with(source, "<e>", tokenizer_config={"eos_token": "<e>"}))

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FormatError, match=r"target/tokenizer\.json: cannot be written from .* \(the disk is full\)"):
        tokenizer.save(tmp_path / "target")


def test_a_save_that_fails_leaves_the_earlier_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tokenizer = load_tokenizer(folder_with(source, "<e>", tokenizer_config={"eos_token": "<e>"}))
    tokenizer.save(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(path: Path, content: bytes) -> None:
        path.write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FormatError, match="the disk is full"):
        tokenizer.save(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_save_copies_the_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tokenizer = load_tokenizer(folder_with(source, "<e>", tokenizer_config={"eos_token": "<e>", "chat_template": "T"}))
    tokenizer.save(target)
    tokenizer.save(source)  # onto itself: no harm
    copied = load_tokenizer(target)
    assert copied.eos_token_id == tokenizer.eos_token_id
    assert copied.encode("the quick fox") == tokenizer.encode("the quick fox")
    assert sorted(p.name for p in target.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_threads_share_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, "<e>", tokenizer_config={"eos_token": "<e>"}))
    special = tokenizer.eos_token_id
    wrong: list[str] = []

    def literal() -> None:
        for _ in range(300):
            if special in tokenizer.encode("the <e> fox"):
                wrong.append("literal")

    def control() -> None:
        for _ in range(300):
            if special not in tokenizer.encode("the <e> fox", allow_special=True):
                wrong.append("control")

    threads = [threading.Thread(target=work) for work in (literal, control, literal, control)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_blanks_that_special_tokens_take_in(tmp_path: Path) -> None:
    tokenizer = vocabulary()
    tokenizer.add_special_tokens([tokenizers.AddedToken("<r>", rstrip=True), tokenizers.AddedToken("<l>", lstrip=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}<r>\n {{ m.content }} \n<l>{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    ours = load_tokenizer(tmp_path)
    r, end = ours.special_tokens["<r>"], ours.special_tokens["<l>"]
    assert ours.chat([{"role": "user", "content": "fox"}]) == [r, *ours.encode("fox"), end]
    assert ours.chat([{"role": "user", "content": "<r>"}]) == [r, *ours.encode("<r>"), end]
