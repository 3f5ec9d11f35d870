"""What a request says to the chat template, named as in vLLM."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from arriero.config.template_variables import (
    MAX_VARIABLE_INTEGER,
    MAX_VARIABLE_TEXT,
    MAX_VARIABLES,
    VARIABLE_NAME,
    is_reserved,
)
from arriero.serving.body import Closed, at_most, disagreement

VariableName = Annotated[str, Field(pattern=VARIABLE_NAME)]
Scalar = (
    bool
    | Annotated[int, Field(ge=-MAX_VARIABLE_INTEGER, le=MAX_VARIABLE_INTEGER)]
    | Annotated[float, Field(allow_inf_nan=False)]
    | Annotated[str, Field(max_length=MAX_VARIABLE_TEXT)]
)


class TemplateFields(Closed):
    """How a conversation becomes a prompt."""

    chat_template_kwargs: (
        Annotated[dict[VariableName, Scalar | None], Field(max_length=MAX_VARIABLES), at_most(MAX_VARIABLES)] | None
    ) = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _template_agrees(self) -> TemplateFields:
        for name in self.chat_template_kwargs or ():
            if is_reserved(name):
                raise disagreement("chat_template_kwargs", f"{name!r} is not for requests to set")
        if self.add_generation_prompt and self.continue_final_message:
            raise disagreement(
                "continue_final_message", "the answer goes on with the last message, or begins one: set one of them"
            )
        return self

    @property
    def template_options(self) -> dict[str, Any]:
        """For `Tokenizer.chat`."""
        goes_on = bool(self.continue_final_message)
        return {
            "add_generation_prompt": self.add_generation_prompt is not False and not goes_on,
            "continue_final_message": goes_on,
            "variables": self.chat_template_kwargs,
        }
