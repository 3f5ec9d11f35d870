"""Rows of two answers to one prompt, of which one is preferred.

- TRL's: `prompt`, `chosen`, `rejected`; texts, or lists of turns. Without `prompt`, `chosen` and `rejected` are whole
  conversations that differ in their last turn.
- PaddleNLP's: `src` and `tgt`, the user's turns and the answers between them; `response`, two answers; `sort`, their
  scores, of which the greater is better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from arriero.data.rows.conversations import conversation, turns_of
from arriero.data.rows.values import Row
from arriero.data.samples import Message, Sample
from arriero.errors import DataError


@dataclass(frozen=True)
class PairSample:
    """A prompt with its two answers, each a sample of its own whose prompts are the same."""

    chosen: Sample
    rejected: Sample

    @property
    def equal(self) -> bool:
        """Whether there is nothing to prefer."""
        return (self.chosen.target, self.chosen.answer) == (self.rejected.target, self.rejected.answer)


def pair_from_row(row: Any, where: str) -> PairSample:
    """One row as a pair.

    Args:
        where: file and line.

    Raises:
        DataError: naming `where` and what is missing.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, found {type(row).__name__}")
    if "response" in row:
        pair = _sorted_pair(row, where)
    elif "chosen" in row or "rejected" in row:
        pair = _chosen_and_rejected(row, where)
    else:
        raise DataError(
            f"{where}: no pair of answers: 'chosen' and 'rejected' are needed (or 'response' and 'sort'), "
            f"found {', '.join(map(str, row)) or 'nothing'}"
        )
    return PairSample(replace(pair.chosen, where=where), replace(pair.rejected, where=where))


def _chosen_and_rejected(row: Row, where: str) -> PairSample:
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise DataError(f"{where}: '{key}' is missing")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) or isinstance(rejected, list) or isinstance(prompt, list):
        return _turns(row, where)
    if not isinstance(prompt, str):
        raise DataError(f"{where}: 'prompt' must be a string or a list of turns, found {type(prompt).__name__}")
    for key, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str):
            raise DataError(f"{where}: '{key}' must be a string, as 'prompt' is, found {type(value).__name__}")
    return PairSample(Sample("", prompt, "", chosen), Sample("", prompt, "", rejected))


def _turns(row: Row, where: str) -> PairSample:
    beginning: list[Message] = []
    prompt = row.get("prompt")
    whole = isinstance(prompt, str) or prompt is None  # then the answers hold the prompt, as in UltraFeedback's files
    if not whole:
        beginning = turns_of(prompt, "prompt", where)
    samples = []
    for key in ("chosen", "rejected"):
        value = row[key]
        if isinstance(value, str) and not whole:
            value = [{"role": "assistant", "content": value}]
        samples.append(
            conversation(beginning + turns_of(value, key, where), row.get("tools"), f"{where}: '{key}'", True)
        )
    chosen, rejected = samples
    if _asked(chosen) != _asked(rejected):
        raise DataError(f"{where}: 'chosen' and 'rejected' must differ in their last turn only")
    return PairSample(chosen, rejected)


def _asked(sample: Sample) -> tuple[Any, ...]:
    return sample.history, sample.turn, sample.prompt


def _sorted_pair(row: Row, where: str) -> PairSample:
    asked, answered = _texts(row, "src", where), _texts(row, "tgt", where)
    responses, scores = row["response"], row.get("sort")
    if not isinstance(responses, list) or len(responses) != 2:
        raise DataError(f"{where}: 'response' must be a list of two answers")
    if (
        not isinstance(scores, list)
        or len(scores) != 2
        or not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores)
    ):
        raise DataError(f"{where}: 'sort' must be two numbers, one for each response, the greater for the better one")
    if scores[0] == scores[1]:
        raise DataError(f"{where}: both responses have 'sort' {scores[0]}: neither is preferred")
    answers = [_response(response, where) for response in responses]
    if not asked or len(answered) != len(asked) - 1:
        raise DataError(
            f"{where}: 'src' has {len(asked)} turns and 'tgt' {len(answered)}: every turn of 'src' but the last is answered "
            "by one of 'tgt'"
        )
    system = row.get("system")
    history: list[Message] = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    for question, answer in zip(asked, answered, strict=False):
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    pair = [Sample("", asked[-1], "", answer, chat=True, history=tuple(history)) for answer in answers]
    return PairSample(*(pair if scores[0] > scores[1] else reversed(pair)))


def _texts(row: Row, key: str, where: str) -> list[str]:
    """A string or a list of strings; nothing where the key is missing or empty."""
    value = row.get(key) or []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: '{key}' must be a string or a list of strings")
    return texts


def _response(response: Any, where: str) -> str:
    if isinstance(response, list) and len(response) == 1:
        response = response[0]
    if not isinstance(response, str):
        raise DataError(
            f"{where}: a response must be one answer, a string; longer dialogues belong into 'src' and 'tgt'"
        )
    return response
