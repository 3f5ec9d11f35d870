"""What stands beside the weights of a model folder, as bytes: tokenizer, chat template, generation defaults, licence."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from arriero.errors import FormatError

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
# Files beside the weights that a derived model keeps.
SIDE_FILES = (
    *TOKENIZER_SIDE_FILES,
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
MAX_SIDE_FILES_BYTES = 512 * 2**20
# What only writing fails with; `shutil.copyfile` names the source then too.
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def read_side_files(folder: Path, patterns: tuple[str, ...] = SIDE_FILES) -> dict[str, bytes]:
    """The files of a folder whose names match, by name.

    Raises:
        FormatError: when one cannot be read, or all together are larger than any tokenizer.
    """
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    try:
        if sum(path.stat().st_size for path in paths) > MAX_SIDE_FILES_BYTES:
            raise FormatError(
                f"{folder}: its tokenizer files have more than {MAX_SIDE_FILES_BYTES} bytes; no model's have"
            )
        return {path.name: path.read_bytes() for path in paths}
    except OSError as error:
        raise FormatError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error


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
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if not path.is_file():
                continue
            try:
                shutil.copyfile(path, destination / path.name)
            except OSError as error:
                if error.filename == str(path) and error.errno not in _OF_WRITING:
                    raise FormatError(f"{path}: cannot be copied ({error.strerror})") from error
                raise
            copied.append(path.name)
    return copied
