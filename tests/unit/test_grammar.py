"""Answers of a given form: they fit it by other libraries' judgement, whatever the model, its tokenizer and the company."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.drafts import PromptLookup, Speculation
from arriero.engine.engine import Engine
from arriero.engine.grammar import CompiledGrammar, GrammarCompiler, StructureBusyError, _Tables
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.structure import Structure
from arriero.errors import GenerationError, MissingExtraError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
regex = pytest.importorskip("regex")

CORPUS = [
    '{"name": "Ada Lovelace", "age": 36, "tags": ["a", "b c"], "ok": true, "none": null, "x": -1.5e3}',
    "yes no maybe naïve café Äpfel 🐎 2024-11-25 the quick brown fox, and a lazy dog.",
] * 20
PADDING = 5  # ids that the model has and the tokenizer has not


def byte_level(folder: Path) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return load_tokenizer(folder)


def sentence_piece(folder: Path) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return load_tokenizer(folder)


def letters(folder: Path) -> Tokenizer:
    """Without a token for most bytes, and without a stop token."""
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("abcdef")}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


MAKERS = {"byte-level": byte_level, "sentencepiece": sentence_piece}


@pytest.fixture(scope="module", params=MAKERS, ids=str)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return MAKERS[request.param](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_level(tmp_path_factory.mktemp("tokenizer"))


def engine_for(tokenizer: Tokenizer, seed: int = 0, *, lookup: bool = False, max_running: int = 64) -> Engine:
    config = LlamaConfig.from_dict(
        {
            "vocab_size": tokenizer.vocab_size + PADDING,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
            "initializer_range": 0.5,
            "tie_word_embeddings": False,
            "model_type": "llama",
        }
    )
    model = LlamaForCausalLM(config).eval()
    model.init_weights(seed)
    speculation = Speculation(PromptLookup(longest=2, shortest=1), tokens=3, window=10**9) if lookup else None
    return Engine(TorchRunner(model, max_tokens=16384), tokenizer, max_running=max_running, speculation=speculation)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "age": {"type": "integer", "minimum": -5, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 'quo"te', 1, None]}, "minItems": 1, "maxItems": 3},
        "nick": {"type": ["string", "null"], "pattern": "^[A-Zé🐎]{0,3}$"},
        "at": {"$ref": "#/$defs/point"},
    },
    "required": ["name", "age", "tags", "at"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}, "y": {"anyOf": [{"type": "null"}, {"const": 0.5}]}},
            "required": ["x", "y"],
            "additionalProperties": False,
        }
    },
}
EXACT = {"type": "array", "items": {"type": "string", "minLength": 3, "maxLength": 3}, "minItems": 2, "maxItems": 2}
CHOICES = ["yes", "no", "a", "ab", "naïve 🐎", "tab\tand\nline", " blank", r"(.*)[x]^$\d", ""]


def valid(schema: dict[str, Any]) -> Callable[[str], None]:
    def check(text: str) -> None:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))

    return check


def matching(pattern: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), text

    return check


def chosen(text: str) -> None:
    assert text in CHOICES


CASES: list[tuple[Structure, Callable[[str], None]]] = [
    (Structure("json_schema", json.dumps(PERSON)), valid(PERSON)),
    (Structure("json_schema", EXACT), valid(EXACT)),  # type: ignore[arg-type]  # as JSON gives it
    (Structure("regex", r"[a-f]{3}-\d{2,4}( [é-ü🐎]+){0,2}!"), matching(r"[a-f]{3}-\d{2,4}( [é-ü🐎]+){0,2}!")),
    (Structure("regex", r"a/b#\n[^\n]{2,6}\."), matching(r"a/b#\n[^\n]{2,6}\.")),
    (Structure("regex", r" {1,3}x?"), matching(r" {1,3}x?")),
    (Structure("choice", CHOICES), chosen),  # type: ignore[arg-type]
    (
        Structure("grammar", 'start: "<" word ("," word){0,3} ">"\nword: /[a-zä]{1,3}/'),
        matching(r"<[a-zä]{1,3}(,[a-zä]{1,3}){0,3}>"),
    ),
]


@pytest.mark.parametrize("lookup", [False, True], ids=["plain", "speculation"])
def test_answers_fit_and_leave_the_others_alone(tokenizer: Tokenizer, lookup: bool) -> None:
    blank = {i: -20.0 for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).isspace()}
    checks, prompts, params = [], [], []
    for number, (structure, check) in enumerate(CASES):
        for seed in range(4):
            checks.append(check)
            prompts.append([number + 10, seed + 3, number + 10, seed + 3])
            drawn = {"do_sample": True, "temperature": 0.5 * seed, "seed": seed} if seed else {}
            drawn |= {"top_k": 5} if seed == 2 else {"top_p": 0.5, "repetition_penalty": 1.3} if seed == 3 else {}
            params.append(SamplingParams(max_new_tokens=400, logit_bias=blank, structure=structure, **drawn))  # type: ignore[arg-type]
    free_prompts = [[30 + i, 5, 30 + i, 5] for i in range(4)]
    free = [SamplingParams(max_new_tokens=40, do_sample=i > 1, seed=i, logprobs=0) for i in range(4)]
    for model_seed in (0, 1)[: 1 if lookup else 2]:
        engine = engine_for(tokenizer, model_seed, lookup=lookup)
        alone = [
            engine_for(tokenizer, model_seed).generate([p], own)[0] for p, own in zip(free_prompts, free, strict=True)
        ]
        answers = engine.generate([*free_prompts, *prompts], [*free, *params])
        assert [a.token_ids for a in answers[:4]] == [a.token_ids for a in alone]
        for check, answer in zip(checks, answers[4:], strict=True):
            assert answer.finish_reason == "stop", answer.text
            check(answer.text)
            assert tokenizer.decode(answer.token_ids) == answer.text
        assert len({answer.text for answer in answers[4:]}) > len(CASES) * 2
        if engine.speculation is not None:
            assert engine.speculation.counters.accepted > 0
            plain = engine_for(tokenizer, model_seed).generate(prompts, params)
            assert [a.token_ids for a in plain] == [a.token_ids for a in answers[4:]]
        engine.blocks.check([])


PATTERNS = [
    r"[ab]{2,5}",
    r"(yes|no|maybe)!?",
    r"-?[0-9]{1,4}(\.[0-9]+)?",
    r" ?[é-ü ]{1,4}🐎?",
    r"(the |quick )*fox",
    r"[^a-z]{0,6}",
    r"",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_exactly_the_tokens_that_fit_are_allowed(tokenizer: Tokenizer, pattern: str) -> None:
    """Against the partial matches of another library, token by token on random ways through."""
    size = tokenizer.vocab_size + PADDING
    grammar = GrammarCompiler(tokenizer, size).compile(Structure("regex", pattern))
    compiled = regex.compile(pattern)
    special = set(tokenizer.special_tokens.values())
    random = torch.Generator().manual_seed(0)
    for _ in range(4):
        state, ids = grammar.start(), []
        for _ in range(12):
            text = tokenizer.decode(ids)
            if not text.endswith("�"):
                assert state.accepting == bool(compiled.fullmatch(text))
            for token in range(size):
                after = tokenizer.decode([*ids, token])
                if token in special or token >= tokenizer.vocab_size:
                    assert not state.allowed[token]
                elif "�" not in after:  # half a character cannot be asked of the other library
                    wanted = compiled.fullmatch(after, partial=True) is not None
                    if after == text:  # a blank at the start, which is no part of the text: something must follow
                        wanted = pattern != ""
                    assert bool(state.allowed[token]) == wanted, (after, token)
            if not state.allowed.any():
                assert state.finished
                assert not state.error
                break
            assert not state.finished
            options = np.flatnonzero(state.allowed)
            ids.append(int(options[torch.randint(len(options), (), generator=random)]))
            state.advance(ids[-1])


def test_a_copy_goes_its_own_way(bpe: Tokenizer) -> None:
    first = GrammarCompiler(bpe, bpe.vocab_size).compile(Structure("choice", ("ab", "cd"))).start()
    second, third = first.copy(), first.copy()
    (a,), (c,) = bpe.encode("a"), bpe.encode("c")
    second.advance(a)
    third.advance(c)
    assert bool(first.allowed[a])
    assert bool(first.allowed[c])
    assert [bpe.decode([int(i)]) for i in np.flatnonzero(second.allowed)] == ["b"]
    assert [bpe.decode([int(i)]) for i in np.flatnonzero(third.allowed)] == ["d"]


def test_where_an_answer_ends(bpe: Tokenizer) -> None:
    engine = engine_for(bpe)
    stop = bpe.stop_token_ids[0]

    def answer(structure: Structure, **params: Any) -> Any:
        return engine.generate([[5, 6]], SamplingParams(structure=structure, **params))[0]

    one = Structure("choice", ("abc",))
    for params in ({}, {"min_new_tokens": 50}, {"ignore_eos": True}, {"logit_bias": {bpe.encode("z")[0]: 100.0}}):
        found = answer(one, **params)
        assert (found.text, found.finish_reason) == ("abc", "stop")
        assert stop not in found.token_ids, "the form itself says that nothing follows"
    nothing = answer(Structure("choice", ("",)), min_new_tokens=3)
    assert (nothing.text, nothing.token_ids, nothing.finish_reason) == ("", [stop], "stop")
    with pytest.raises(GenerationError, match="only the empty text"):
        answer(Structure("regex", ""), ignore_eos=True)
    # A stop token counts only where the answer is complete, and there it does.
    eager = answer(Structure("regex", "[a-c]{2,400}"), logit_bias={stop: 100.0})
    assert len(eager.text) >= 2
    assert eager.token_ids[-1] == stop
    assert eager.text == bpe.decode(eager.token_ids[:-1])
    late = answer(Structure("regex", "[a-c]{2,400}"), logit_bias={stop: 100.0}, min_new_tokens=8)
    assert len(late.token_ids) == 9
    cut = answer(Structure("regex", "[a-c]{200,400}"), max_new_tokens=5)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 5)
    halted = answer(Structure("regex", "x[ab]{200}"), stop_strings=("a",), logit_bias={bpe.encode("a")[0]: 100.0})
    assert (halted.finish_reason, halted.text) == ("stop_string", "x")
    pieces = engine.stream([5, 6], SamplingParams(structure=Structure("choice", ("naïve 🐎",)), min_new_tokens=99))
    assert "".join(pieces) == "naïve 🐎"


def test_a_text_that_the_tokenizer_cannot_write(tmp_path: Path) -> None:
    tokenizer = letters(tmp_path)
    engine = engine_for(tokenizer)
    with pytest.raises(GenerationError, match="choice cannot be used: no token of the model has the text"):
        engine.submit([1], SamplingParams(structure=Structure("choice", ("é",))))
    ways = engine.submit([1], SamplingParams(structure=Structure("choice", ("aé", "ab"))))
    stuck = engine.submit([1], SamplingParams(structure=Structure("choice", ("aé",))))
    other = engine.submit([1], SamplingParams(max_new_tokens=5))
    while engine.unfinished:
        engine.step()
    assert ways.result(tokenizer).text == "ab"
    assert (stuck.finish_reason, other.finish_reason) == ("error", "length")
    with pytest.raises(
        GenerationError, match="cannot follow its choice any further: no token of the model has the text"
    ):
        stuck.result(tokenizer)
    engine.blocks.check([])


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("xml", "a", "there is no structure 'xml': the kinds are json_object"),
        ("choice", "yes", "a choice is a list"),
        ("choice", [], "the choice is empty"),
        ("choice", ["a", 1], "must be text"),
        ("choice", ["\ud800"], "half a surrogate pair"),
        ("regex", ["a"], "the source of a regex is tuple"),
        ("regex", None, "the source of a regex is NoneType"),
        ("grammar", " ", "the grammar is empty"),
        ("json_schema", "", "the json_schema is empty"),
        ("json_schema", "{", "the JSON schema is not JSON"),
        ("json_schema", "[" * 50_000, "the JSON schema is not JSON"),
        ("json_schema", "3", "the JSON schema is int: it must be an object"),
        ("json_schema", {"a": {1}}, "the JSON schema is not JSON"),
        ("json_schema", {"type": "strnig"}, "the json_schema cannot be used: .*Invalid type"),
        ("json_schema", {"not": {}}, r"Unimplemented keys: \[.not"),
        ("json_schema", {"not": {}, "x-guidance": {"lenient": True}}, "Unimplemented keys"),
        ("json_schema", {"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ("json_schema", {"$ref": "https://example.com/schema.json"}, "not fetch"),
        ("json_schema", {"anyOf": [{"$ref": "#"}]}, "no text is complete"),
        ("regex", "a(", "the regex cannot be used: .*unclosed group"),
        ("regex", "a(?=b)", "look-ahead"),
        ("grammar", "start: x", 'unknown name: "x"'),
        ("grammar", "start: start", "no text is complete"),
        ("grammar", "start: <|end|>", "unknown special token"),
        ("grammar", "start: " + "(" * 9000 + '"a"' + ")" * 9000, "too deeply nested"),
        ("regex", "(" * 9000 + "a" + ")" * 9000, "the regex cannot be used"),
        ("regex", "a" * 70_000, "the regex has 70000 bytes: at most 65536"),
    ],
)
def test_what_cannot_be_used_is_refused(bpe: Tokenizer, kind: Any, source: Any, message: str) -> None:
    with pytest.raises(GenerationError, match=message) as caught:
        GrammarCompiler(bpe, bpe.vocab_size).compile(Structure(kind, source))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def crossed(width: int) -> dict[str, Any]:
    """A schema of so many thousand combinations."""
    kinds = [
        {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(4)]}
        for i in range(width)
    ]
    return {"allOf": kinds}


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(a{1000}){1000}"),
        ("regex", "(a|b)*a(a|b){5000}"),
        ("regex", r"(\w{1,300}[a-z]{1,300}){1,300}(x|y{1,100}){1,3000}z"),
        ("regex", r"(.{1,1000}b){1,1000}c"),
        ("grammar", 'start: s\ns: s s | s s s | "a" | ""'),
        ("grammar", "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"\nstart: r0'),
        ("grammar", "start: " + '"a" ' * 16_000),
        ("json_schema", crossed(10)),
        ("json_schema", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}),
        ("json_schema", {"type": "array", "minItems": 10**6, "items": {"type": "string", "maxLength": 10**6}}),
    ],
    ids=[
        "repeated",
        "subsets",
        "overlapping",
        "nested bounds",
        "ambiguous",
        "doubling",
        "long",
        "crossed",
        "many optional",
        "huge",
    ],
)
def test_what_explodes_is_bounded(bpe: Tokenizer, kind: Any, source: Any) -> None:
    """It is refused, ends its own answer, or is served; in little time in any case."""
    before = time.process_time()
    with contextlib.suppress(GenerationError):
        state = GrammarCompiler(bpe, bpe.vocab_size).compile(Structure(kind, source)).start()
        random = torch.Generator().manual_seed(0)
        for _ in range(60):
            options = np.flatnonzero(state.allowed)
            if not len(options):
                break
            state.advance(int(options[torch.randint(len(options), (), generator=random)]))
        assert sum((bool(state.allowed.any()), state.finished, bool(state.error))) == 1
    assert time.process_time() - before < 6.0


def test_structures_are_compiled_once_and_threads_share_them(bpe: Tokenizer) -> None:
    compiler = GrammarCompiler(bpe, bpe.vocab_size, cache_size=2)
    structures = [Structure("regex", f"[ab]{{{i}}}") for i in (1, 2, 3)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(compiler.compile, [structures[0]] * 16))
    assert all(one is found[0] for one in found)
    second = compiler.compile(structures[1])
    assert compiler.compile(structures[0]) is found[0]
    compiler.compile(structures[2])  # the one not used for longest goes
    assert compiler.compile(structures[0]) is found[0]
    assert compiler.compile(structures[1]) is not second


def test_nobody_waits_for_longer_than_allowed(bpe: Tokenizer) -> None:
    compiler = GrammarCompiler(bpe, bpe.vocab_size, timeout_seconds=0.0)
    structure = Structure("regex", "[a-z]{1,20}")
    with pytest.raises(GenerationError, match="the regex was not compiled within 0 s"):
        compiler.compile(structure)
    for _ in range(600):  # which did not stop the work
        try:
            assert compiler.compile(structure).start().allowed.any()
            break
        except GenerationError:
            time.sleep(0.05)
    else:
        pytest.fail("it was never compiled")


def test_a_structure_that_waited_is_not_told_that_it_is_too_complex(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor's time counts: what used its own is refused, what waited for others is worth another try."""
    real, made, ended = CompiledGrammar.compile, _Tables.of, threading.Event()

    def compile_after(structure: Structure, tables: Any) -> Any:
        while structure.kind == "regex" and not ended.is_set():  # as one that is too complex
            pass
        ended.wait(30)
        return real(structure, tables)

    def slow_tables(*arguments: Any) -> Any:
        time.sleep(1.0)
        return made(*arguments)

    monkeypatch.setattr(_Tables, "of", slow_tables)
    compiler = GrammarCompiler(bpe, bpe.vocab_size, timeout_seconds=0.5)
    compiler.compile(Structure("choice", ("a", "b")))  # whose time does not begin before the tables are there
    monkeypatch.setattr(CompiledGrammar, "compile", compile_after)
    waiting, complex_one = Structure("choice", ("c",)), Structure("regex", "a")
    try:
        for _ in range(2):
            with pytest.raises(StructureBusyError, match=r"not compiled within 0.5 s, .* try again"):
                compiler.compile(waiting)
        for _ in range(100):  # on a busy machine it waits too; in the end it has used its time
            with pytest.raises(GenerationError) as found:
                compiler.compile(complex_one)
            if not isinstance(found.value, StructureBusyError):
                break
        assert "simplify it" in str(found.value)
        third = Structure("choice", ("d",))  # both threads are taken: its turn does not come
        with pytest.raises(StructureBusyError):
            compiler.compile(third)
    finally:
        ended.set()
    assert compiler.compile(waiting).start().allowed.any()


def test_without_the_library(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = engine_for(bpe)
    with pytest.raises(MissingExtraError, match=r"llguidance is needed .* pip install 'arriero\[serve\]'"):
        engine.submit([1], SamplingParams(structure=Structure("json_object")))
    assert engine.unfinished == 0
    engine.generate([[1]], SamplingParams(max_new_tokens=2))


def test_a_vocabulary_that_is_joined_by_blanks_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(GenerationError, match="joined by blanks"):
        GrammarCompiler(tokenizer, 3).compile(Structure("regex", "a"))


def test_smollm2(smollm2: Path) -> None:
    """The real model fills in a form."""
    from arriero.formats.hf import load_model

    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "country": {"type": "string", "maxLength": 20},
        },
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    tokenizer = load_tokenizer(smollm2)
    engine = Engine(TorchRunner(load_model(smollm2, dtype=torch.float32), max_tokens=512), tokenizer)
    prompt = tokenizer.chat([{"role": "user", "content": "Describe the capital of France as JSON."}])
    structure = Structure("json_schema", json.dumps(schema))
    answer = engine.generate([prompt], SamplingParams(max_new_tokens=60, structure=structure))[0]
    assert answer.finish_reason == "stop"
    found = json.loads(answer.text)
    jsonschema.validate(found, schema)
    assert found["city"] == "Paris"
