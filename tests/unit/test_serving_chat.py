"""What /v1/chat/completions says besides an answer's text: why it ended, which log-probabilities it has; what is retried."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.answer import FinishReason, Generation
from arriero.engine.grammar import StructureBusyError
from arriero.engine.logprobs import TokenLogprobs
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.structure import Structure, Thought
from arriero.engine.text_stream import TextStream
from arriero.engine.ticket import Piece
from arriero.errors import GenerationError
from arriero.formats.download import resolve_model
from arriero.models.presets import TINY_RANDOM_LLAMA
from arriero.serving.api_errors import ApiError
from arriero.serving.openai.call_reader import Calls
from arriero.serving.openai.chat import ChatAnswers, ChatWork, prepare
from arriero.serving.openai.requests import ChatRequest
from arriero.serving.openai.tool_format import CHATML, LLAMA3, ToolFormat
from arriero.serving.service import ServedModel, Service
from arriero.serving.text_bound import TextBound
from arriero.serving.workers import Workers

HELLO: Any = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "now", "arguments": {"a": {}}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))


class Told:
    """An answer as the engine gives it, and what becomes of it, whole and streamed.

    Attributes:
        finish: the reasons.
        content, logprobs: texts; that of the tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        written: str,
        *,
        stop: str | None = None,
        reason: FinishReason = "stop",
        form: ToolFormat | None = None,
        thought: Thought = "none",
        **fields: Any,
    ) -> None:
        body = ChatRequest.model_validate({"messages": HELLO, "logprobs": True, **fields})
        service: Any = SimpleNamespace(tokenizer=tokenizer)
        calls = Calls(form, ("now",)) if form is not None else None
        answers = ChatAnswers(service, body, ServedModel("tiny"), ChatWork([1], SamplingParams(), calls, thought))
        stream = TextStream(tokenizer.stream_decoder(), [stop] if stop is not None else [])
        tokens, pieces = tokenizer.encode(written), []
        if reason == "stop":
            tokens.append(tokenizer.stop_token_ids[0])
        own = [TokenLogprobs(-1.0, ()) for _ in tokens]
        for place, token in enumerate(tokens):
            pieces.append((stream.push(token), place))
            if stream.stopped:
                reason, tokens, own = "stop_string", tokens[: place + 1], own[: place + 1]
                break
        last = stream.finish()
        result = Generation(tokens, stream.text, reason, 1, logprobs=tuple(own))
        whole = answers._choice(0, result)
        chunks: list[Any] = []

        class Job:
            usage: Any = None

            async def pieces(self) -> Any:
                for text, place in pieces:
                    ends = place == len(tokens) - 1
                    more = (text + last, result) if ends else (text, None)
                    yield 0, Piece(more[0], (tokens[place],), more[1], logprobs=(own[place],))

        async def run() -> None:
            job: Any = Job()
            chunks.extend([chunk["choices"][0] async for chunk in answers.chunks(job)])

        asyncio.run(run())
        self.content = [
            whole["message"]["content"] or "",
            "".join(chunk["delta"].get("content") or "" for chunk in chunks),
        ]
        self.finish = [whole["finish_reason"], chunks[-1]["finish_reason"]]
        streamed = [one for chunk in chunks if chunk["logprobs"] for one in chunk["logprobs"]["content"]]
        self.logprobs = [_text(whole["logprobs"]["content"]), _text(streamed)]
        self.calls = whole["message"].get("tool_calls", [])


def _text(content: list[dict[str, Any]]) -> str:
    return b"".join(bytes(one["bytes"]) for one in content).decode()


@pytest.mark.parametrize(
    ("written", "form", "stop", "reason", "finish"),
    [
        (CALL, CHATML, None, "stop", "tool_calls"),
        (CALL, CHATML, "</tool_call>", "stop", "tool_calls"),
        (f"{CALL}\n{CALL}", CHATML, "\n<tool_call>", "stop", "tool_calls"),
        (f"{CALL}\n{CALL}", CHATML, "call>\n{", "stop", "stop"),  # within the first
        (CALL, CHATML, "{}", "stop", "stop"),
        (CALL, CHATML, "name", "stop", "stop"),
        (CALL, CHATML, None, "length", "length"),
        (CALL[:50], CHATML, None, "length", "length"),
        ("Hello\nyou", CHATML, "\n", "stop", "stop"),
        ('{"name": "now", "parameters": {"a": 1}}', LLAMA3, "}}", "stop", "stop"),
        ('{"name": "now", "parameters": {"a": {}}} x', LLAMA3, "} x", "stop", "tool_calls"),
    ],
)
def test_a_whole_call_is_one_wherever_a_stop_string_came(
    tokenizer: Tokenizer, written: str, form: ToolFormat, stop: str | None, reason: FinishReason, finish: str
) -> None:
    told = Told(tokenizer, written, form=form, stop=stop, reason=reason)
    assert told.finish == [finish, finish]
    assert finish != "tool_calls" or told.calls


@pytest.mark.parametrize(
    ("fields", "stops"),
    [
        ({}, ("\n",)),
        ({"tools": [TOOL]}, ("\n",)),
        ({"tools": [TOOL], "tool_choice": "none"}, ("\n",)),
        ({"tools": [TOOL], "tool_choice": "required"}, ()),
        ({"tools": [TOOL], "tool_choice": NAMED}, ()),
    ],
)
def test_stop_strings_do_not_stop_a_call_that_must_come(
    tokenizer: Tokenizer, fields: dict[str, Any], stops: tuple[str, ...]
) -> None:
    service: Any = SimpleNamespace(
        tokenizer=tokenizer,
        reasoning=True,
        room=lambda *_: 8,
        text_bound=TextBound(None, False),
        check_length=lambda *_: None,
    )
    body = ChatRequest.model_validate({"messages": HELLO, "stop": ["\n"], **fields})
    assert prepare(service, body).params.stop_strings == stops


THOUGHT = "<think>\nHm, 東.\n</think>\n\n"


@pytest.mark.parametrize(
    ("written", "options", "logprobs"),
    [
        ("Hello there", {}, "Hello there"),
        ("naïve 東", {"reason": "length"}, "naïve 東"),
        ("Hello\n there", {"stop": "\n"}, "Hello"),
        ("Hello END there", {"stop": "END"}, "Hello "),
        (f"I look.\n{CALL}", {"form": CHATML}, "I look."),
        (CALL, {"form": CHATML}, ""),
        (f"{THOUGHT}Yes.", {"thought": "may"}, f"{THOUGHT}Yes."),
        (f"{THOUGHT}Yes. END", {"thought": "may", "stop": " END"}, f"{THOUGHT}Yes."),
        (f"{THOUGHT}Yes.", {"thought": "may", "include_reasoning": False}, "Yes."),
        (f"Hm.</think>{CALL}", {"thought": "open", "form": CHATML}, "Hm.</think>"),
        (f"Hm.</think>{CALL}", {"thought": "open", "form": CHATML, "include_reasoning": False}, ""),
        ("Hm, well", {"thought": "open", "reason": "length"}, "Hm, well"),
        ("<think>Hm, 東", {"thought": "may", "reason": "length"}, "<think>Hm, 東"),
        ("Hm.</think>Yes", {"thought": "open", "stop": "</think>"}, "Hm."),
        ("Hm, well", {"thought": "open", "reason": "length", "include_reasoning": False}, ""),
        ("<think></think>Yes", {"thought": "may"}, "Yes"),
    ],
)
def test_log_probabilities_are_those_of_what_is_told(
    tokenizer: Tokenizer, written: str, options: dict[str, Any], logprobs: str
) -> None:
    told = Told(tokenizer, written, **options)
    assert told.logprobs == [logprobs, logprobs]
    assert told.content[0] == told.content[1]


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [(StructureBusyError("wait"), 503, 5), (GenerationError("it is\ntoo complex"), 400, None)],
)
def test_a_structure_that_had_to_wait_is_asked_for_again(error: Exception, status: int, retry: int | None) -> None:
    def fail(structure: Structure) -> None:
        raise error

    engine = SimpleNamespace(grammars=SimpleNamespace(compile=fail))
    service: Any = SimpleNamespace(workers=Workers(), background=SimpleNamespace(engine=engine))
    with pytest.raises(ApiError) as found:
        asyncio.run(Service._compile(service, Structure("json_object"), "response_format"))
    service.workers.close()
    assert (found.value.status, found.value.retry_after) == (status, retry)
    assert "\n" not in found.value.message
