"""What a request says to the chat template, named as in vLLM."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from arriero.serving.body import Closed, disagreement

MAX_VARIABLES = 16
# What templates are given otherwise, what Jinja itself has, and what `apply_chat_template` of transformers is told.
RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "raise_exception",
        "strftime_now",
    }
    | {"range", "dict", "lipsum", "cycler", "joiner", "namespace", "loop", "self", "caller", "varargs", "kwargs"}
    | {
        "conversation",
        "chat_template",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
    }
    | {"return_assistant_tokens_mask", "tokenizer_kwargs"}
)

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
Scalar = (
    bool
    | Annotated[int, Field(ge=-(2**53), le=2**53)]
    | Annotated[float, Field(allow_inf_nan=False)]
    | Annotated[str, Field(max_length=1024)]
)


class TemplateFields(Closed):
    """How a conversation becomes a prompt."""

    chat_template_kwargs: Annotated[dict[VariableName, Scalar | None], Field(max_length=MAX_VARIABLES)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _template_agrees(self) -> TemplateFields:
        for name in self.chat_template_kwargs or ():
            if name in RESERVED or name.endswith(("_token", "_tokens")):
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
