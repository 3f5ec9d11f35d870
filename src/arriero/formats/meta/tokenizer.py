"""The `tokenizer.model` of Meta's checkpoints <-> the tokenizer files of an HF folder.

LLaMA 1 and 2 have a SentencePiece model, which HF folders have under the same name. Llama 3 has a file of tiktoken: a byte
sequence in base64 and its rank on each line. It holds neither special tokens nor the expression that splits text; both
stand in Meta's models/llama3/tokenizer.py (https://github.com/meta-llama/llama-models), llama/tokenizer.py
(https://github.com/meta-llama/llama3) for the names before Llama 3.1.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from arriero.errors import FormatError
from arriero.formats.tokenizer_json import LLAMA3_SPLIT, added_token, bpe_model, byte_level, tokenizer_body

TOKENIZER_FILE = "tokenizer.model"
MAX_TIKTOKEN_BYTES = 32 * 2**20
MAX_TOKEN_BYTES = 256  # the longest of Llama 3 has 128
BEGIN, END, TURN, MESSAGE = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,7}")


def _reserved(start: int, count: int) -> list[str]:
    return [f"<|reserved_special_token_{number}|>" for number in range(start, start + count)]


_HEADERS = ["<|start_header_id|>", "<|end_header_id|>"]
# By their place after the last rank; of Llama 3.1 as its tokenizer.json on the Hub has them (later sources rename two).
_LLAMA3 = [BEGIN, END, *_reserved(0, 4), *_HEADERS, *_reserved(4, 1), TURN, *_reserved(5, 246)]
_LLAMA31 = [
    *(BEGIN, END, *_reserved(0, 2), "<|finetune_right_pad_id|>", *_reserved(2, 1), *_HEADERS, MESSAGE, TURN),
    *("<|python_tag|>", *_reserved(3, 245)),
]


def is_tiktoken(content: bytes) -> bool:
    """Whether a `tokenizer.model` is tiktoken's (SentencePiece's is a protocol buffer)."""
    return _LINE.fullmatch(content[: MAX_TOKEN_BYTES * 2].partition(b"\n")[0].rstrip(b"\r")) is not None


def read_tiktoken(content: bytes, source: str) -> list[bytes]:
    """The byte sequences of a file of tiktoken, each at the index of its rank.

    Raises:
        FormatError: for a line that is none, or ranks that are not 0, 1, 2 …, or a byte that has no token.
    """
    if len(content) > MAX_TIKTOKEN_BYTES:
        raise FormatError(f"{source}: is larger than {MAX_TIKTOKEN_BYTES} bytes; this is not a tokenizer")
    tokens: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            if int(rank) != len(tokens) or token in tokens or not 1 <= len(token) <= MAX_TOKEN_BYTES:
                raise ValueError("out of order")
        except (ValueError, binascii.Error) as error:
            raise FormatError(f"{source}: line {number} is not the next token and its rank; fetch it again") from error
        tokens[token] = len(tokens)
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise FormatError(f"{source}: has no token for the byte {missing[0]}, so it cannot write every text")
    return list(tokens)


def special_tokens(*, llama31: bool) -> list[str]:
    """The 256 special tokens that follow the last rank, in the order of their ids.

    Args:
        llama31: the names from Llama 3.1 on.
    """
    return list(_LLAMA31 if llama31 else _LLAMA3)


def hf_files(tokens: Sequence[bytes], *, llama31: bool, context: int) -> dict[str, bytes]:
    """The tokenizer files of an HF folder for a tokenizer of Llama 3.

    Args:
        tokens: by rank.
        llama31: whether the special tokens are those from Llama 3.1 on.
        context: of the model, in tokens.
    """
    special = special_tokens(llama31=llama31)
    begin = len(tokens) + special.index(BEGIN)
    added = [added_token(len(tokens) + index, token, special=True) for index, token in enumerate(special)]
    piece = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            piece,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": BEGIN, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [begin], "tokens": [BEGIN]}},
    }
    merged = [[_spelled(left), _spelled(right)] for left, right in merges(tokens)]
    body = tokenizer_body(
        bpe_model({_spelled(token): rank for rank, token in enumerate(tokens)}, merged, ignore_merges=True),
        added,
        normalizer=None,
        pre_tokenizer=_PRE_TOKENIZER,
        post_processor={
            "type": "Sequence",
            "processors": [byte_level(False, use_regex=False, trim_offsets=False), template],
        },
        decoder=byte_level(True, use_regex=True),
    )
    names = {"bos_token": BEGIN, "eos_token": END} | ({"pad_token": "<|finetune_right_pad_id|>"} if llama31 else {})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # read tokenizer.json as it is, in transformers 4 and 5 alike
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        **names,
    }
    return {
        "tokenizer.json": _json(body, indent=None),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(names),
    }


def sentencepiece_config() -> bytes:
    """The tokenizer_config.json of LLaMA 1 and 2, whose text begins with `<s>`."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    flags = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False}
    return _json({"tokenizer_class": "LlamaTokenizer", **flags, **names})


def merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The merge list that makes an HF BPE model choose what tiktoken chooses.

    tiktoken joins the neighbours whose union has the lowest rank; so every way to split a token into two tokens is a merge,
    ranked as the token is, and then as its parts are.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found = []
    for token in tokens:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        found += sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return found


def tiktoken_file(tokenizer_json: bytes) -> tuple[bytes, str]:
    """The file of tiktoken that says the same as a tokenizer.json.

    Returns:
        The file and "", or nothing and the reason why there is no such file.
    """
    try:
        body: Any = json.loads(tokenizer_json)
        model = body["model"]
        vocabulary, pairs, added = model["vocab"], model["merges"], body["added_tokens"]
        ids = {token["content"]: token["id"] for token in added}
    except (ValueError, KeyError, TypeError, RecursionError):
        return b"", "tokenizer.json is not that of a byte-level BPE"
    if model.get("type") != "BPE" or not isinstance(vocabulary, Mapping) or not isinstance(pairs, list):
        return b"", "its tokenizer is no byte-level BPE"
    if body.get("normalizer") is not None or not _splits_alike(body.get("pre_tokenizer")):
        return b"", "its tokenizer splits or changes text otherwise than Llama 3 does"
    tokens: list[bytes | None] = [None] * (len(vocabulary) - sum(token in vocabulary for token in ids))
    try:
        for token, index in vocabulary.items():
            if token not in ids:
                tokens[index] = _bytes(token)
        spelled = [_spelled(token) for token in tokens if token is not None]
    except (KeyError, IndexError, TypeError):
        return b"", "its vocabulary has gaps, or tokens that are no bytes"
    if len(spelled) != len(tokens) or sorted(ids.values()) != list(range(len(tokens), len(tokens) + len(ids))):
        return b"", "its special tokens do not follow the other ones"
    names = sorted(ids, key=lambda name: ids[name])
    if names not in (_LLAMA3, _LLAMA31):
        return b"", "its special tokens are not those of Llama 3"
    complete = [token for token in tokens if token is not None]
    wanted = [[_spelled(left), _spelled(right)] for left, right in merges(complete)]
    if not model.get("ignore_merges") or [_pair(pair) for pair in pairs] != wanted:
        return b"", "its merges do not follow from the order of its tokens"
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(complete)), ""


def _splits_alike(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer is Llama 3's; a byte-level step's offsets and its unused expression do not matter."""
    steps = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, Mapping) else None
    if not isinstance(steps, list) or len(steps) != 2 or not all(isinstance(step, Mapping) for step in steps):
        return False
    bytes_alike = steps[1].get("type") == "ByteLevel" and steps[1].get("add_prefix_space") is False
    return steps[0] == _PRE_TOKENIZER["pretokenizers"][0] and bytes_alike and steps[1].get("use_regex") is False


def _pair(pair: Any) -> list[str]:
    return pair.split(" ") if isinstance(pair, str) else list(pair)


_PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
        byte_level(False, use_regex=False),
    ],
}


def _alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_CHARACTERS = _alphabet()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def _spelled(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def _bytes(token: str) -> bytes:
    return bytes(_BYTES[character] for character in token)


def _json(value: Any, indent: int | None = 2) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode("utf-8")
