"""The tokenizer and the chat template that an adapter was trained with: those in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.formats.adapter_base import tell
from arriero.formats.detection import TOKENIZER_FILES
from arriero.formats.side_files import TOKENIZER_SIDE_FILES, read_side_files

_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_CONFIG = "tokenizer_config.json"


def with_adapters_tokenizer(base: Mapping[str, bytes], adapter: Path, rows: int) -> dict[str, bytes]:
    """The files beside a base's weights with those of an adapter's tokenizer in their place; says which differ.

    A folder with a vocabulary holds a whole tokenizer, any other perhaps a template. Generation defaults and licence stay the
    base's.

    Args:
        base: of `read_side_files`.
        rows: of the model's embedding. A tokenizer with more tokens is left out, with a warning.

    Raises:
        FormatError: a file of the adapter is broken.
    """
    own = _own_files(adapter)
    different = [name for name, content in own.items() if base.get(name) != content]
    if not different:
        return dict(base)
    whole = any(name in own for name in TOKENIZER_FILES)
    if whole and (tokens := load_tokenizer(adapter).vocab_size) > rows:
        tell(
            f"arriero: warning: the tokenizer of {adapter} has {tokens} tokens and the model only {rows} embeddings: that of "
            "the base is kept"
        )
        return dict(base)
    dropped: set[str] = set()
    if whole and not _same_vocabulary(base, own):
        dropped.update(name for name in TOKENIZER_SIDE_FILES if name != "generation_config.json")
    if _CONFIG in own or any(name in own for name in _TEMPLATES):
        dropped.update(_TEMPLATES)
    kept = {name: content for name, content in base.items() if name not in dropped}
    gone = sorted(name for name in dropped & base.keys() if name not in own)
    without = f", without {', '.join(gone)}" if gone else ""
    tell(
        f"tokenizer and chat template are those of {adapter}, which differ from the base's: {', '.join(different)}{without}"
    )
    return kept | own


def note_other_tokenizer(adapter: Path, used: Tokenizer) -> None:
    """Tell that an adapter has a tokenizer or a chat template that is not the one in use."""
    own = _own_files(adapter)
    if any(name in own for name in TOKENIZER_FILES):
        other = load_tokenizer(adapter)
        same = other.vocab_size == used.vocab_size and other.chat_template == used.chat_template
    else:
        template = own.get("chat_template.jinja")
        same = template is None or template.decode("utf-8", "replace") == used.chat_template
    if not same:
        tell(
            f"arriero: warning: {adapter} has a tokenizer or chat template of its own, which differs from the one in use: "
            f"--tokenizer_name_or_path {adapter} takes that"
        )


def _own_files(adapter: Path) -> dict[str, bytes]:
    files = read_side_files(adapter)
    return {name: files[name] for name in TOKENIZER_SIDE_FILES if name in files and name != "generation_config.json"}


def _same_vocabulary(base: Mapping[str, bytes], own: Mapping[str, bytes]) -> bool:
    """Whether the base's other files of a vocabulary are of the adapter's too."""
    name = next(name for name in TOKENIZER_FILES if name in own)
    if name not in base or name != "tokenizer.json":
        return base.get(name) == own[name]
    return base[name] == own[name] or _vocabulary(base[name]) == _vocabulary(own[name])


def _vocabulary(content: bytes) -> Any:
    try:
        return json.loads(content)["model"]["vocab"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return content
