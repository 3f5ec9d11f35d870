"""Fine-tuning rows before tokenisation: what is asked, what is to be answered, and which part may be shortened.

Three readers share one `Sample`: SQuAD v1.1 JSON, the three kinds of JSON-lines rows that PaddleNLP's LLaMA example reads
(`context`, `instruction`, `src`), and chat rows (`messages`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.data.squad import Question, read_squad
from arriero.errors import ConfigError, DataError

Message = Mapping[str, str]

QA_SYSTEM = "Answer with the shortest span of the passage."
MAX_ROW_BYTES = 16 << 20


@dataclass(frozen=True)
class Sample:
    """One row.

    The prompt is ``before + context + after``; only `context` is shortened when the row is too long.

    Attributes:
        target: the answer that is learned and scored; None where a row only asks.
        chat: the prompt is a user turn and goes through the chat template, if the tokenizer has one.
        ends_prompt: the prompt is closed with the end-of-sequence token (PaddleNLP's question generation).
        history: earlier turns of a conversation; assistant turns among them are learned too.
        references: answers that count as right when a metric is computed.
    """

    before: str
    context: str
    after: str
    target: str | None
    chat: bool = False
    ends_prompt: bool = False
    history: tuple[Message, ...] = ()
    references: tuple[str, ...] = ()
    id: str = ""

    @property
    def prompt(self) -> str:
        return self.before + self.context + self.after


def question_generation(question: Question) -> Sample:
    """The seed's `squad` task: from an answer and its passage to the question (finetune_generation.py, `context` rows)."""
    return Sample(
        before=f"answer: {question.answers[0]} context: ",
        context=question.context,
        after="",
        target=f"question: {question.question}",
        ends_prompt=True,
        references=(question.question,),
        id=question.id,
    )


def question_answering(question: Question) -> Sample:
    """The `squad_qa` task: from a passage and a question to a short span."""
    return Sample(
        before="",
        context=question.context,
        after=f"\n\nQuestion: {question.question}\nAnswer:",
        target=question.answers[0],
        chat=True,
        history=({"role": "system", "content": QA_SYSTEM},),
        references=question.answers,
        id=question.id,
    )


SQUAD_TASKS: dict[str, Callable[[Question], Sample]] = {"squad": question_generation, "squad_qa": question_answering}


def _first(row: Mapping[str, Any], key: str, where: str) -> str:
    """The string under `key`, or the first one of a list of strings."""
    value = row.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: '{key}' must be a string or a list that starts with one, found {type(value).__name__}"
        )
    return value


def sample_from_row(row: Any, where: str, *, needs_target: bool = True) -> Sample:
    """One JSON-lines row as a sample.

    The kinds are told apart in PaddleNLP's order: `messages`, `context`, `instruction`, `src`.

    Raises:
        DataError: naming `where` (file and line) and what is missing.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, found {type(row).__name__}")
    if "messages" in row:
        return _conversation(row["messages"], where, needs_target=needs_target)
    if "context" in row:
        answer = _squad_answers(row, where)[0]
        target = f"question: {_first(row, 'question', where)}" if needs_target or "question" in row else None
        return Sample(f"answer: {answer} context: ", _first(row, "context", where), "", target, ends_prompt=True)
    if "instruction" in row:
        target = _first(row, "output", where) if needs_target or "output" in row else None
        # PaddleNLP drops `input`; an instruction whose data is missing cannot be learned, so it is kept here
        extra = row.get("input") or ""
        if not isinstance(extra, str):
            raise DataError(f"{where}: 'input' must be a string, found {type(extra).__name__}")
        instruction = _first(row, "instruction", where)
        return Sample(f"{instruction}\n" if extra else "", extra or instruction, "", target)
    if "src" in row:
        target = _first(row, "tgt", where) if needs_target or "tgt" in row else None
        return Sample("", _first(row, "src", where), "", target)
    raise DataError(
        f"{where}: none of the keys messages, context, instruction, src: found {', '.join(map(str, row)) or 'nothing'}"
    )


def _squad_answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Every answer of a row: a string, a list of strings, or the Hub's {"text": [...], "answer_start": [...]}."""
    answers = row.get("answers", row.get("answer"))
    if isinstance(answers, dict):
        answers = answers.get("text")
    first = _first({"answers": answers}, "answers", where)
    return tuple(answer for answer in answers if isinstance(answer, str)) if isinstance(answers, list) else (first,)


def _conversation(messages: Any, where: str, *, needs_target: bool) -> Sample:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a list of turns")
    for i, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise DataError(f"{where}: messages[{i}] needs the strings 'role' and 'content'")
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    target = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    if target is None and needs_target:
        raise DataError(f"{where}: the last turn must be the assistant's, it is what is learned")
    if not turns or turns[-1]["role"] != "user":
        raise DataError(f"{where}: a 'user' turn is expected before the answer")
    question = turns.pop()["content"]
    return Sample("", question, "", target, chat=True, history=tuple(turns))


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON-lines file as ("path:line", value); blank lines are skipped.

    Raises:
        DataError: naming the line that is not JSON.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}:{number}"
                if len(line) > MAX_ROW_BYTES:
                    raise DataError(f"{where}: a row of {len(line)} bytes, at most {MAX_ROW_BYTES} are read")
                if line.strip():
                    try:
                        yield where, json.loads(line)
                    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                        raise DataError(f"{where}: not JSON ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def read_samples(path: Path, task: str | None) -> list[Sample]:
    """Every row of one file.

    A `.json` file that holds one object with `data` is SQuAD; everything else is JSON lines.

    Args:
        task: `squad` or `squad_qa` for SQuAD files and rows; None decides by the rows' keys.

    Raises:
        DataError: if the file is missing, malformed or without a row.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if _is_squad(path):
        samples = [SQUAD_TASKS[task or "squad"](question) for question in read_squad(path)]
    elif task == "squad_qa":
        samples = [question_answering(question_from_row(row, where)) for where, row in read_jsonl(path)]
    else:
        samples = [sample_from_row(row, where) for where, row in read_jsonl(path)]
    if not samples:
        raise DataError(f"{path}: holds no row to learn from")
    return samples


def question_from_row(row: Any, where: str) -> Question:
    """A row with `context`, `question` and `answers` as a question."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, found {type(row).__name__}")
    return Question(
        id=str(row.get("id", where)),
        title=str(row.get("title", "")),
        context=_first(row, "context", where),
        question=_first(row, "question", where),
        answers=_squad_answers(row, where),
    )


def _is_squad(path: Path) -> bool:
    """SQuAD is one JSON object with a list `data`; a JSON-lines file's first line is a whole object of its own."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        first = file.readline(MAX_ROW_BYTES)
    try:
        value = json.loads(first)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return True  # an object over several lines; read_squad says what is wrong if it is not SQuAD
    return isinstance(value, dict) and isinstance(value.get("data"), list)


def find_splits(dataset_path: str, wanted: Sequence[str]) -> dict[str, Path]:
    """The files of the wanted splits ("train", "dev").

    A folder holds `train.json` and `dev.json` (or `.jsonl`); a file is the split that is asked for; where both are, it
    is the training split, and the dev split is the `dev.json` (or so) beside it, or the same file if there is none.

    Raises:
        ConfigError: if a wanted split has no file.
    """
    path = Path(dataset_path)
    if path.is_file():
        beside = [path.parent / name for name in _split_names("dev")] if "train" in wanted else []
        dev = next((sibling for sibling in beside if sibling.is_file()), path)
        return {split: dev if split == "dev" else path for split in wanted}
    if not path.is_dir():
        raise ConfigError(
            f"--dataset_path {dataset_path}: no such file or folder (a Hub data set is named by --data_name)"
        )
    found: dict[str, Path] = {}
    for split in wanted:
        for name in _split_names(split):
            if (path / name).is_file():
                found[split] = path / name
                break
        else:
            raise ConfigError(
                f"--dataset_path {dataset_path}: the folder has no {' or '.join(_split_names(split)[:2])}"
            )
    return found


def _split_names(split: str) -> list[str]:
    stems = {"train": ["train"], "dev": ["dev", "validation", "valid", "test"]}[split]
    return [f"{stem}{suffix}" for stem in stems for suffix in (".json", ".jsonl")]
