"""What `tokenizer.ggml.pre` stands for: how a byte-level tokenizer splits a text before BPE.

The regular expressions are those of the models' own tokenizer.json files, which llama.cpp's src/llama-vocab.cpp cites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arriero.formats.tokenizer_json import LLAMA3_SPLIT

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_QWEN2 = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How a family splits text before BPE: regular expressions applied one after the other, each match a piece."""

    splits: tuple[str, ...]
    # A whole word that is in the vocabulary is one token, whatever the merges say.
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


# The first name of each row is the one that is written.
_FAMILIES: dict[tuple[str, ...], PreTokenizer] = {
    ("gpt-2", "mpt", "olmo", "phi-2"): PreTokenizer((GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell"): PreTokenizer((DIGIT, GPT2)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3"): PreTokenizer((LLAMA3_SPLIT,), ignore_merges=True, add_bos=True),
    ("qwen2",): PreTokenizer((_QWEN2,), nfc=True),
    ("deepseek-r1-qwen", "stablelm2", "megrez"): PreTokenizer((_QWEN2,)),
    ("tekken",): PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    ("smaug-bpe", "dbrx"): PreTokenizer((LLAMA3_SPLIT,)),
    ("default",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
PRE_TOKENIZERS = {name: family for names, family in _FAMILIES.items() for name in names}


def name_of(tokenizer: Mapping[str, Any]) -> str | None:
    """The `tokenizer.ggml.pre` that splits text as a tokenizer.json does; None when there is none.

    llama.cpp never normalizes: a family with NFC is found with it and without only where two names exist (Qwen).
    """
    normalizer, pre_tokenizer = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    kinds = [step.get("type") for step in steps_of(normalizer, "normalizers")]
    if kinds not in ([], ["NFC"]):
        return None
    splits: list[str] = []
    steps = steps_of(pre_tokenizer, "pretokenizers")
    for step in steps:
        split = _split_of(step)
        if split is None:
            return None
        splits += split
    if not steps or steps[-1].get("type") != "ByteLevel":
        return None
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    for names, family in _FAMILIES.items():
        if (family.splits, family.ignore_merges, family.nfc) == (tuple(splits), ignore_merges, kinds == ["NFC"]):
            return names[0]
    return None


def steps_of(part: Any, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder of tokenizer.json: none, one, or those of a Sequence."""
    if not isinstance(part, Mapping):
        return []
    steps = part.get(key) if part.get("type") == "Sequence" else [part]
    return [step for step in steps if isinstance(step, Mapping)] if isinstance(steps, list) else []


def _split_of(step: Mapping[str, Any]) -> list[str] | None:
    """The expressions that one step splits by; None for a step that does something else."""
    match step.get("type"):
        case "ByteLevel":
            return [GPT2] if step.get("use_regex", True) else []
        case "Digits" if step.get("individual_digits"):
            return [DIGIT]
        case "Split" if step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern")
            expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
            return [expression] if isinstance(expression, str) else None
    return None
