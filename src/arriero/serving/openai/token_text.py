"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from arriero.data.tokenizer import Tokenizer
from arriero.engine.logprobs import TokenLogprobs

LEAST = -9999.0  # what stands for minus infinity, which JSON has not


class TokenTexts:
    """What single tokens are as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def is_control(self, token: int) -> bool:
        """Whether it is a control token."""
        return token in self._tokenizer.decoding.special_ids

    def data(self, token: int) -> bytes:
        """A token's bytes; of a control token, its name's."""
        decoding = self._tokenizer.decoding
        if self.is_control(token):
            return (self._tokenizer.id_to_token(token) or "").encode()
        return decoding.token_bytes[token]

    def text(self, token: int) -> str:
        """A token's text; of bytes that are no text by themselves `bytes:\\xe2\\x82`, as OpenAI writes them."""
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def offsets(self, start: int = 0) -> TextOffsets:
        """Of the tokens of a text that begins there."""
        return TextOffsets(self._tokenizer, start)


class TextOffsets:
    """Where tokens begin in the text that they make, in characters: all parts of a character where it begins."""

    def __init__(self, tokenizer: Tokenizer, start: int) -> None:
        self._decoder, self._at = tokenizer.stream_decoder(), start

    def next(self, token: int) -> int:
        """Where the next token begins. Control tokens are no part of the text."""
        at = self._at
        self._at += len(self._decoder.push(token))
        return at


def _bounded(logprob: float) -> float:
    return max(logprob, LEAST)


def chat_logprobs(texts: TokenTexts, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/chat/completions."""
    content = [_entry(texts, token, found) for token, found in zip(tokens, logprobs, strict=True)]
    return {"content": content, "refusal": None}


def _entry(texts: TokenTexts, token: int, found: TokenLogprobs) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        data = texts.data(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": _bounded(logprob), "bytes": list(data)}

    return {**one(token, found.logprob), "top_logprobs": [one(other, value) for other, value in found.top]}


class MessageLogprobs:
    """Those of a message of /v1/responses, given out with its text: tokens of calls that follow it are not among them."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self._offsets = texts, texts.offsets()
        self._waiting: deque[tuple[int, dict[str, Any]]] = deque()
        self._told = 0

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """The answer's next tokens."""
        for token, found in zip(tokens, logprobs, strict=True):
            self._waiting.append((self._offsets.next(token), _entry(self._texts, token, found)))

    def take(self, text: str, passed: int = 0) -> list[dict[str, Any]]:
        """Of the tokens that begin in the message's next text.

        Args:
            passed: characters of the answer before it that are not told.
        """
        self._told += passed
        while passed and self._waiting and self._waiting[0][0] < self._told:
            self._waiting.popleft()
        self._told += len(text)
        found = []
        while self._waiting and self._waiting[0][0] < self._told:
            found.append(self._waiting.popleft()[1])
        return found


class CompletionLogprobs:
    """`logprobs` of a choice of /v1/completions, also piece by piece."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self._start, self._offsets = texts, 0, texts.offsets()
        self._found = _nothing()

    def echo(self, text: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        """The prompt comes before the answer, and its tokens before the answer's."""
        self._add(tokens, logprobs, len(text))
        self._start, self._offsets = len(text), self._texts.offsets(len(text))

    def take(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None], text: str | None = None
    ) -> dict[str, Any]:
        """Of the next tokens.

        Args:
            text: the whole answer's, where it is known: the tokens of a stop string are no part of it.
        """
        self._add(tokens, logprobs, None if text is None else self._start + len(text))
        found, self._found = self._found, _nothing()
        return found

    def _add(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None], end: int | None) -> None:
        for token, own in zip(tokens, logprobs, strict=True):
            self._found["tokens"].append(self._texts.text(token))
            self._found["token_logprobs"].append(None if own is None else _bounded(own.logprob))
            self._found["top_logprobs"].append(None if own is None else self._top(token, own))
            at = self._offsets.next(token)
            self._found["text_offset"].append(at if end is None else min(at, end))

    def _top(self, token: int, own: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for other, value in (*own.top, (token, own.logprob)):  # several tokens can have one text
            text = self._texts.text(other)
            top[text] = max(top.get(text, LEAST), _bounded(value))
        return top


def _nothing() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
