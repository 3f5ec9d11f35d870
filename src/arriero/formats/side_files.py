"""What stands beside the weights of a model folder, as bytes: tokenizer, chat template, generation defaults, licence."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arriero.errors import FormatError
from arriero.json_text import check_text
from arriero.quantization.qat import RANGES_FILE, SETTINGS_FILE

TOKENIZER_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Where transformers writes chat templates that have names: one for tools, say.
MORE_TEMPLATES = "additional_chat_templates"
# Files beside the weights that a derived model keeps.
SIDE_FILES = (
    *TOKENIZER_SIDE_FILES,
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
# How a model or adapter computes with rounded weights, and how the base of an adapter was rounded: other tools have no such
# files, and folders of HF and PEFT keep them.
BASE_QUANTIZATION = "base_quantization.json"  # beside adapter_config.json; PEFT leaves it alone
ROUNDING_FILES = (SETTINGS_FILE, RANGES_FILE, BASE_QUANTIZATION)
MAX_SIDE_FILES_BYTES = 512 * 2**20
# What only writing fails with; `shutil.copyfile` names the source then too.
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def read_side_files(folder: Path, patterns: tuple[str, ...] = SIDE_FILES) -> dict[str, bytes]:
    """The files of a folder whose names match, by name.

    Chat templates in a folder of their own come in tokenizer_config.json, the older way, as all formats have room for that.

    Raises:
        FormatError: when one cannot be read, or all together are larger than any tokenizer.
    """
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    more = sorted(folder.glob(f"{MORE_TEMPLATES}/*.jinja")) if patterns == SIDE_FILES else []
    try:
        if sum(path.stat().st_size for path in (*paths, *more)) > MAX_SIDE_FILES_BYTES:
            raise FormatError(
                f"{folder}: its tokenizer files have more than {MAX_SIDE_FILES_BYTES} bytes; no model's have"
            )
        files = {path.name: path.read_bytes() for path in paths}
        return _with_templates(files, {path.stem: path.read_bytes() for path in more}, folder) if more else files
    except OSError as error:
        raise FormatError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error


def rounding_left_out(names: Iterable[str], path: Path, target: str) -> str:
    """The warning about `ROUNDING_FILES` that a format has no place for."""
    return f"warning: {', '.join(names)} of {path} left out: {target} has no place for how weights are rounded"


def _with_templates(files: dict[str, bytes], more: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """Files with named chat templates in tokenizer_config.json.

    Raises:
        FormatError: that is no JSON object, or a template is no text.
    """
    try:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        own = files.get("chat_template.jinja")
        found = more if own is None else {"default": own} | more
        named: dict[Any, Any] = {name: text.decode("utf-8") for name, text in found.items()}
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{folder}: tokenizer_config.json or a chat template is no text that can be read") from error
    if not isinstance(config, dict):
        raise FormatError(f"{folder}: tokenizer_config.json: a JSON object is expected, not {type(config).__name__}")
    before = config.get("chat_template")
    if isinstance(before, str):
        named = {"default": before} | named
    elif isinstance(before, list):
        given = {entry.get("name"): entry.get("template") for entry in before if isinstance(entry, dict)}
        named = given | named
    if "default" not in named:  # as all readers want it
        return files
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    check_text(config, f"{folder}: tokenizer_config.json")
    written = (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
    return {name: content for name, content in files.items() if name != "chat_template.jinja"} | {
        "tokenizer_config.json": written
    }


def copy_side_files(source: str | Path, destination: str | Path) -> list[str]:
    """Copy tokenizer, generation and licence files from one model folder to another.

    Returns:
        The names of the files copied.

    Raises:
        FormatError: when one cannot be read.
        OSError: when one cannot be written, for the caller to name the place.
    """
    source, destination = Path(source), Path(destination)
    copied: list[str] = []
    if source.resolve() == destination.resolve():
        return copied
    for pattern in (*SIDE_FILES, f"{MORE_TEMPLATES}/*.jinja"):
        for path in sorted(source.glob(pattern)):
            if not path.is_file():
                continue
            target = destination / path.relative_to(source)
            try:
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            except OSError as error:
                if error.filename == str(path) and error.errno not in _OF_WRITING:
                    raise FormatError(f"{path}: cannot be copied ({error.strerror})") from error
                raise
            copied.append(path.name)
    return copied
