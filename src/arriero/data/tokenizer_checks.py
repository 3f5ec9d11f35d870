"""What the `tokenizers` library breaks off at, by a panic or the end of the process, told from a tokenizer.json before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arriero.errors import FormatError

# Texts that a tokenizer is tried on.
PROBES = ("a", "a b\u00e9")


def check_description(description: Any, path: Path) -> None:
    """Refuse the descriptions that tokenizers 0.23 is known to break off at.

    Raises:
        FormatError: one of them.
    """
    if not isinstance(description, dict):
        return  # the library says what is wrong
    problem = (
        _merges_problem(description.get("model"))
        or _template_problem(description.get("post_processor"))
        or _splitting_problem(description.get("pre_tokenizer"))
        or _normalizer_problem(description.get("normalizer"))
    )
    if problem:
        raise FormatError(f"{path}: {problem}; download or convert it again")


@contextmanager
def no_panic(path: Path) -> Iterator[None]:
    """Within it a panic of the library, which is no Exception, becomes the error of a file.

    Raises:
        FormatError: instead of a panic.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        raise FormatError(f"{path}: the tokenizers library breaks off with it ({reason}); download it again") from error


def _merges_problem(model: Any) -> str | None:
    """The library cuts the prefix off the right part of each merge, whatever is there, and ends the process in its message
    about a token that is no text."""
    if not isinstance(model, dict) or not isinstance(model.get("continuing_subword_prefix"), str):
        return None
    prefix, merges = model["continuing_subword_prefix"], model.get("merges")
    for merge in merges if isinstance(merges, list) else []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        right = parts[-1] if isinstance(parts, list) and parts else None
        if isinstance(right, str) and not right.startswith(prefix):
            return f"the right part of the merge {merge!r} does not begin with the continuing_subword_prefix {prefix[:40]!r}"
    return None


def _template_problem(processor: Any) -> str | None:
    for step in _steps(processor, "processors"):
        if step.get("type") != "TemplateProcessing":
            continue
        known, parts = step.get("special_tokens"), step.get("single")
        for part in parts if isinstance(parts, list) else []:
            if not isinstance(part, dict):
                continue
            token, sequence = _name(part.get("SpecialToken")), _name(part.get("Sequence"))
            if token is not None and isinstance(known, dict) and token not in known:
                return f"its post_processor puts in {token[:40]!r}, which its special_tokens lack"
            if sequence == "B":
                return "its post_processor asks for a second text where there is one"
    return None


def _splitting_problem(pre_tokenizer: Any) -> str | None:
    for step in _steps(pre_tokenizer, "pretokenizers"):
        if step.get("type") == "FixedLength" and step.get("length") == 0:
            return "its pre_tokenizer cuts a text into pieces of length 0"
    return None


def _normalizer_problem(normalizer: Any) -> str | None:
    for step in _steps(normalizer, "normalizers"):
        pattern = step.get("pattern")
        if step.get("type") == "Prepend" and step.get("prepend") == "":
            return "its normalizer puts an empty text before each"
        if step.get("type") == "Replace" and isinstance(pattern, dict) and "" in pattern.values():
            return "its normalizer replaces an empty text"
    return None


def _name(part: Any) -> str | None:
    name = part.get("id") if isinstance(part, dict) else None
    return name if isinstance(name, str) else None


def _steps(part: Any, key: str) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer, or those of a sequence of them."""
    if not isinstance(part, dict):
        return
    if part.get("type") != "Sequence":
        yield part
        return
    inner = part.get(key)
    for step in inner if isinstance(inner, list) else []:
        yield from _steps(step, key)
