"""The form that an answer must have, and the grammar in Lark's syntax that says so."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from arriero.data.assistant_turns import THOUGHT_CLOSING, THOUGHT_OPENING
from arriero.engine.json_schema import best_form, json_form, json_text, parsed_schema, schema_problem, unheld
from arriero.errors import GenerationError

StructureKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
# Where an answer thinks first: nowhere, in a thought that its prompt has begun, in one that it may begin itself.
Thought = Literal["none", "open", "may"]

# Without it llguidance would choose the tokens of a text that has no alternative, and ask the tokenizer for them.
OPTIONS = '%llguidance {"no_forcing": true}'


MAX_REASON = 300  # characters of an error
MAX_CHECK_SECONDS = 2.0  # of a processor, for finding out what can be held of a structure's schemas


class UnkeptSchemaError(GenerationError):
    """A strict schema that no grammar can hold an answer to.

    Attributes:
        place: where whoever asked has written it, as "tools[0].function.parameters".
    """

    def __init__(self, message: str, place: str) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True)
class SchemaRule:
    """A rule of a grammar that is JSON of a schema.

    Attributes:
        name: of the rule.
        schema: as JSON text.
        strict: all of it must be held; else as much as can be.
        otherwise: the schema, as JSON text, where nothing of it can be.
        title, place: what an error calls a strict one, and where it is written.
    """

    name: str
    schema: str
    strict: bool = False
    otherwise: str = "{}"
    title: str = ""
    place: str = ""

    def lark(self) -> str:
        """The rule, in llguidance's Lark. Can take seconds.

        Raises:
            UnkeptSchemaError: a strict one that cannot be kept.
        """
        schema = parsed_schema(self.schema)
        if not self.strict:
            form = best_form(schema, parsed_schema(self.otherwise))
        else:
            problem = schema_problem(schema)
            if problem:
                told = f"{self.title} cannot be kept strictly: {problem[:MAX_REASON]}: change it, or leave strict out"
                raise UnkeptSchemaError(told, self.place)
            form = json_form(schema)
        return f"{self.name}: %json {json.dumps(form)}"


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
        schemas: of a grammar, rules of it that its text leaves out.

    Raises:
        GenerationError: no such kind, or a source that is none of this kind.
    """

    kind: StructureKind
    source: str | tuple[str, ...] = ""
    thought: Thought = "none"
    lenient: bool = False
    schemas: tuple[SchemaRule, ...] = ()

    def __post_init__(self) -> None:
        # A schema as JSON gives it and a list of texts are taken too.
        given: Any = self.source
        if self.kind == "json_schema" and isinstance(given, Mapping | bool):
            object.__setattr__(self, "source", json_text(given))
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
        return sum(len(text.encode()) for text in (*self.texts, *(rule.schema for rule in self.schemas)))


def lark_of(structure: Structure) -> str:
    """The structure as a grammar in llguidance's Lark. Schemas are looked at, which can take seconds.

    Raises:
        GenerationError: a schema that is no JSON object, or that cannot be held though it must be.
    """
    import llguidance

    if structure.kind == "grammar":
        return "\n".join([structure.texts[0], *_schema_rules(structure.schemas), OPTIONS, ""])
    if structure.kind == "regex":
        body = f"/{llguidance.regex_to_lark(structure.texts[0], 'dw')}/"
    elif structure.kind == "choice":
        body = f"/{'|'.join(map(_literal, structure.texts))}/"
    else:
        schema = {"type": "object"} if structure.kind == "json_object" else parsed_schema(structure.texts[0])
        problem = "" if structure.lenient else unheld(schema)
        if problem:
            raise GenerationError(f"the json_schema cannot be used: {problem}")
        body = "%json " + json_text(best_form(schema, {}) if structure.lenient else json_form(schema))
    before, rules = thought_rules(structure.thought)
    return "\n".join([f"start: {before}{body}", *rules, OPTIONS, ""])


def _schema_rules(schemas: tuple[SchemaRule, ...]) -> list[str]:
    """Rules of a grammar.

    Raises:
        GenerationError: it takes too long to find out what they can hold.
    """
    began, rules = time.thread_time(), []
    for rule in schemas:
        if time.thread_time() - began > MAX_CHECK_SECONDS:
            raise GenerationError(
                f"its {len(schemas)} schemas have so many combinations that {MAX_CHECK_SECONDS:g} s are not enough to check "
                "them: simplify them"
            )
        rules.append(rule.lark())
    return rules


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


def _literal(text: str) -> str:
    """The expression that only this text fits."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
