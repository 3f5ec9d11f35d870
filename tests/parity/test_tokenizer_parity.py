"""Token ids against transformers' AutoTokenizer, on every kind of tokenizer folder that LLaMA-family models come with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from arriero.data.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")

CORPUS = [
    "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak.",
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind; it's 12345 times better, isn't it?",
    "def main(argv):\n    for i in range(10):\n        print(f'{i:>4} {argv[i]}')\n\treturn 0\n\n\n",
    "Ein Übermut, façade, naïve, señor, Ωμέγα, привет мир, שלום עולם, مرحبا بالعالم, नमस्ते दुनिया",
    "你好，世界。今天天气很好。 こんにちは世界。 안녕하세요 세계",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 emoji, and   several   spaces",
    "<s> [INST] <<SYS>> be kind <</SYS>> hi [/INST] </s> <|user|> <|assistant|>",
] * 3
TEXTS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "   leading and trailing   ",
    "\n",
    "\n\n\n",
    "a\n\nb\r\nc\td",
    "Hello world",
    "HELLO wOrLd 3.14159 1,000,000 ½ ²",
    "don't can't I'll we've",
    "你好，世界 and 日本語",
    "👩‍👩‍👧‍👦🙂🇫🇷🏳️‍🌈",
    "é é ﬁ ﬀ Å Å",  # composed, decomposed, ligatures
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b\u200d\u2028\ufeff",
    "ـهـ ا مرحبا עִבְרִית",
    "▁ underscore ▁▁x",
    "\x00\x01\x7f",
    "<unk> <0x0A> <pad>",
    "x" * 300,
    "https://example.org/a?b=c&d=%20#e",
    "\U0010fffd\ue000",
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{- tools | tojson }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}"
    "\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def write(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def byte_level(folder: Path, kind: str) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        special, template = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML
        config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
        config |= {"pad_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"}
    elif kind == "llama3":
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        config = {"bos_token": special[0], "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
        template = LLAMA3
    else:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        special, template = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], QWEN
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"add_bos_token": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    if kind == "llama3":
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<|begin_of_text|> $A", special_tokens=[(special[0], tokenizer.token_to_id(special[0]))]
                ),
            ]
        )
    if kind == "qwen":
        tokenizer.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    write(folder, config | {"chat_template": template})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sentencepiece_model(model_type: str = "bpe", remove_extra_whitespaces: bool = False) -> bytes:
    """Trained with the settings of LLaMA's own tokenizer; SentencePiece's own default is to remove blanks."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n") if line),
        model_writer=model,
        vocab_size=400 if remove_extra_whitespaces else 500,
        model_type=model_type,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=remove_extra_whitespaces,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


LLAMA2_CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "tokenizer_class": "LlamaTokenizer",
}


def sentencepiece_folder(folder: Path, template: str = LLAMA2, **config: Any) -> Path:
    write(folder, LLAMA2_CONFIG | {"chat_template": template} | config)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


def llama2_json(folder: Path, tokenizer_class: str, template: str, **config: Any) -> Path:
    """The tokenizer.json that Llama 2 ships: SentencePiece's BPE, with the blank put there by a normalizer."""
    source = sentencepiece_folder(folder.with_name(folder.name + "-source"))
    backend = json.loads(transformers.AutoTokenizer.from_pretrained(source).backend_tokenizer.to_str())
    backend["pre_tokenizer"] = None
    backend["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    settings = LLAMA2_CONFIG | {"tokenizer_class": tokenizer_class, "chat_template": template} | config
    return write(folder, settings, tokenizer=backend)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "smollm": lambda folder: byte_level(folder, "smollm"),
    "llama3": lambda folder: byte_level(folder, "llama3"),
    "qwen": lambda folder: byte_level(folder, "qwen"),
    "llama2-json": lambda folder: llama2_json(folder, "PreTrainedTokenizerFast", LLAMA2),
    "llama2-class": lambda folder: llama2_json(folder, "LlamaTokenizerFast", MISTRAL, legacy=False),
    "llama2-legacy": lambda folder: llama2_json(folder, "LlamaTokenizer", ZEPHYR, legacy=True),
    "sentencepiece": sentencepiece_folder,
    "sentencepiece-chatml": lambda folder: sentencepiece_folder(
        folder,
        CHATML,
        added_tokens_decoder={
            "500": {"content": "<|im_start|>", "special": True, "normalized": False},
            "501": {"content": "<|im_end|>", "special": True, "normalized": False},
        },
        eos_token="<|im_end|>",
    ),
    "sentencepiece-legacy": lambda folder: sentencepiece_folder(folder, ZEPHYR, legacy=True),
}
KINDS = list(BUILDERS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tokenizer, Any]]:
    """Ours and transformers', of the same folder."""
    root = tmp_path_factory.mktemp("tokenizers")
    built: dict[str, tuple[Tokenizer, Any]] = {}

    def get(kind: str) -> tuple[Tokenizer, Any]:
        if kind not in built:
            folder = BUILDERS[kind](root / kind)
            built[kind] = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        return built[kind]

    return get


Pairs = Callable[[str], tuple[Tokenizer, Any]]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal(kind: str, pairs: Pairs) -> None:
    ours, theirs = pairs(kind)
    for text in TEXTS + CORPUS[:7]:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == expected, repr(text)
        assert ours.encode(text, allow_special=True, add_special_tokens=True) == theirs.encode(text), repr(text)
    batch = ours.encode_batch(TEXTS, allow_special=True, add_special_tokens=True)
    assert batch == [theirs.encode(text) for text in TEXTS]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_equal(kind: str, pairs: Pairs) -> None:
    ours, theirs = pairs(kind)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.vocab_size == len(theirs)
    assert set(ours.special_tokens) >= set(theirs.all_special_tokens)
    added = {token.content for token in theirs.added_tokens_decoder.values() if token.special}
    assert set(ours.special_tokens) == added
    for token, token_id in ours.special_tokens.items():
        assert theirs.convert_tokens_to_ids(token) == token_id == ours.token_to_id(token)
        assert ours.id_to_token(token_id) == token
    first, second = list(ours.special_tokens)[-2:]
    for text in (f"{first}a{second} b{first}{second}", f"x {first}", f"{second}\n {first}\n"):
        assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_text_equal(kind: str, pairs: Pairs) -> None:
    ours, theirs = pairs(kind)
    for text in TEXTS + CORPUS[:7]:
        for ids in (theirs.encode(text), theirs.encode(text, add_special_tokens=False)):
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected, repr(text)


@pytest.mark.parametrize("kind", ["smollm", "llama3", "qwen"])
@given(ids=st.lists(st.integers(0, 599), max_size=30))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_byte_level_ids_decode_equally(kind: str, ids: list[int], pairs: Pairs) -> None:
    ours, theirs = pairs(kind)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=40))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text(kind: str, text: str, pairs: Pairs) -> None:
    ours, theirs = pairs(kind)
    assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False)


def test_sentencepiece_equals_the_library(tmp_path: Path) -> None:
    ours = load_tokenizer(sentencepiece_folder(tmp_path))
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    for text in TEXTS + CORPUS[:7]:
        if text.startswith((" ", "▁")):
            continue  # where transformers 5 and the library differ, transformers is followed
        ids = ours.encode(text)
        assert ids == reference.encode(text), repr(text)
        assert ours.decode(ids) == reference.decode(ids), repr(text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_model_that_removes_blanks(tmp_path: Path, model_type: str) -> None:
    folder = write(tmp_path, LLAMA2_CONFIG)
    model = sentencepiece_model(model_type, remove_extra_whitespaces=True)
    (folder / "tokenizer.model").write_bytes(model)
    ours = load_tokenizer(folder)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in [*TEXTS, *CORPUS[:7], " two  spaces", "   ", "\n two", " </s> in text"]:
        if text.startswith("▁"):
            continue  # as above
        ids = reference.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.encode_with_offsets(text)[0] == ids, repr(text)
        assert ours.decode(ids) == reference.decode(ids), repr(text)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if model_type == "bpe":  # and of single blanks transformers takes none away
        for text in ("two spaces", " two spaces", "</s> two", "</s>two", "two</s> spaces"):
            assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_text_stay_text(kind: str, pairs: Pairs) -> None:
    ours, _ = pairs(kind)
    control = set(ours.special_tokens.values())
    for token in ours.special_tokens:
        for text in (token, f"before {token} after", f"{token}{token}", f"  {token}\n"):
            ids = ours.encode(text)
            # An unknown character does give the unknown token; of these texts only the name of one could.
            assert control.isdisjoint(ids)
            # transformers 5 gives a text with leading blanks one too few in SentencePiece vocabularies.
            assert ours.decode(ids).lstrip(" ") == text.lstrip(" ")
            assert ours.encode_batch([text, "x"]) == [ids, ours.encode("x")]
            assert ours.encode_with_offsets(text)[0] == ids
            # The rest of the text is encoded as if the name were any other word.
            assert control & set(ours.encode(text, allow_special=True))


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_point_into_the_text(kind: str, pairs: Pairs) -> None:
    ours, theirs = pairs(kind)
    for text in ("Hello, big world 12", "a  b\n\nc", "naïve façade"):
        ids, offsets = ours.encode_with_offsets(text)
        assert ids == ours.encode(text)
        assert len(ids) == len(offsets)
        assert offsets[-1][1] == len(text)
        assert all(0 <= start <= end <= len(text) for start, end in offsets)
        assert all(before[0] <= after[0] for before, after in pairwise(offsets))
        if not kind.startswith(("sentencepiece", "llama2")):
            expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            assert offsets == [tuple(pair) for pair in expected]
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            piece = ours.decode([token_id])
            if "\ufffd" not in piece and piece.strip():
                assert piece.strip() in text[start:end]


CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "  What is 2+2?\n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "👍 多谢"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "日本の首都は？ <b>&amp;</b>"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nwell"}],
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_chat_equals(kind: str, add_generation_prompt: bool, pairs: Pairs) -> None:
    ours, theirs = pairs(kind)
    tried = 0
    for messages in CONVERSATIONS:
        if messages[0]["role"] == "system" and kind == "llama2-class":
            continue  # Mistral's template has no system message
        text = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
        assert ours.render_chat(messages, add_generation_prompt=add_generation_prompt) == text
        ids = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
        assert ours.chat(messages, add_generation_prompt=add_generation_prompt) == ids
        tried += 1
    assert tried >= 3


@pytest.mark.parametrize("files", ["list", "jinja"])
def test_chat_with_tools_equals(files: str, tmp_path: Path) -> None:
    """A template named `tool_use`, in Hermes' form and in that of transformers' save_pretrained."""
    first = BUILDERS["qwen"](tmp_path / "list")
    path = first / "tokenizer_config.json"
    config = json.loads(path.read_text())
    turn = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.thinking }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    named = {"tool_use": "<tools>{{ tools | tojson }}</tools>" + turn, "rag": "rag", "default": turn}
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    path.write_text(json.dumps(config))
    folder = tmp_path / files
    if files == "jinja":
        transformers.AutoTokenizer.from_pretrained(first).save_pretrained(folder)
        assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    tool = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", "reasoning_content": "t"}]
    for tools in (None, [tool]):
        ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        assert ours.chat(messages, tools=tools) == ids
        assert ("<tools>" in ours.decode(ids)) == (tools is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_chat_content_cannot_hold_control_tokens(kind: str, pairs: Pairs) -> None:
    ours, _ = pairs(kind)
    control = set(ours.special_tokens.values())
    harmless = ours.chat([{"role": "user", "content": "before xyz after"}])
    for token in ours.special_tokens:
        content = f"before {token} after{token}"
        messages = [{"role": "user", "content": content}]
        ids = ours.chat(messages)
        assert [i for i in ids if i in control] == [i for i in harmless if i in control]
        assert content in ours.render_chat(messages)
        assert content in ours.decode(ids)
        # Between the template's own tokens, the text is encoded as it would be anywhere else.
        assert ours.decode(ids, skip_special_tokens=False).count(token) == ours.render_chat(messages).count(token)


def test_seam_leaves_no_trace(pairs: Pairs) -> None:
    """A text after a control token is encoded as transformers encodes it there."""
    for kind in KINDS:
        ours, theirs = pairs(kind)
        token, token_id = list(ours.special_tokens.items())[-1]
        for text in ("Hello", " Hello", "\nx", "你好"):
            literal, _ = ours._vocabulary.offsets(text, after_token=True)
            assert [token_id, *literal] == theirs.encode(token + text, add_special_tokens=False), (kind, text)
