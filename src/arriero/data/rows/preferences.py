"""Rows of two answers to one prompt, of which one is preferred.

- TRL's: `prompt`, `chosen`, `rejected`; texts, or lists of turns. Without `prompt`, `chosen` and `rejected` are whole
  conversations that differ in their last turn.
- Anthropic's (HH-RLHF): `chosen` and `rejected` are dialogues as one text each, a turn begins with a blank line and `Human:` or
  `Assistant:`.
- LLaMA-Factory's: `instruction` (and `input`, `system`, `history`) or `conversations` in the place of `prompt`; the answers
  texts or one turn each.
- PaddleNLP's: `src` and `tgt`, the user's turns and the answers between them; `response`, two answers; `sort`, their
  scores, of which the greater is better.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from arriero.data.assistant_turns import is_learned
from arriero.data.rows.conversations import any_turns, conversation, turns_of, with_system
from arriero.data.rows.prompts import alpaca_row
from arriero.data.rows.values import Row, keys_of, kind_of, optional_text
from arriero.data.samples import Message, Sample
from arriero.errors import DataError

KTO_KEYS = ("label", "kto_tag")  # TRL's and LLaMA-Factory's names for whether the one answer of a row is good
# where the turns before the answers are by themselves
BEGINNINGS = ("prompt", "instruction", "conversations", "messages")
ALPACA_KEYS = ("instruction", "input", "context", "system", "history")


@dataclass(frozen=True)
class PairSample:
    """A prompt with its two answers, each a sample of its own whose prompts are the same."""

    chosen: Sample
    rejected: Sample


def is_pair(row: Row) -> bool:
    """Whether a row holds two answers, as TRL or as PaddleNLP has them."""
    both = {"chosen", "rejected"} <= row.keys() and (row["chosen"] is not None or row["rejected"] is not None)
    return both or (row.get("sort") is not None and isinstance(row.get("response"), list))


def is_true_or_false(value: Any) -> bool:
    """Whether a value is either, or the text of either, as tables hold it."""
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


def pair_from_row(row: Any, where: str) -> PairSample:
    """One row as a pair.

    Args:
        where: file and line.

    Raises:
        DataError: naming `where` and what is missing.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, found {kind_of(row)}")
    if row.get("response") is not None:
        pair = _sorted_pair(row, where)
    elif "chosen" in row or "rejected" in row:
        pair = _chosen_and_rejected(row, where)
    else:
        judged = next((key for key in KTO_KEYS if is_true_or_false(row.get(key))), None)
        raise DataError(
            f"{where}: no pair of answers: 'chosen' and 'rejected' are needed (or 'response' and 'sort'), "
            + (
                f"and '{judged}' judges a single one, for KTO, which is not supported"
                if judged
                else f"found {keys_of(row)}"
            )
        )
    return PairSample(replace(pair.chosen, where=where), replace(pair.rejected, where=where))


def _chosen_and_rejected(row: Row, where: str) -> PairSample:
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise DataError(f"{where}: '{key}' is missing")
    row = _with_turns(row)
    prompt, answers = row.get("prompt"), (row["chosen"], row["rejected"])
    if prompt is None and row.get("instruction") is not None:
        _check_texts(row, "instruction", where)
        asked = {key: row[key] for key in ALPACA_KEYS if key in row}
        return PairSample(*(alpaca_row({**asked, "output": answer}, where, True) for answer in answers))
    if isinstance(prompt, str) and not any(isinstance(answer, list | dict) for answer in answers):
        _check_texts(row, "prompt", where)
        if not optional_text(row, "system", where).strip():
            return PairSample(*(Sample("", prompt, "", answer) for answer in answers))
    beginning = _beginning(row, where)
    samples = []
    for key in ("chosen", "rejected"):
        turns = with_system([*beginning, *_answer_turns(row[key], key, where, bool(beginning))], row, where)
        samples.append(conversation(turns, row.get("tools"), f"{where}: '{key}'", True))
        answer = samples[-1].answer
        if answer is not None and not is_learned(answer):
            raise DataError(f"{where}: '{key}' ends with a turn that is not to be learned, but it is what is compared")
    if _asked(samples[0]) != _asked(samples[1]):
        raise DataError(f"{where}: 'chosen' and 'rejected' must differ in their last turn only")
    return PairSample(*samples)


def _with_turns(row: Row) -> Row:
    """The row with turns in the place of dialogues that are texts."""
    if any(row.get(key) is not None for key in BEGINNINGS):
        return row
    spoken = {key: _dialogue(row[key]) for key in ("chosen", "rejected")}
    return {**row, **spoken} if all(spoken.values()) else row


def _dialogue(text: Any) -> list[Message]:
    """The turns of a text as Anthropic has them; none of another one."""
    if not isinstance(text, str):
        return []
    before, *spoken = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if before.strip() or not spoken:
        return []
    roles = ("user" if name == "Human" else "assistant" for name in spoken[::2])
    return [{"role": role, "content": said.strip()} for role, said in zip(roles, spoken[1::2], strict=True)]


def _check_texts(row: Row, prompt_key: str, where: str) -> None:
    for key in ("chosen", "rejected"):
        if not isinstance(row[key], str):
            raise DataError(f"{where}: '{key}' must be a string, as '{prompt_key}' is, found {kind_of(row[key])}")


def _beginning(row: Row, where: str) -> list[Message]:
    """The turns before the answers; none where `chosen` and `rejected` hold them, as UltraFeedback's beside a text `prompt`."""
    prompt, answers = row.get("prompt"), (row["chosen"], row["rejected"])
    if isinstance(prompt, list):
        return any_turns(prompt, "prompt", where)
    if isinstance(prompt, str):
        whole = any(isinstance(answer, list) for answer in answers)
        return [] if whole else [{"role": "user", "content": prompt}]
    if prompt is not None:
        raise DataError(f"{where}: 'prompt' must be a string or a list of turns, found {kind_of(prompt)}")
    if not all(isinstance(answer, list) and len(answer) > 1 for answer in answers):
        for key in ("conversations", "messages"):
            if isinstance(row.get(key), list):
                return any_turns(row[key], key, where)
    if not all(isinstance(answer, list) for answer in answers):
        raise DataError(f"{where}: has no 'prompt'; it has {keys_of(row)}")
    return []


def _answer_turns(value: Any, key: str, where: str, may_be_one: bool) -> list[Message]:
    """An answer as turns: a list of them, or one, or its text alone."""
    if may_be_one and isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if may_be_one and isinstance(value, dict):
        value = [value]
    return any_turns(value, key, where) if isinstance(value, list) else turns_of(value, key, where)


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
    history = with_system([], row, where)
    for question, answer in zip(asked, answered, strict=False):
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    pair = [Sample("", asked[-1], "", text, chat=True, history=tuple(history), stripped=True) for text in answers]
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
