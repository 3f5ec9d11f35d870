"""What requests of OpenAI's API have in common: bounded fields, and those that are taken and have no effect here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from arriero.engine.sampling_params import (
    MAX_ANSWERS,
    MAX_INTEGER,
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from arriero.engine.structure import Structure
from arriero.serving.body import Closed, at_most, disagreement
from arriero.serving.openai.structured_fields import StructuredFields
from arriero.serving.openai.usual_fields import UsualFields

MAX_TEXT = 16_000_000  # characters; the body's own limit is lower
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_PRIORITY = 100  # the least urgent; nobody goes before those who ask for nothing, so that nobody can starve them

Text = Annotated[str, Field(max_length=MAX_TEXT)]
ShortText = Annotated[str, Field(max_length=512)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_STRING_LENGTH)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS, allow_inf_nan=False)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Closed):
    """What a stream holds besides the answer. `include_obfuscation` is taken and has no effect."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def check_stream_options(stream: bool | None, options: StreamOptions | None) -> None:
    """Only a stream has them, as in OpenAI's API."""
    if options is not None and not stream:
        raise disagreement("stream_options", "stream_options needs stream: true")


class IgnoredFields(Closed):
    """Fields of OpenAI's API that mean nothing to a server of one's own. They are checked and have no effect; every other
    unknown field is refused, as OpenAI does."""

    user: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_retention: ShortText | None = None
    service_tier: ShortText | None = None
    store: bool | None = None
    metadata: Annotated[dict[ShortText, ShortText], Field(max_length=16), at_most(16)] | None = None


class SamplingFields(StructuredFields, UsualFields, IgnoredFields):
    """How answers are drawn. What is no field of OpenAI's API is called as in vLLM."""

    model: ModelName | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: (
        Annotated[dict[TokenKey, Bias], Field(max_length=MAX_LOGIT_BIASES), at_most(MAX_LOGIT_BIASES)] | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] | None = None

    @model_validator(mode="after")
    def _streams_what_it_says(self) -> SamplingFields:
        check_stream_options(self.stream, self.stream_options)
        return self

    @property
    def answers(self) -> int:
        """How many to each prompt."""
        return self.n or 1

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_new_tokens: int, **more: Any) -> SamplingParams:
        """For the engine.

        Raises:
            GenerationError: what cannot be.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        structure = more.pop("structure", None) or self.own_structure()
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(self.min_tokens or 0, max_new_tokens),
            do_sample=temperature > 0 and top_p > 0,
            temperature=temperature,
            top_k=max(self.top_k or 0, 0),  # -1: all, as in vLLM
            top_p=top_p or 1.0,  # 0: the likeliest token alone
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            stop_strings=tuple(stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=None if self.seed is None else self.seed % 2**64,
            ignore_eos=bool(self.ignore_eos),
            n=self.answers,
            structure=structure,
            **more,
        )


class TextFormat(Closed):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Closed):
    """A JSON object of any form."""

    type: Literal["json_object"]


class JsonSchema(Closed):
    """A JSON schema with a name."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(Closed):
    """JSON of a given form."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def structure_of(form: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Structure | None:
    """The form for the engine."""
    if isinstance(form, JsonObjectFormat):
        return Structure("json_object")
    if isinstance(form, JsonSchemaFormat):
        schema: Any = form.json_schema.schema_  # taken as JSON gives it
        return Structure("json_schema", schema, lenient=not form.json_schema.strict)
    return None
