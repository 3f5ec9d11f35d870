"""What a corpus depends on, as plain values: tokenizer, options, inputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers

from arriero.config.preprocessing import PreprocessOptions
from arriero.data.corpus import units
from arriero.data.corpus.sources import Source
from arriero.data.tokenizer import Tokenizer
from arriero.data.tokenizer_files import VOCABULARY_FILES, read_bounded
from arriero.errors import DataError
from arriero.formats.receipt import sha256_of

FORMAT = 1
META_BYTES = 1 << 20
# The options that change what is in the corpus. How it is made (workers, shards, executor) does not.
OPTIONS = (
    *("data_impl", "json_key", "text_documents", "errors", "append_eos", "split_sentences", "max_doc_num"),
    *("min_doc_length", "max_doc_length", "max_repeated_len", "deduplicate"),
)


def vocabulary_sha256(tokenizer: Tokenizer) -> str:
    """A hash of every id's text: two tokenizers with the same one give the same meaning to each id."""
    tokens = [tokenizer.id_to_token(token_id) for token_id in range(tokenizer.vocab_size)]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer: hashes of its vocabulary and files, its size, its end-of-text id."""
    files = {name: tokenizer.folder / name for name in VOCABULARY_FILES}
    return {
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "vocabulary_sha256": vocabulary_sha256(tokenizer),
        "files": {name: sha256_of(path) for name, path in files.items() if path.is_file()},
        "library": f"tokenizers {tokenizers.__version__}",
    }


def describe_inputs(sources: list[Source]) -> dict[str, Any]:
    """The inputs: their number, their size, and a hash of names, sizes and times."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(json.dumps([source.name, source.size, source.mtime_ns]).encode() + b"\n")
    return {"files": len(sources), "bytes": sum(source.size for source in sources), "sha256": digest.hexdigest()}


def describe(options: PreprocessOptions, tokenizer: Tokenizer, sources: list[Source]) -> dict[str, Any]:
    """All that the content of a corpus depends on."""
    return {
        "format": {"version": FORMAT, "unit_bytes": units.UNIT_BYTES, "parquet_rows": units.PARQUET_ROWS},
        "tokenizer": describe_tokenizer(tokenizer),
        "options": {name: getattr(options, name) for name in OPTIONS},
        "inputs": describe_inputs(sources),
    }


def fingerprint(description: dict[str, Any]) -> str:
    """One hash of a description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def check_tokenizer(meta_file: Path, tokenizer: Tokenizer) -> None:
    """Refuse a corpus that another tokenizer made. One without `PREFIX_meta.json` (made by another tool) passes.

    Raises:
        DataError: naming both tokenizers.
    """
    if not meta_file.is_file():
        return
    try:
        made_with = json.loads(read_bounded(meta_file, META_BYTES))["tokenizer"]
        name, sha256 = str(made_with["name"]), made_with["vocabulary_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{meta_file}: is damaged; delete it to use the corpus unchecked") from error
    if sha256 != vocabulary_sha256(tokenizer):
        raise DataError(
            f"{meta_file}: the corpus was made with another tokenizer ({name}) than {tokenizer.folder}: "
            "its ids mean other texts; preprocess it again or give --tokenizer_name_or_path"
        )
