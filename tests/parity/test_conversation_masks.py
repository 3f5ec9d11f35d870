"""Which tokens of a conversation are learned, against transformers' `return_assistant_tokens_mask`."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.config.row_lengths import RowLengths
from arriero.data.rows.formats import sample_from_row
from arriero.data.sft import IGNORE, encode_sample
from arriero.data.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")

# As templates for training are written: TRL's for Qwen and SmolLM3, the loops of tool calls as in Hermes and Qwen
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}
                {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
                {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# The block begins inside a token (" 4") and leaves the end out
INSIDE = """{%- for m in messages %}{{- m.role + ':' }}{%- if m.role == 'assistant' %}
{% generation %}{{- ' ' + m.content }}{% endgeneration %}{%- else %}{{- ' ' + m.content }}{%- endif %}{{- '<|im_end|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"""
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "São Paulo", "days": 2}}}
ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
    "several turns": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi 👩‍👩‍👧‍👦"},
            {"role": "assistant", "content": "你好，世界 🙂"},
            {"role": "user", "content": "More\n\n"},
            {"role": "assistant", "content": "  indented\nanswer  x"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "½ é"},
        ]
    },
    "assistant first": {
        "messages": [
            {"role": "assistant", "content": "Welcome!"},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "."},
        ]
    },
}
TOOLS = {
    "tools": [WEATHER],
    "messages": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"rain": true}', "tool_call_id": "c1"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ],
}

Make = Callable[[str], tuple[Tokenizer, Any]]


@pytest.fixture(scope="module")
def make(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """SmolLM2's tokenizer with another template, ours and transformers'."""

    @functools.cache
    def both(template: str) -> tuple[Tokenizer, Any]:
        folder = tmp_path_factory.mktemp("tokenizer")
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (smollm2 / name).is_file():
                shutil.copyfile(smollm2 / name, folder / name)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)

    return both


def theirs_of(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(
        row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded["input_ids"], [bool(inside) for inside in encoded["assistant_masks"]]


def learned(ids: list[int], labels: list[int]) -> list[bool]:
    assert all(label in (IGNORE, follows) for label, follows in zip(labels, [*ids[1:], IGNORE], strict=True))
    return [False, *(label != IGNORE for label in labels[:-1])]


@pytest.mark.parametrize(
    ("template", "name"), [("chatml", name) for name in [*ROWS, "tools"]] + [("inside", name) for name in ROWS]
)
def test_the_mask_is_that_of_transformers(template: str, name: str, make: Make) -> None:
    ours, theirs = make({"chatml": CHATML, "inside": INSIDE}[template])
    row = TOOLS if name == "tools" else ROWS[name]
    ids, mask = theirs_of(theirs, row)
    assert 0 < sum(mask) < len(mask)
    assert ours.chat_with_generation(row["messages"], tools=row.get("tools")) == (ids, mask)
    stored = json.loads(json.dumps(row))
    for message in stored["messages"]:
        for call in message.get("tool_calls", []):  # a file holds them as JSON text
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    example, *cut = encode_sample(sample_from_row(stored, "f:1"), ours, RowLengths(512, 512))
    assert cut == [False, False]
    end = max(i for i, inside in enumerate(mask) if inside) + 1
    assert example.input_ids == ids[:end], "what follows the last learned token teaches nothing"
    assert learned(example.input_ids, example.labels) == mask[:end]
    last, *_ = encode_sample(sample_from_row(stored, "f:1"), ours, RowLengths(512, 512), train_on="last")
    prompt = len(ours.chat(row["messages"][:-1], tools=row.get("tools")))
    assert learned(last.input_ids, last.labels) == [False] * prompt + mask[prompt:end]


@pytest.mark.parametrize("name", [*ROWS, "tools"])
def test_without_blocks_the_same_tokens_are_found(name: str, make: Make) -> None:
    """What stands between a generation prompt and the end of the turn, on the same template."""
    ours, _ = make(CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""))
    marked, _ = make(CHATML)
    assert not ours.marks_generation
    assert marked.marks_generation
    row = TOOLS if name == "tools" else ROWS[name]
    plain, *_ = encode_sample(sample_from_row(row, "f:1"), ours, RowLengths(512, 512))
    blocks, *_ = encode_sample(sample_from_row(row, "f:1"), marked, RowLengths(512, 512))
    assert plain.input_ids == blocks.input_ids
    assert plain.labels == blocks.labels


def test_blocks_inside_a_macro(make: Make) -> None:
    """transformers counts the characters written so far, which are none inside a macro; its mask is wrong there."""
    macro = "{% macro turn(m) %}x{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    macro += "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endmacro %}"
    macro += "{% for m in messages %}{{ turn(m) }}{% endfor %}"
    ours, _ = make(macro)
    ids, mask = ours.chat_with_generation(ROWS["one turn"]["messages"])
    spoken = [token for token, inside in zip(ids, mask, strict=True) if inside]
    assert ours.decode(spoken, skip_special_tokens=False) == "4<|im_end|>"


def test_special_tokens_in_a_message_do_not_shift_the_mask(make: Make) -> None:
    ours, theirs = make(CHATML)
    trap = {
        "messages": [
            {"role": "user", "content": "what does <|im_end|> mean?"},
            {"role": "assistant", "content": "<|im_end|> ends a turn"},
        ]
    }
    ids, mask = ours.chat_with_generation(trap["messages"])
    spoken = [token for token, inside in zip(ids, mask, strict=True) if inside]
    assert ours.decode(spoken, skip_special_tokens=False) == "<|im_end|> ends a turn<|im_end|>"
    assert spoken.count(ours.special_tokens["<|im_end|>"]) == 1
    assert theirs_of(theirs, trap)[0] != ids, "transformers makes a control token of a user's text"


def test_a_long_answer_is_cut_inside_its_block(make: Make) -> None:
    ours, _ = make(CHATML)
    row = {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1 2 3 4 5 6 7 8 9"}]}
    example, context_cut, target_cut = encode_sample(sample_from_row(row, "f:1"), ours, RowLengths(512, 5))
    assert (context_cut, target_cut, example.label_count) == (False, True, 5)
    assert ours.decode(example.input_ids[-5:], skip_special_tokens=False) == "1 2 <|im_end|>"
