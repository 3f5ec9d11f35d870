"""The form of an answer in vLLM's words: `structured_outputs`, and the `guided_` fields that it had before."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from arriero.engine.structure import Structure, StructureKind
from arriero.errors import GenerationError
from arriero.serving.body import Closed, disagreement

MAX_CHOICES = 1024

Source = Annotated[str, Field(max_length=64 * 1024)]
Choices = Annotated[list[Source], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
Schema = dict[str, Any] | Source  # as JSON gives it, or as JSON text


class StructuredOutputs(Closed):
    """One of these."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = None
    json_object: bool | None = None


class StructuredFields(Closed):
    """Fields of a request that ask for a form of its answers."""

    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Source | None = None
    guided_choice: Choices | None = None
    guided_grammar: Source | None = None

    @model_validator(mode="after")
    def _one_form(self) -> StructuredFields:
        asked = self._forms()
        if len(asked) > 1:
            raise disagreement(asked[1][0], "give one form of the answer")
        if not asked and self.structured_outputs is not None:
            raise disagreement("structured_outputs", "give json, regex, choice, grammar or json_object, one of them")
        if asked:
            try:
                self.own_structure()
            except GenerationError as error:
                raise disagreement(asked[0][0], str(error)) from error
        return self

    @property
    def form_field(self) -> str | None:
        """The field that asks for a form."""
        return next((field for field, _, _ in self._forms()), None)

    @property
    def has_own_grammar(self) -> bool:
        """Whether the form is a whole grammar of the client's, which leaves nothing to be added."""
        return any(kind == "grammar" for _, kind, _ in self._forms())

    def own_structure(self) -> Structure | None:
        """The form for the engine.

        Raises:
            GenerationError: one that is none.
        """
        for _, kind, source in self._forms():
            return Structure(kind, source)
        return None

    def _forms(self) -> list[tuple[str, StructureKind, Any]]:
        """Those that are asked for: field, kind, source."""
        one = self.structured_outputs or StructuredOutputs()
        forms: list[tuple[str, StructureKind, Any]] = [
            ("structured_outputs", "json_schema", one.json_),
            ("structured_outputs", "regex", one.regex),
            ("structured_outputs", "choice", one.choice),
            ("structured_outputs", "grammar", one.grammar),
            ("structured_outputs", "json_object", "" if one.json_object else None),
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
        ]
        return [form for form in forms if form[2] is not None]
