"""The form that an answer must have, and the grammar in Lark's syntax that says so."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from arriero.data.assistant_turns import THOUGHT_CLOSING, THOUGHT_OPENING
from arriero.errors import GenerationError, require

StructureKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
# Where an answer thinks first: nowhere, in a thought that its prompt has begun, in one that it may begin itself.
Thought = Literal["none", "open", "may"]

# Between two parts of a JSON text at most the one blank that models are used to write: where blanks may come, a weak model
# goes on with them until its answer is cut.
JSON_BLANKS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# What it takes for a schema that says more than it can hold an answer to: the rest of the schema holds.
BEST_EFFORT = {"lenient": True, "coerce_one_of": True}
# Without it llguidance would choose the tokens of a text that has no alternative, and ask the tokenizer for them.
OPTIONS = '%llguidance {"no_forcing": true}'


@dataclass(frozen=True)
class Structure:
    """The form that an answer must have.

    Attributes:
        kind: "json_object" (any JSON object), "json_schema" (Draft 2020-12), "regex" (the whole answer; Rust's syntax without
            looking around, and `\\d` and `\\w` are ASCII as in JSON schemas), "choice" (one of several texts), or "grammar"
            (Lark's syntax).
        thought: what may come before it. A "grammar" has nothing before it: it is to hold its own (see `thought_rules`).
        source: the schema, also as what JSON makes of it; the expression; the texts; or the grammar. Empty for "json_object".
        lenient: of a schema as much as can be held, and nothing but JSON where that is nothing; else such a schema is refused.

    Raises:
        GenerationError: no such kind, or a source that is none of this kind.
    """

    kind: StructureKind
    source: str | tuple[str, ...] = ""
    thought: Thought = "none"
    lenient: bool = False

    def __post_init__(self) -> None:
        # A schema as JSON gives it and a list of texts are taken too.
        given: Any = self.source
        if self.kind == "json_schema" and isinstance(given, Mapping | bool):
            object.__setattr__(self, "source", _dump(given))
        if isinstance(given, list):
            object.__setattr__(self, "source", tuple(given))
        if self.kind not in get_args(StructureKind):
            raise GenerationError(
                f"there is no structure {self.kind!r}: the kinds are {', '.join(get_args(StructureKind))}"
            )
        if self.thought not in get_args(Thought):
            raise GenerationError(f"there is no thought {self.thought!r}: the kinds are {', '.join(get_args(Thought))}")
        texts = self.texts
        if self.kind == "choice" and isinstance(self.source, str):
            raise GenerationError("a choice is a list of texts: put even a single one into a list")
        if not (isinstance(self.source, str) or self.kind == "choice") or not all(isinstance(t, str) for t in texts):
            raise GenerationError(f"the source of a {self.kind} is {type(self.source).__name__}: it must be text")
        if not texts or (self.kind in ("json_schema", "grammar") and not texts[0].strip()):
            raise GenerationError(f"the {self.kind} is empty: say what the answer may be")
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError as error:
            raise GenerationError(f"the {self.kind} holds half a surrogate pair, which is no character") from error

    @property
    def texts(self) -> tuple[str, ...]:
        """The source as texts; one, but for a choice."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def size(self) -> int:
        """Bytes of the source."""
        return sum(len(text.encode()) for text in self.texts)


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise GenerationError(f"the JSON schema is not JSON: {error}") from error


def lark_of(structure: Structure) -> str:
    """The structure as a grammar in llguidance's Lark.

    Raises:
        GenerationError: a schema that is no JSON object.
    """
    import llguidance

    if structure.kind == "grammar":
        return f"{structure.texts[0]}\n{OPTIONS}\n"
    if structure.kind == "regex":
        body = f"/{llguidance.regex_to_lark(structure.texts[0], 'dw')}/"
    elif structure.kind == "choice":
        body = f"/{'|'.join(map(_literal, structure.texts))}/"
    else:
        schema = {"type": "object"} if structure.kind == "json_object" else _schema(structure.texts[0])
        body = "%json " + _dump(best_form(schema, {}) if structure.lenient else json_form(schema))
    before, rules = thought_rules(structure.thought)
    return "\n".join([f"start: {before}{body}", *rules, OPTIONS, ""])


def json_form(schema: Mapping[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """A schema as grammars have it after `%json`. It gets our options for its own: such as to ignore what is not supported
    could make of an answer one that does not fit, which only a request can allow (`lenient`)."""
    return {**schema, "x-guidance": {**JSON_BLANKS, **(BEST_EFFORT if lenient else {})}}


def best_form(schema: Mapping[str, Any], otherwise: Mapping[str, Any]) -> dict[str, Any]:
    """The form that holds as much of a schema as can be; if that is nothing, the form of another schema."""
    form = json_form(schema, lenient=True)
    return json_form(otherwise) if schema_problem(form) else form


def schema_problem(form: Mapping[str, Any]) -> str:
    """Why no grammar can have this after `%json`, in one line; "" if one can."""
    require("llguidance", "serve")
    return _problem(json.dumps(form))


@lru_cache(maxsize=256)  # an agent sends the same tools with each of its requests
def _problem(form: str) -> str:
    import llguidance

    told = llguidance.LLMatcher.validate_grammar(f"start: %json {form}")
    told = re.sub(r"\n[\s^]*(?=\n)", "", told.split("\n   1 | ", 1)[0])  # without the source and marks in it
    return " ".join(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", told).split())


def thought_rules(thought: Thought, *, gap: bool = True) -> tuple[str, list[str]]:
    """What stands before the rest of a grammar's start, ending in a blank or empty, and the rules that it needs.

    Args:
        gap: whether blanks may part the thought from the rest, which has none at its beginning.
    """
    if thought == "none":
        return "", []
    opening = "" if thought == "open" else THOUGHT_OPENING
    rule = f"thought[lazy]: /{opening}(?s:.*){THOUGHT_CLOSING.replace('/', chr(92) + '/')}/"
    before = "thought GAP?" if gap else "thought"
    return (f"{before} " if thought == "open" else f"({before})? "), [rule, "GAP: /[ \\n]{1,4}/"]


def _schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise GenerationError(f"the JSON schema is not JSON: {error}") from error
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise GenerationError(f"the JSON schema is {type(schema).__name__}: it must be an object")
    return schema


def _literal(text: str) -> str:
    """The expression that only this text fits."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
