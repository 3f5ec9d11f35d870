"""Thoughts before answers: where they begin and end however the text comes, what a form of the answer leaves to them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from followed import follows

from arriero.data.chat_template import ChatTemplate
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.answer import Generation
from arriero.engine.grammar import GrammarCompiler
from arriero.engine.structure import Structure, Thought
from arriero.errors import GenerationError
from arriero.formats.download import resolve_model
from arriero.models.presets import TINY_RANDOM_LLAMA
from arriero.serving.openai.answer_reader import AnswerReader, Message
from arriero.serving.openai.call_reader import Calls
from arriero.serving.openai.chat import prepare
from arriero.serving.openai.messages import FunctionSpec, Tool
from arriero.serving.openai.requests import ChatRequest
from arriero.serving.openai.thinking import ThoughtTokens, thought_of
from arriero.serving.openai.tool_format import CHATML, LLAMA3, ToolFormat, structure_with_tools
from arriero.serving.text_bound import TextBound
from arriero.serving.ui.client import Progress

CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def answer(text: str, finish: str = "stop") -> Generation:
    return Generation([], text, finish, 1)  # type: ignore[arg-type]


# Reading


@pytest.mark.parametrize(
    ("thought", "text", "told", "content"),
    [
        ("none", "<think>a</think>b", "", "<think>a</think>b"),
        ("may", "Hello <think>a</think>", "", "Hello <think>a</think>"),
        ("may", " \n<think>\nI see.\n\n</think>\n\n Yes. \n", "I see.", "Yes. \n"),
        ("may", "<think>a</thin b </think>c</think>d", "a</thin b", "c</think>d"),
        ("may", "<think>\n\n</think>\n\nYes", "", "Yes"),
        ("may", "<thin", "", "<thin"),
        ("may", "  ", "", "  "),
        ("may", "<think> a b \n", "a b", None),
        ("may", "<think>", "", None),
        ("may", "<think>a</think>\n\n", "a", ""),
        ("open", "\nI see </think>\nYes", "I see", "Yes"),
        ("open", "I see. <think>", "I see. <think>", None),
        ("open", "I see.</thi", "I see.</thi", None),
        ("open", "</think>Yes", "", "Yes"),
        ("open", "", "", None),
    ],
)
@given(data=st.data())
def test_a_thought_is_told_apart_however_the_text_comes(
    thought: Thought, text: str, told: str, content: str | None, data: st.DataObject
) -> None:
    whole = Message.read(None, answer(text), thought)
    assert (whole.thought, whole.content, whole.calls) == (told, content, [])
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    reader, found = AnswerReader(None, thought), []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += reader.push(text[start:end])
    found += reader.push("", answer(text))
    assert "".join(part.text for part in found if part.thought) == told
    said = [part for part in found if not part.thought]
    assert "".join(part.text for part in said) == (content or "")
    assert not said or text[said[0].passed :] == content  # where the log-probabilities of what is said begin
    assert not any(part.passed for part in said[1:])


def test_a_call_after_a_thought_that_speaks_of_calls() -> None:
    read = Message.read(Calls(CHATML, ("now",)), answer(f"<think>{CALL}</think>\n\nI look.\n{CALL}"), "may")
    assert (read.thought, read.content) == (CALL, "I look.")
    assert [call["function"] for call in read.calls] == [{"name": "now", "arguments": "{}"}]


def test_tokens_of_thoughts_are_counted() -> None:
    def count(thought: Thought, *tokens: int, opening: int | None = 7, closing: int | None = 8) -> int:
        return ThoughtTokens(thought, opening, closing).count(tokens)

    assert count("may", 7, 1, 1, 8, 2, 8) == 4
    assert count("may", 5, 7, 1) == 3
    assert count("may", 1, 2, 3, 7, 8) == 0
    assert count("open", 1, 8, 2) == 2
    assert count("open", 1, 1) == 2
    assert count("none", 7, 8) == 0
    assert count("open", 1, 1, closing=None) == 0


# Where an answer thinks


@pytest.mark.parametrize(
    ("template", "options", "thought"),
    [
        ("{{ x }}", {}, "none"),
        ("{# knows </think> #}a:", {}, "may"),
        ("{# knows </think> #}a:<think>\n", {}, "open"),
        ("{# knows </think> #}a:<think>\n\n</think>\n\n", {}, "none"),
        ("{# knows </think> #}a:{{ messages[0].content }}", {"continued": "Hello"}, "none"),
        ("{# knows </think> #}a:<think>\n", {"continued": "x"}, "open"),
        ("{# knows </think> #}a:<think>\nLet me", {"continued": "<think>\nLet me"}, "open"),
        ("{# knows </think> #}a:<think>\n\n</think>\n\nLet me", {"continued": "Let me"}, "none"),
        ("{# knows </think> #}a:<think>a</think> b", {"continued": "<think>a</think> b"}, "none"),
        ("{# knows </think> #}a:what <think> is", {"continued": "what <think> is"}, "none"),
    ],
)
def test_the_prompt_says_where_an_answer_thinks(
    tokenizer: Tokenizer, template: str, options: dict[str, Any], thought: Thought
) -> None:
    own = load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))
    own._template = ChatTemplate(template)
    prompt = own.chat([{"role": "user", "content": "Hello"}])
    assert thought_of(own, prompt, **options) == thought


def test_a_thought_of_the_template_for_tools(tokenizer: Tokenizer) -> None:
    own = load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))
    own._template, own._tool_template = ChatTemplate("a:"), ChatTemplate("{# knows </think> #}a:")
    assert thought_of(own, own.encode("a:")) == "may"


def test_an_answer_that_goes_on_with_a_thought_begins_within_it(tokenizer: Tokenizer) -> None:
    own = load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))
    own._template = ChatTemplate(
        "{# knows </think> #}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    begun = "<think>\n" + "Let me see, that is a long thought. " * 20
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": begun}]
    service = SimpleNamespace(
        tokenizer=own,
        reasoning=True,
        room=lambda *_: 8,
        text_bound=TextBound(None, False),
        check_length=lambda *_: None,
    )
    body = ChatRequest.model_validate({"messages": turns, "continue_final_message": True})
    assert prepare(service, body).thought == "open"  # type: ignore[arg-type]
    body = ChatRequest.model_validate({"messages": turns})
    assert prepare(service, body).thought == "may"  # type: ignore[arg-type]


# Forms


FORMS = {
    "json": Structure("json_object"),
    "schema": Structure("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}'),
    "regex": Structure("regex", r'\{"a": \d\}'),
    "choice": Structure("choice", ('{"a": 1}', "no")),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize(
    ("text", "none", "may", "opened"),
    [
        ('{"a": 1}', "whole", "whole", "beginning"),
        ('<think>\nIs {"b"} a/b "right"? <tool_call></think>\n\n{"a": 1}', "no", "whole", "whole"),
        ('so</think>\n\n{"a": 1}', "no", "no", "whole"),
        ("<think>so", "no", "beginning", "beginning"),
        ("<think>so</think>", "no", "beginning", "beginning"),
        ("<think>so</think>maybe", "no", "no", "no"),
        ('<think>so</think>{"a": 1}</think>', "no", "no", "no"),
    ],
)
def test_a_form_is_of_what_comes_after_the_thought(
    compiler: GrammarCompiler, tokenizer: Tokenizer, form: Structure, text: str, none: str, may: str, opened: str
) -> None:
    for thought, wanted in (("none", none), ("may", may), ("open", opened)):
        structure = Structure(form.kind, form.source, thought)  # type: ignore[arg-type]
        assert follows(compiler, tokenizer, structure, text) == wanted, thought


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_blanks_come_after_a_thought_alone(compiler: GrammarCompiler, tokenizer: Tokenizer, form: Structure) -> None:
    structure = Structure(form.kind, form.source, "may")
    for text, wanted in (('\n{"a": 1}', "no"), ('{"a": 1}', "whole"), ('<think>so</think>\n{"a": 1}', "whole")):
        assert follows(compiler, tokenizer, structure, text) == wanted, text


def test_a_call_that_must_be_has_no_blanks_before_it(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    tool = Tool(type="function", function=FunctionSpec(name="now"))
    for form in (CHATML, LLAMA3):
        structure = structure_with_tools(form, [tool], required=True, parallel=True, thought="may")
        call = form.call("now", {}).strip()
        assert follows(compiler, tokenizer, structure, f"\n{call}") == "no"
        assert follows(compiler, tokenizer, structure, f"<think></think>\n{call}") == "whole"


@pytest.mark.parametrize("form", [CHATML, LLAMA3], ids=["chatml", "llama3"])
@pytest.mark.parametrize("required", [True, False])
def test_tools_are_called_after_the_thought(
    compiler: GrammarCompiler, tokenizer: Tokenizer, form: ToolFormat, required: bool
) -> None:
    tool = Tool(type="function", function=FunctionSpec(name="now"))
    call = form.call("now", {}).strip()

    def found(text: str, thought: Thought) -> str:
        structure = structure_with_tools(form, [tool], required=required, parallel=True, thought=thought)
        return follows(compiler, tokenizer, structure, text)

    text = "no" if required else "whole"
    assert [found(call, thought) for thought in ("none", "may", "open")] == ["whole", "whole", "beginning"]
    for thinks in (f"<think>I write {call[:14]} x {call}?</think>\n\n", "<think></think>"):
        assert found(thinks + call, "may") == found(thinks.removeprefix("<think>") + call, "open") == "whole"
        assert found(f"{thinks}Hello", "may") == found(f"{thinks}Hello", "open") == text
    assert found("Hello", "may") == text
    assert found("<think>Hello", "may") == found("Hello", "open") == "beginning"


def test_an_unknown_thought_is_refused() -> None:
    with pytest.raises(GenerationError, match="thought"):
        Structure("json_object", "", "always")  # type: ignore[arg-type]


# The page


def test_the_page_folds_a_thought_and_does_not_say_it_again(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from arriero.serving.ui.page import answer_of, is_thought

    both = answer_of(Progress("Yes", "I see", 2, 1.0))
    assert [(turn["content"], is_thought(turn)) for turn in both] == [("I see", True), ("Yes", False)]
    assert re.search(r"\w", both[0]["metadata"]["title"])
    assert [is_thought(turn) for turn in answer_of(Progress("", "I see", 2, 1.0))] == [True]
    assert answer_of(Progress("", "", 0, 0.0)) == [{"role": "assistant", "content": ""}]
    assert not is_thought({"role": "assistant", "content": "x", "metadata": None})
