"""The parts of a `tokenizer.json` (https://huggingface.co/docs/tokenizers/pipeline), all their fields written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# How Llama 3 splits text before BPE (models/llama3/tokenizer.py in https://github.com/meta-llama/llama-models).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_body(
    model: Mapping[str, Any],
    added_tokens: Sequence[Mapping[str, Any]],
    *,
    normalizer: Mapping[str, Any] | None,
    pre_tokenizer: Mapping[str, Any] | None,
    post_processor: Mapping[str, Any] | None,
    decoder: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole file; every part is as the library has it."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }


def added_token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    """A token that is matched whole in the text, as it stands there.

    Args:
        index: its id.
        special: whether it is left out of decoded text.
    """
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def bpe_model(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    unknown: str | None = None,
    fuse_unknown: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """A byte-pair encoding.

    Args:
        vocab: ids by token.
        merges: pairs of tokens, the first to be merged first.
        unknown: token for what has none.
        fuse_unknown: whether several of them in a row are one.
        byte_fallback: whether it is written as the tokens of its bytes, `<0xE2>`.
        ignore_merges: whether a whole word in the vocabulary is one token, whatever the merges say.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unknown,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def byte_level(prefix: bool, *, use_regex: bool, trim_offsets: bool = True) -> dict[str, Any]:
    """The step that spells bytes as characters, and back.

    Args:
        prefix: whether a space is put before the text.
        use_regex: whether it splits as GPT-2 does.
        trim_offsets: whether a token's place in the text leaves out the space before it.
    """
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": trim_offsets, "use_regex": use_regex}
