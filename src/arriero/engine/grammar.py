"""Answers of a given form: JSON, a JSON schema, a regular expression, one of several texts, a grammar.

The form is compiled by llguidance (https://github.com/guidance-ai/llguidance): an Earley parser over a lexer of derivatives,
which says at each token which ones keep the text a beginning of something that fits. Every token that does is allowed, so that
the answer is drawn from the model's own distribution restricted to them; nothing is forced. llguidance is used rather than
xgrammar because it has no dependencies, where xgrammar needs transformers and triton, and because it bounds its own work.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import OrderedDict
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from arriero.data.tokenizer import Tokenizer
from arriero.engine.structure import Structure, StructureKind, lark_of
from arriero.errors import GenerationError, require

if TYPE_CHECKING:
    import llguidance

Mask: TypeAlias = npt.NDArray[np.bool_]  # (V,)

MAX_REASON = 300  # characters of an error
OWN_SHARE = 0.8  # of the time to compile one: used by itself, it is too complex
MAX_WAITING = 64  # grammars that are being compiled or wait for it
# What bounds an answer's work, whatever its grammar is; see llguidance's LLParserLimits. They are below its own limits:
# an ambiguous grammar's time grows with the cube of the items, to 70 ms a token at 1,000; a state takes up to 2 kB.
MAX_ITEMS_IN_ROW = 1000
MAX_LEXER_STATES = 50_000
MAX_GRAMMAR_SYMBOLS = 200_000
# Answers of one grammar share its lexer, which grows with what they come to, up to 20 MB, by 500 MB in a second of a processor
# at worst. The grammars used last are remembered whatever it has become, those before them while answers have spent so little
# on them: together a quarter of a gigabyte.
ALWAYS_REMEMBERED = 8
MAX_ANSWER_SECONDS = 0.2


def _reason(matcher: llguidance.LLMatcher) -> str:
    """Why nothing can come next, in one line: llguidance's several without the source that they quote."""
    if not matcher.is_error():
        return "no token of the model has the text that must come next"
    lines = [line.strip() for line in matcher.get_error().split("\n<", 1)[0].splitlines()]
    kept = [line for line in lines if not re.match(r"\d+ \| |[\s^]*$", line)]
    reason = " ".join(kept)[:MAX_REASON]
    return "no text is complete" if reason.startswith("NoExtension") else reason or "it is too complex"


class _Vocabulary:
    """What llguidance must know of a tokenizer: each token's bytes.

    Behind the model's V tokens there are one for each byte, so that any text can be put into a matcher, and one for the end,
    which stands for all stop tokens. Special tokens stand for no text and are never allowed.
    """

    is_tokenizer_wrapper = True  # how llguidance knows that it has what it needs
    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.size = len(tokens)
        self.eos_token_id = self.size + 256
        self.special_token_ids = [self.eos_token_id]
        self.tokens = [*tokens, *(bytes([byte]) for byte in range(256)), b"<end of the answer>"]

    def __call__(self, text: str | bytes) -> list[int]:
        return self.of_bytes(text.encode() if isinstance(text, str) else text)

    def of_bytes(self, data: bytes) -> list[int]:
        """A text by its bytes' own tokens."""
        return [self.size + byte for byte in data]


@dataclass(frozen=True)
class _Tables:
    """A vocabulary, and llguidance's tree of it.

    Where the text of an answer leaves out a blank at its start, `first` is another tree for the first token, and `blanks` are
    the tokens that are nothing but this blank.
    """

    vocabulary: _Vocabulary
    tree: llguidance.LLTokenizer
    first: llguidance.LLTokenizer | None
    blanks: list[int]
    ordinary: (
        Mask  # (V,) bool, the tokens that can be part of a text: neither special ones nor those that end an answer
    )

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> _Tables:
        import llguidance

        decoding = tokenizer.decoding
        if decoding.separator:
            raise GenerationError(
                f"{tokenizer.folder}: its tokens are joined by blanks, for which structured answers are not supported"
            )
        tokens = [b"" if i in decoding.special_ids else decoding.token_bytes[i] for i in range(vocab_size)]
        vocabulary = _Vocabulary(tokens)
        ordinary = np.array([bool(token) for token in tokens], dtype=np.bool_)
        ordinary[[i for i in tokenizer.stop_token_ids if i < vocab_size]] = False
        tree = llguidance.LLTokenizer(vocabulary)  # type: ignore[arg-type]  # it takes what has the attributes
        if not decoding.strip_leading_space:
            return cls(vocabulary, tree, None, [], ordinary)
        stripped = _Vocabulary([token.removeprefix(b" ") for token in tokens])
        blanks = [i for i, token in enumerate(tokens) if token == b" "]
        return cls(vocabulary, tree, llguidance.LLTokenizer(stripped), blanks, ordinary)  # type: ignore[arg-type]

    def mask(self, matcher: llguidance.LLMatcher) -> Mask:
        """The tokens that can come next; none where it has come to an end or an error. A grammar can name tokens by their
        numbers, special ones too."""
        if matcher.is_stopped():
            return np.zeros(self.vocabulary.size, np.bool_)
        packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(packed, count=self.vocabulary.size, bitorder="little").view(np.bool_) & self.ordinary


@dataclass
class GrammarState:
    """How far one answer has come; not for two threads at once.

    Attributes:
        allowed: (V,) bool, the tokens that can come next; stop tokens are not among them. Not to be changed.
        accepting: whether the answer can end here.
        finished: whether it must.
        error: why nothing can come next although the answer cannot end here, "" otherwise.
    """

    _compiled: CompiledGrammar = field(repr=False)
    _matcher: llguidance.LLMatcher = field(repr=False)
    allowed: Mask = field(repr=False)
    accepting: bool
    finished: bool
    error: str = ""
    _begun: bool = False

    def advance(self, token: int) -> None:
        """The answer goes on with this token; one that is not allowed, such as a stop token, changes nothing."""
        if not bool(self.allowed[token]):
            return
        began = time.thread_time()
        self._matcher.consume_tokens(self._compiled.tokens_of(token, first=not self._begun))
        self._begun = True
        self.allowed = self._compiled.tables.mask(self._matcher)
        self._compiled.usage.add(time.thread_time() - began)
        stuck = not bool(self.allowed.any())
        self.accepting = not self._matcher.is_error() and self._matcher.is_accepting()
        self.finished = stuck and self.accepting
        if stuck and not self.accepting:
            if self._matcher.is_error():
                self._compiled.usage.add(math.inf)  # its lexer is full, and the next answer would come to it sooner
            self.error = f"the answer cannot follow its {self._compiled.kind} any further: {_reason(self._matcher)}"

    def copy(self) -> GrammarState:
        """One that goes its own way from here."""
        return replace(self, _matcher=self._matcher.deep_copy())


class StructureBusyError(GenerationError):
    """A structure that others keep from being compiled: it is worth asking again."""


class Usage:
    """How much answers have made of a grammar.

    Attributes:
        seconds: of a processor; infinite where it should not be used again.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Count some more."""
        with self._lock:
            self.seconds += seconds


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A structure that any number of answers can follow; threads may share it."""

    kind: StructureKind
    tables: _Tables = field(repr=False)
    usage: Usage = field(repr=False)
    _matcher: llguidance.LLMatcher = field(repr=False)
    _allowed: Mask = field(repr=False)
    _accepting: bool
    _finished: bool

    @classmethod
    def compile(cls, structure: Structure, tables: _Tables) -> CompiledGrammar:
        """
        Raises:
            GenerationError: a structure that is malformed, unsupported, too complex, or that no answer has.
        """
        import llguidance

        limits = llguidance.LLParserLimits(
            max_items_in_row=MAX_ITEMS_IN_ROW,
            max_lexer_states=MAX_LEXER_STATES,
            max_grammar_size=MAX_GRAMMAR_SYMBOLS,
            verbose_errors=False,
        )
        grammar = lark_of(structure)

        def begin(tree: llguidance.LLTokenizer) -> tuple[llguidance.LLMatcher, Mask]:
            matcher = llguidance.LLMatcher(tree, grammar, log_level=0, limits=limits)
            return matcher, tables.mask(matcher)

        matcher, allowed = begin(tables.tree)
        if tables.first is not None:
            after_blank = bool(allowed.any())
            _, allowed = begin(tables.first)
            allowed[tables.blanks] = after_blank & tables.ordinary[tables.blanks]
        accepting, stuck = matcher.is_accepting(), not bool(allowed.any())
        if stuck and not accepting:
            raise GenerationError(f"the {structure.kind} cannot be used: {_reason(matcher)}")
        return cls(structure.kind, tables, Usage(), matcher, allowed, accepting, stuck)

    def start(self) -> GrammarState:
        """The state before an answer's first token."""
        return GrammarState(self, self._matcher.deep_copy(), self._allowed, self._accepting, self._finished)

    def tokens_of(self, token: int, *, first: bool) -> list[int]:
        """The ids by which a matcher takes a token: those of its bytes, where its blank is not part of the answer's text."""
        vocabulary = self.tables.vocabulary
        if first and self.tables.first is not None and vocabulary.tokens[token].startswith(b" "):
            return vocabulary.of_bytes(vocabulary.tokens[token][1:])
        return [token]


class _Compiling:
    """A structure's compilation, on a thread of its own from when its turn comes."""

    def __init__(self) -> None:
        self.future: Future[CompiledGrammar]
        self._clock: int | None = None
        self._began: float | None = None

    def begin(self) -> None:
        """Called on its thread."""
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._began = self._now()

    def used_seconds(self) -> float:
        """Time of a processor that it has had, while it is not done. Where that is not known, time since it began."""
        return self._now() - self._began if self._began is not None else 0.0

    @property
    def answer_seconds(self) -> float:
        """What answers have spent on it, once it is done."""
        done = self.future.done() and not self.future.cancelled() and self.future.exception() is None
        return self.future.result().usage.seconds if done else 0.0

    def _now(self) -> float:
        return time.clock_gettime(self._clock) if self._clock is not None else time.monotonic()


class GrammarCompiler:
    """Compiles structures for one model, each once as long as it is remembered; threads may share it.

    The work is done by threads of its own, two at a time, and outside the interpreter's lock; the tables of the vocabulary are
    made by whoever comes first. A thread that must not wait, as one that generates, should find the structure compiled: let
    whoever takes the request call `compile` first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        max_source_bytes: int = 64 * 1024,
        timeout_seconds: float = 10.0,
        cache_size: int = 128,
    ) -> None:
        """
        Args:
            vocab_size: V, the logits' width; the tokenizer may have fewer tokens, or more.
            max_source_bytes: of a structure's source.
            timeout_seconds: after which a caller is sent away. The tables of a vocabulary, which are made with the first
                structure (150,000 tokens: half a second, 120 MB), are no part of it.
            cache_size: how many structures are remembered, those used last.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._max_source_bytes, self._timeout_seconds, self._cache_size = max_source_bytes, timeout_seconds, cache_size
        self._known: OrderedDict[Structure, _Compiling] = OrderedDict()
        self._waiting = 0
        self._lock, self._tables_lock = threading.Lock(), threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammar")
        self._made_tables: _Tables | None = None

    def compile(self, structure: Structure) -> CompiledGrammar:
        """The compiled structure; waits for it.

        Raises:
            GenerationError: a structure that is malformed, unsupported, too large or complex, or that no answer has.
            StructureBusyError: it is not its fault that it is not compiled yet.
            MissingExtraError: llguidance is not installed.
        """
        require("llguidance", "serve")
        if structure.size > self._max_source_bytes:
            raise GenerationError(
                f"the {structure.kind} has {structure.size} bytes: at most {self._max_source_bytes} are allowed"
            )
        tables = self._tables()
        compiling = self._compiling(structure, tables)
        try:
            return compiling.future.result(self._timeout_seconds)
        except CancelledError as error:
            raise StructureBusyError("structures are compiled no more, for the process ends") from error
        except TimeoutError as error:
            if compiling.future.done():  # just now
                return compiling.future.result()
            message = f"the {structure.kind} was not compiled within {self._timeout_seconds:g} s"
            # one that is asked for again goes on meanwhile, and so comes to this in the end
            if compiling.used_seconds() >= OWN_SHARE * self._timeout_seconds:
                raise GenerationError(f"{message}: simplify it") from error
            raise StructureBusyError(f"{message}, for there is much else to do: try again") from error

    def close(self) -> None:
        """Compile nothing more. Those whose turn has not come are given up: else the process would compile them as it ends."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compiling(self, structure: Structure, tables: _Tables) -> _Compiling:
        with self._lock:
            compiling = self._known.get(structure)
            if compiling is None or compiling.answer_seconds == math.inf:
                if self._waiting >= MAX_WAITING:
                    raise StructureBusyError(f"{MAX_WAITING} structures are being compiled already: try again later")
                self._waiting += 1
                compiling = self._known[structure] = _Compiling()
                compiling.future = self._threads.submit(self._compile, structure, tables, compiling)
            self._known.move_to_end(structure)
            self._forget()
        return compiling

    def _forget(self) -> None:
        """Keep so many structures, and so much of what answers have made of them; those used last stay."""
        spent = 0.0
        for place, (structure, one) in enumerate(reversed(list(self._known.items()))):
            seconds = one.answer_seconds
            earlier = place >= ALWAYS_REMEMBERED
            if place >= self._cache_size or seconds == math.inf or (earlier and spent + seconds > MAX_ANSWER_SECONDS):
                del self._known[structure]
            elif earlier:
                spent += seconds

    def _compile(self, structure: Structure, tables: _Tables, compiling: _Compiling) -> CompiledGrammar:
        try:
            compiling.begin()
            return CompiledGrammar.compile(structure, tables)
        finally:
            with self._lock:
                self._waiting -= 1

    def _tables(self) -> _Tables:
        with self._tables_lock:
            if self._made_tables is None:
                self._made_tables = _Tables.of(self._tokenizer, self._vocab_size)
            return self._made_tables
