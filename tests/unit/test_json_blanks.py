"""Between the parts of a JSON answer there is no room for a model that would write blanks for ever."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from followed import follows

from arriero.data.tokenizer import Tokenizer
from arriero.engine.grammar import GrammarCompiler
from arriero.engine.structure import Structure
from arriero.serving.openai.messages import FunctionSpec, Tool
from arriero.serving.openai.tool_format import CHATML, LLAMA3, structure_with_tools

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

NUMBERS = {"type": "array", "items": {"type": "integer"}, "maxItems": 3}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": NUMBERS, "c": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
VALUE = {"a": 1, "b": [1, 2], "c": None}


def structures() -> list[tuple[Structure, str, str]]:
    """Each with what stands before and after the JSON text."""
    tool = Tool(type="function", function=FunctionSpec(name="f", parameters=SCHEMA))
    found = [(Structure("json_schema", json.dumps(SCHEMA)), "", ""), (Structure("json_object"), "", "")]
    for form in (CHATML, LLAMA3):
        structure = structure_with_tools(form, [tool], required=True, parallel=False)
        found.append((structure, f"{form.before_name()}f{form.before_arguments()}", form.after_arguments()))
    return found


@pytest.mark.parametrize("number", range(4))
def test_one_blank_after_a_separator_and_none_elsewhere(
    compiler: GrammarCompiler, tokenizer: Tokenizer, number: int
) -> None:
    structure, before, after = structures()[number]
    compact = json.dumps(VALUE, separators=(",", ":"))
    for text in (compact, json.dumps(VALUE), json.dumps(VALUE, separators=(",", ": "))):
        assert follows(compiler, tokenizer, structure, before + text + after) == "whole", text
    for text in (
        json.dumps(VALUE, indent=1),
        compact.replace(":", ":  "),
        compact.replace(":", " :"),
        compact.replace(",", ",\n"),
        compact.replace("{", "{ "),
        compact.replace("]", " ]"),
        f" {compact}",
    ):
        assert follows(compiler, tokenizer, structure, before + text + after) == "no", text


@pytest.mark.parametrize("number", [0, 2, 3])
def test_who_writes_blanks_wherever_they_may_be_comes_to_an_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer, number: int
) -> None:
    """A model whose likeliest tokens are blanks, then what closes; the text is a valid answer."""
    structure, before, after = structures()[number]
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    liking = [2 if text.isspace() or not text else 1 if set(text) <= set("}]") else 0 for text in texts]
    for seed in range(5):
        random, state, ids = np.random.default_rng(seed), compiler.compile(structure).start(), []
        while not state.finished:
            assert len(ids) < 200
            assert not state.error
            allowed = np.flatnonzero(state.allowed)
            best = max(liking[token] for token in allowed)
            ids.append(int(random.choice([token for token in allowed if liking[token] == best])))
            state.advance(ids[-1])
        text = tokenizer.decode(ids)
        assert text.startswith(before)
        found = json.loads(text[len(before) :].removesuffix(after))
        jsonschema.validate(found, SCHEMA)
