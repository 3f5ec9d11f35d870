"""What answers make of the grammars that they share, and which tokens no grammar gives them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from arriero.data.tokenizer import Tokenizer
from arriero.engine.grammar import (
    ALWAYS_REMEMBERED,
    MAX_ANSWER_SECONDS,
    CompiledGrammar,
    GrammarCompiler,
    StructureBusyError,
)
from arriero.engine.structure import Structure
from arriero.errors import GenerationError

pytest.importorskip("llguidance")


def token_of(tokenizer: Tokenizer, text: bytes) -> int:
    """The token that is this text."""
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.decoding.token_bytes[i] == text)


def drawn(state: Any, tokens: list[int], count: int) -> Any:
    """A state after so many tokens of these, or where there is no way on."""
    random = np.random.default_rng(0)
    for _ in range(count):
        if not state.allowed.any():
            break
        state.advance(int(random.choice([token for token in tokens if state.allowed[token]])))
    return state


def test_what_answers_make_of_remembered_grammars_is_bounded(tokenizer: Tokenizer) -> None:
    """Answers of one grammar share its lexer, which grows with them: those of many must not stay."""
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    tokens = [token_of(tokenizer, letter) for letter in (b"a", b"b")]
    for number in range(18):
        pattern = f"(.*a.{{{20 + number}}}|.*b.{{{25 + number}}}){{1,3}}"
        drawn(compiler.compile(Structure("regex", pattern)).start(), tokens, 200)
    seconds = [one.answer_seconds for one in compiler._known.values()]
    assert sum(seconds[:-ALWAYS_REMEMBERED]) <= MAX_ANSWER_SECONDS
    assert sum(seconds) > 0
    assert len(seconds) < 18


def test_grammars_are_forgotten_when_answers_have_spent_too_much_on_them(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    structures = [Structure("regex", f"[ab]{{1,{number}}}") for number in range(1, ALWAYS_REMEMBERED + 4)]
    found = [compiler.compile(structure) for structure in structures]
    for one in found:
        one.usage.add(0.15)
    # of those before the last ones the younger stays, and all of the last ones
    assert [compiler.compile(structure) is one for structure, one in zip(structures[2:], found[2:], strict=True)] == [
        True
    ] * (ALWAYS_REMEMBERED + 1)
    assert [compiler.compile(structure) is one for structure, one in zip(structures[:2], found[:2], strict=True)] == [
        False,
        False,
    ]
    state = compiler.compile(structures[5]).start()
    state.advance(token_of(tokenizer, b"a"))
    assert compiler.compile(structures[5]).usage.seconds > 0.15


def test_an_answer_that_fills_its_grammars_lexer_leaves_it_to_nobody(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.engine.grammar.MAX_LEXER_STATES", 300)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    structure = Structure("regex", "[ab]{0,4000}")
    tokens = [token_of(tokenizer, letter) for letter in (b"a", b"b")]
    compiled = compiler.compile(structure)
    assert compiler.compile(structure) is compiled
    assert "too many" in drawn(compiled.start(), tokens, 400).error
    again = compiler.compile(structure)
    assert again is not compiled
    assert not drawn(again.start(), tokens, 20).error


def test_numbers_of_tokens_give_no_special_one(tokenizer: Tokenizer) -> None:
    """A grammar in Lark's syntax can name tokens by their numbers."""
    special = max(tokenizer.special_tokens.values())
    letter = token_of(tokenizer, b"a")
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    with pytest.raises(GenerationError, match="cannot be used: no token of the model"):
        compiler.compile(Structure("grammar", f"start: <[{special}]>"))
    state = compiler.compile(Structure("grammar", f'start: (<[{special}]> | <[{letter}]>) "b"')).start()
    assert list(np.flatnonzero(state.allowed)) == [letter]
    state = compiler.compile(Structure("grammar", f"start: <[0-{tokenizer.vocab_size - 1}]>")).start()
    assert {i for i in range(tokenizer.vocab_size) if not state.allowed[i]} == set(tokenizer.special_tokens.values())


def test_what_waits_is_given_up_when_the_process_ends(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, real, ended, made = GrammarCompiler(tokenizer, 300), CompiledGrammar.compile, threading.Event(), []
    compiler.compile(Structure("choice", ("a",)))  # whose tables are made now

    def slowly(structure: Structure, tables: Any) -> CompiledGrammar:
        made.append(structure)
        assert ended.wait(30)
        return real(structure, tables)

    monkeypatch.setattr(CompiledGrammar, "compile", slowly)
    structures = [Structure("choice", (f"a{number}",)) for number in range(6)]
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(compiler.compile, structure) for structure in structures]
        while len(made) < 2 or len(compiler._known) < 7:
            time.sleep(0.01)
        compiler.close()
        waiting = [one for one, structure in zip(asked, structures, strict=True) if structure not in made]
        told = [one.exception(30) for one in waiting]
        assert len(told) == 4
        assert all(isinstance(error, StructureBusyError) for error in told)
        ended.set()
    assert len(made) == 2
