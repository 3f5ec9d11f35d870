"""Fields of other servers that have one value here, the usual one: it is taken, others are told what to do instead."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from arriero.serving.body import Closed, only


class UsualFields(Closed):
    """Those of vLLM's sampling."""

    use_beam_search: Annotated[Literal[False] | None, only(False, "there is no beam search: ask for n answers")] = None
    length_penalty: Annotated[
        Annotated[float, Field(ge=1, le=1)] | None, only(1.0, "there is no beam search whose answers it could weigh")
    ] = None
    prompt_logprobs: Annotated[
        None, only(None, "ask /v1/completions for the prompt's log-probabilities, with echo and logprobs")
    ] = None
    truncate_prompt_tokens: Annotated[None, only(None, "no prompt is cut here: send a shorter one")] = None
    spaces_between_special_tokens: Annotated[
        Literal[True] | None, only(True, "special tokens are no part of an answer's text: leave it out")
    ] = None
    skip_special_tokens: Annotated[
        Literal[True] | None, only(True, "special tokens are no part of an answer's text: leave it out")
    ] = None
    include_stop_str_in_output: Annotated[
        Literal[False] | None, only(False, "an answer ends before its stop string: add it yourself")
    ] = None
