"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

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


def _bounded(logprob: float) -> float:
    return max(logprob, LEAST)


def chat_logprobs(texts: TokenTexts, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/chat/completions."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = texts.data(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": _bounded(logprob), "bytes": list(data)}

    content = [
        {**one(token, found.logprob), "top_logprobs": [one(other, value) for other, value in found.top]}
        for token, found in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`logprobs` of a choice of /v1/completions, also piece by piece."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self._offset = texts, 0

    def take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Of the next tokens. Offsets count the characters of the tokens' texts; control tokens are no part of the text."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, own in zip(tokens, logprobs, strict=True):
            text = self._texts.text(token)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if own is None else _bounded(own.logprob))
            found["top_logprobs"].append(None if own is None else self._top(token, own))
            found["text_offset"].append(self._offset)
            self._offset += 0 if self._texts.is_control(token) else len(text)
        return found

    def _top(self, token: int, own: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for other, value in (*own.top, (token, own.logprob)):  # several tokens can have one text
            text = self._texts.text(other)
            top[text] = max(top.get(text, LEAST), _bounded(value))
        return top
