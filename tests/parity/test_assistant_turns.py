"""Which tokens are learned of models whose templates do not mark them, as these templates are shipped (TRL's package has them),
against their twins that are marked for training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from learned_runs import learned_runs

from arriero.config.row_lengths import RowLengths
from arriero.data.rows.formats import sample_from_row
from arriero.data.sft import encode_sample
from arriero.data.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CONTROL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>", "<|user|>"),
    *("<|assistant|>", "<|system|>", "<start_of_turn>", "<end_of_turn>", "<｜User｜>", "<｜Assistant｜>"),
    "<｜end▁of▁sentence｜>",
]
SEVERAL = [
    {"role": "user", "content": "Hi <|im_end|> 你好"},
    {"role": "assistant", "content": "One.\n\nTwo <|im_end|> <|eot_id|>"},
    {"role": "user", "content": "More assistant\n"},
    {"role": "assistant", "content": "More assistant"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "½ 🙂"},
]
THOUGHTS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "<think>\nHarder.\n</think>\n\n6"},
]
Make = Callable[[str], tuple[Tokenizer, Any]]


@pytest.fixture(scope="module")
def make(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """SmolLM2's tokenizer with another template and its control tokens, whose end of text is no template's end of turn."""

    @functools.cache
    def both(name: str) -> tuple[Tokenizer, Any]:
        theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
        theirs.add_special_tokens({"additional_special_tokens": CONTROL})
        theirs.eos_token = "<|endoftext|>"
        theirs.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        folder = tmp_path_factory.mktemp("tokenizer")
        theirs.save_pretrained(folder)
        (folder / "config.json").write_bytes((smollm2 / "config.json").read_bytes())
        return load_tokenizer(folder), theirs

    return both


def learned_texts(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The whole row as text, and what is learned of it, by runs."""
    sample = sample_from_row({"messages": messages}, "f:1")
    example, *_ = encode_sample(sample, tokenizer, RowLengths(512, 512))
    return tokenizer.decode(example.input_ids, skip_special_tokens=False), learned_runs(example, tokenizer)


@pytest.mark.parametrize("name", ["qwen3_instruct_2507", "llama3", "phi3", "gemma"])
@pytest.mark.parametrize("messages", [SEVERAL, SEVERAL[:2]], ids=["several turns", "one turn"])
def test_the_marked_twin_marks_the_same(name: str, messages: list[dict[str, Any]], make: Make) -> None:
    ours, theirs = make(name)
    twin, _ = make(f"{name}_training")
    ids, mask = ours.chat_with_generation(messages)
    if "<|" not in messages[0]["content"]:
        assert ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    others, marked = twin.chat_with_generation(messages)
    assert ids == others
    ends = {ours.special_tokens[token] for token in CONTROL}
    for i in reversed(range(len(ids))):  # theirs go on to the line break behind a turn's end, and to a text's end
        if marked[i] and (i + 1 == len(ids) or not marked[i + 1]) and ids[i] not in ends:
            marked[i] = False
    assert [i for i, inside in enumerate(mask) if inside] == [i for i, inside in enumerate(marked) if inside]


@pytest.mark.parametrize(
    ("name", "end"),
    [("qwen2_5", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("phi3", "<|end|>"), ("gemma", "<end_of_turn>")],
)
def test_an_answer_ends_as_the_template_ends_a_turn(name: str, end: str, make: Make) -> None:
    ours, _ = make(name)
    assert learned_texts(ours, SEVERAL)[1] == [f"{turn['content']}{end}" for turn in SEVERAL[1::2]]
    assert ours.special_tokens[end] in ours.stop_token_ids
    cut, _, was_cut = encode_sample(sample_from_row({"messages": SEVERAL[:2]}, "f:1"), ours, RowLengths(512, 3))
    assert was_cut
    assert (cut.label_count, cut.input_ids[-1]) == (3, ours.special_tokens[end])


def test_qwen3_learns_what_it_will_have_to_write(make: Make) -> None:
    ours, theirs = make("qwen3")
    whole, texts = learned_texts(ours, THOUGHTS)
    # earlier thoughts are left out of a conversation, the last one is the answer's
    assert texts == ["4<|im_end|>", "<think>\nHarder.\n</think>\n\n6<|im_end|>"]
    assert whole == theirs.apply_chat_template(THOUGHTS, tokenize=False).rstrip("\n")
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    assert learned_texts(ours, plain)[1] == ["<think>\n\n</think>\n\nHello!<|im_end|>"]


def test_deepseek_r1_thinks_once(make: Make) -> None:
    ours, _ = make("deepseek_r1_distill")
    whole, texts = learned_texts(ours, THOUGHTS)
    assert texts == ["\n\n4<｜end▁of▁sentence｜>", "Harder.\n</think>\n\n6<｜end▁of▁sentence｜>"]
    assert whole.endswith("<｜User｜>3+3?<｜Assistant｜><think>\nHarder.\n</think>\n\n6<｜end▁of▁sentence｜>")
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    whole, texts = learned_texts(ours, plain)
    assert texts == ["Hello!<｜end▁of▁sentence｜>"]
    assert whole.endswith("<｜User｜>Hi<｜Assistant｜>Hello!<｜end▁of▁sentence｜>")


def test_an_answer_of_tool_calls(make: Make) -> None:
    ours, _ = make("qwen2_5")
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "<|im_end|>"}}}
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Again:", "tool_calls": [call]},
        {"role": "tool", "content": "one"},
        {"role": "assistant", "content": "One."},
    ]
    written = '\n<tool_call>\n{"name": "now", "arguments": {"zone": "<|im_end|>"}}\n</tool_call><|im_end|>'
    texts = learned_texts(ours, messages)[1]
    assert [text.lstrip("\n") for text in texts] == [written.lstrip("\n"), f"Again:{written}", "One.<|im_end|>"]
