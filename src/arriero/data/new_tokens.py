"""A tokenizer with more tokens than its files have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from arriero.data.json_tokenizer import JsonTokenizer
from arriero.data.tokenizer import SENTENCEPIECE_NAMES, Tokenizer, load_tokenizer
from arriero.data.tokenizer_files import VOCABULARY_FILE_LIMIT, AddedTokenSpec, read_tokenizer_files
from arriero.errors import ConfigError, FormatError


def with_new_tokens(tokenizer: Tokenizer, plain: Sequence[str], special: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer with these tokens: they get the next ids, in this order; those it knows keep theirs.

    A new token is found in a text exactly as it is written (`normalized` false), with the blanks around it left alone. A
    known token that is wanted as a special one becomes special. Nothing is written: `Tokenizer.save` does that.

    Args:
        plain: ordinary tokens, which text may hold.
        special: control tokens, which only a template writes.

    Raises:
        ConfigError: the tokenizer has no tokenizer.json.
        FormatError: its ids have gaps, so that the library would not give a new token the next one.
    """
    folder = tokenizer.folder
    files = read_tokenizer_files(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"--add_tokens, --add_special_tokens: {folder} has only a SentencePiece model, which takes no tokens; "
            "let transformers write a tokenizer.json: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    wanted = [AddedTokenSpec(token, special=False) for token in plain if tokenizer.token_to_id(token) is None]
    wanted += [AddedTokenSpec(token) for token in special if token not in tokenizer.special_tokens]
    if not wanted:
        return tokenizer
    added = JsonTokenizer(files).added_tokens_with(wanted)
    description = json.loads(files.read("tokenizer.json", VOCABULARY_FILE_LIMIT))
    description["added_tokens"] = added
    replaced = {"tokenizer.json": _json(description)}
    entries = {entry["content"]: entry for entry in added}
    new = [entries[spec.content] for spec in wanted]
    if "added_tokens_decoder" in files.config:  # transformers adds what it names, with these flags
        decoder = files.config["added_tokens_decoder"] | {str(entry["id"]): _flags(entry) for entry in new}
        replaced["tokenizer_config.json"] = _json(files.config | {"added_tokens_decoder": decoder})
    beside = [name for name in SENTENCEPIECE_NAMES if (folder / name).is_file()]
    if beside or (folder / "added_tokens.json").is_file():  # what the readers of a SentencePiece model look at
        known = files.read_json("added_tokens.json")
        replaced["added_tokens.json"] = _json(known | {entry["content"]: entry["id"] for entry in new})
    grown = load_tokenizer(folder, replaced)
    fresh = [spec.content for spec in wanted if tokenizer.token_to_id(spec.content) is None]
    ids = list(range(tokenizer.vocab_size, tokenizer.vocab_size + len(fresh)))
    if [grown.token_to_id(token) for token in fresh] != ids:
        raise FormatError(f"{folder / 'tokenizer.json'}: its ids have gaps, so that no token can be added to it")
    return grown


def _flags(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "id"}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
