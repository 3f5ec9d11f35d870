"""What a file or folder is, told from headers and configurations: no tensor is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arriero.data.corpus.found import find_corpora
from arriero.data.corpus.token_files import SUFFIXES, corpus_kinds, open_corpus
from arriero.data.tokenizer_files import SMALL_FILE_LIMIT, VOCABULARY_FILE_LIMIT, read_bounded, read_tokenizer_files
from arriero.engine.adapter_facts import LARGEST, adapter_facts
from arriero.engine.weight_fit import misfit
from arriero.errors import FormatError
from arriero.formats.detection import MODELS, Found, detect
from arriero.formats.json_file import read_json_object
from arriero.formats.shared_files import natural_order
from arriero.formats.stored_tensors import StoredTensor, stored_tensors, tensors_of_file
from arriero.formats.tied_head import read_config
from arriero.models.config import LlamaConfig

_NAMED = ("bos", "eos", "pad", "unk")
_REASON = 400  # characters of a message that becomes a row


@dataclass(frozen=True)
class Inspection:
    """What was found out.

    Attributes:
        path: that was looked at.
        what: it is, in words.
        facts: everything known of it, by topic; plain values, as JSON has them.
        tensors: as they are stored.
    """

    path: Path
    what: str
    facts: dict[str, Any] = field(default_factory=dict)
    tensors: list[StoredTensor] = field(default_factory=list)


def inspect(path: str | Path) -> Inspection:
    """Look at a model, an adapter, a tokenizer, a corpus (by folder, file or prefix), or a file of tensors.

    Raises:
        FormatError, DataError: it is nothing that is known, or broken; the message names the file and the reason.
    """
    path = Path(path)
    prefix = _corpus_prefix(path)
    if prefix is not None:
        return Inspection(path, "token corpus", {"corpora": [_corpus(prefix)]})
    if path.is_file() and path.suffix in (".safetensors", ".pdparams", ".bin", ".pt", ".pth", ".npy"):
        tensors = sorted(tensors_of_file(path), key=lambda tensor: natural_order(tensor.name))
        return Inspection(path, "file of tensors", _weights(tensors), tensors)
    found = detect(path)
    if found.kind == "corpus":
        return Inspection(path, found.name, {"corpora": [_corpus(prefix) for _, prefix in find_corpora([str(path)])]})
    if found.kind == "tokenizer":
        return Inspection(path, found.name, tokenizer_facts(path))
    tensors = sorted(stored_tensors(found), key=lambda tensor: natural_order(tensor.name))
    facts = _model(found, tensors) if found.kind in MODELS else _adapter(found, tensors)
    return Inspection(path, found.name, facts | _training(found), tensors)


def _corpus_prefix(path: Path) -> Path | None:
    """The prefix of a corpus that a path names: the prefix itself or one of its files."""
    for suffix in SUFFIXES:
        if path.is_file() and path.name.endswith(suffix):
            prefix = Path(str(path)[: -len(suffix)])
            complete = all(
                Path(f"{prefix}{end}").is_file() for end in ((".bin", ".idx") if suffix in (".bin", ".idx") else ())
            )
            return prefix if complete else None
    return path if not path.exists() and corpus_kinds(path) else None


def _corpus(prefix: Path) -> dict[str, Any]:
    corpus = open_corpus(prefix)
    return {
        "prefix": str(prefix),
        "documents": corpus.documents,
        "tokens": len(corpus.tokens),
        "dtype": corpus.tokens.dtype.name,
        "longest_document": int(corpus.lengths.max()),
    }


def _weights(tensors: list[StoredTensor]) -> dict[str, Any]:
    """Sizes by dtype, the largest first, and by file."""
    kinds: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        kind = kinds.setdefault(tensor.dtype, {"tensors": 0, "numbers": 0, "bytes": 0})
        kind["tensors"] += 1
        kind["numbers"] += tensor.numbers
        kind["bytes"] += tensor.nbytes
    files = sorted({tensor.file for tensor in tensors})
    return {
        "bytes": sum(path.stat().st_size for path in files),
        "files": [path.name for path in files],
        "dtypes": dict(sorted(kinds.items(), key=lambda item: -item[1]["bytes"])),
    }


@contextmanager
def refused_values(path: Path) -> Iterator[None]:
    """A value that a reader did not expect, such as a number that no float holds, as a broken file."""
    try:
        yield
    except (OverflowError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: holds a value that cannot be read ({str(error)[:120]}); fetch it again") from error


def _model(found: Found, tensors: list[StoredTensor]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    try:
        with refused_values(found.path):
            config = _config(found)
    except FormatError as error:
        facts |= _foreign(found.path, str(error))
        config = None
    if config is not None:
        facts |= {
            "architecture": config.model_type,
            "parameters": config.num_parameters(),
            **shape_facts(config),
        }
        with refused_values(found.path):
            reason = misfit(found, config, tensors)
        if reason is not None:
            source = "the metadata" if found.kind == "gguf" else "config.json"
            facts |= {"misfit": f"weights do not fit {source}: {reason[:_REASON]}"}
    elif found.kind == "meta":
        facts |= _meta(found.path, tensors)
    if found.kind == "gguf":
        facts |= _gguf_facts(found.path)
    else:
        facts |= tokenizer_facts(found.path)
        if config is not None and config.extra.get("quantization_config"):
            facts["quantization"] = _quantization(config.extra["quantization_config"])
    return facts | _weights(tensors)


def _config(found: Found) -> LlamaConfig | None:
    """The configuration; None for a folder of Meta's, whose file says less than one."""
    if found.kind == "gguf":
        from arriero.formats.gguf.file import GGUFFile
        from arriero.formats.gguf.model import read_config as gguf_config

        with GGUFFile(found.path) as file:
            return gguf_config(file)
    if found.kind == "paddle":
        from arriero.formats.paddle.config import read_paddle_config

        return read_paddle_config(found.path).model
    if found.kind == "meta" and not (found.path / "config.json").is_file():
        return None
    return read_config(found.path)


def _foreign(path: Path, reason: str) -> dict[str, Any]:
    """Of a model that is not read here: what its configuration calls it."""
    names: list[Any] = []
    if path.is_dir() and (path / "config.json").is_file():
        with suppress(FormatError):
            values = read_json_object(path / "config.json", "")
            listed = values.get("architectures")
            names = [*listed] if isinstance(listed, list) else [values.get("model_type")]
    words = ", ".join(name[:200] for name in names if isinstance(name, str))
    return {"architecture": words[:200] or "unknown", "not_supported": reason[:_REASON]}


def shape_facts(config: LlamaConfig) -> dict[str, Any]:
    """Sizes of a model, its attention and its positions."""
    scaling = {
        key: value for key, value in (config.rope_scaling or {}).items() if isinstance(value, str | bool | int | float)
    }
    windows = {config.layer_sliding_window(layer) for layer in range(config.num_hidden_layers)}
    return {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention": {
            "heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "sliding_window": max((window for window in windows if window is not None), default=None),
            "windowed_layers": sum(
                config.layer_sliding_window(layer) is not None for layer in range(config.num_hidden_layers)
            ),
            "bias": config.attention_bias,
            "qk_norm": config.qk_norm,
        },
        "context": config.max_position_embeddings,
        "rope": {"theta": config.rope_theta, "scaling": scaling or None},
        "vocabulary": config.vocab_size,
        "tied_head": config.tie_word_embeddings,
    }


def _meta(path: Path, tensors: list[StoredTensor]) -> dict[str, Any]:
    from arriero.formats.meta.params import PARAMS_FILE, read_params

    params = read_params(path / PARAMS_FILE)
    first = min((tensor.file for tensor in tensors), default=None)
    width = sum(t.shape[0] for t in tensors if t.name == "layers.0.feed_forward.w1.weight" and t.shape)
    rows = {t.shape[0] for t in tensors if t.name == "output.weight" and t.shape}
    ranks = len({tensor.file for tensor in tensors})
    return {
        "architecture": "llama",
        # norms are whole in every file, matrices are cut
        "parameters": sum(
            t.numbers for t in tensors if len(t.shape) > 1 or (t.file == first and "freqs" not in t.name)
        ),
        "layers": params.n_layers,
        "hidden_size": params.dim,
        "intermediate_size": params.intermediate_size or width,
        "attention": {
            "heads": params.n_heads,
            "key_value_heads": params.n_kv_heads,
            "head_dim": params.dim // params.n_heads,
            "sliding_window": None,
            "windowed_layers": 0,
            "bias": False,
            "qk_norm": False,
        },
        "context": params.context,
        "rope": {"theta": params.rope_theta, "scaling": {"rope_type": "llama3"} if params.use_scaled_rope else None},
        "vocabulary": params.vocab_size or max(rows, default=0) * ranks,
        "tied_head": False,
    }


def _quantization(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return "unknown"
    words = [settings.get("quant_method"), settings.get("format"), settings.get("bnb_4bit_quant_type")]
    return ", ".join(word[:60] for word in words if isinstance(word, str)) or "unknown"


def _gguf_facts(path: Path) -> dict[str, Any]:
    from arriero.formats.gguf.file import GGUFFile

    with GGUFFile(path) as file:
        values = file.metadata
    tokens = values.get("tokenizer.ggml.tokens")
    facts: dict[str, Any] = {}
    if isinstance(tokens, list):
        kinds = {"gpt2": "byte-level BPE", "llama": "SentencePiece"}
        model, pre = str(values.get("tokenizer.ggml.model"))[:40], values.get("tokenizer.ggml.pre")
        special = {}
        for role in _NAMED:
            index = values.get(f"tokenizer.ggml.{'padding' if role == 'pad' else role}_token_id")
            if isinstance(index, int) and 0 <= index < len(tokens):
                special[role] = {"id": index, "text": str(tokens[index])[:100]}
        facts["tokenizer"] = {"kind": kinds.get(model, model), "tokens": len(tokens), "special": special}
        if pre:
            facts["tokenizer"]["pre"] = str(pre)[:40]
    facts["chat_template"] = "tokenizer.chat_template" in values
    for key, name in (("general.name", "name"), ("general.license", "licence")):
        if isinstance(values.get(key), str):
            facts[name] = values[key][:100]
    return facts


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """Kind, size and special tokens of the tokenizer in a folder; {} without one."""
    for name, read in _TOKENIZERS:
        path = folder / name
        if path.is_file():
            kind, tokens, ids = read(path)
            with refused_values(folder):
                files = read_tokenizer_files(folder)
            named = {role: files.named.get(f"{role}_token") for role in _NAMED}
            special = {
                role: {"id": ids.get(token.content), "text": token.content[:100]}
                for role, token in named.items()
                if token
            }
            facts = {"kind": kind, "tokens": tokens, "special": special}
            return {"tokenizer": facts, "chat_template": files.chat_template is not None}
    return {}


def _json_tokenizer(path: Path) -> tuple[str, int, dict[str, int]]:
    try:
        values = json.loads(read_bounded(path, VOCABULARY_FILE_LIMIT))
        model, added = values["model"], values.get("added_tokens") or []
        vocabulary = model["vocab"]
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {v[0]: i for i, v in enumerate(vocabulary)}
        ids |= {token["content"]: token["id"] for token in added}
        if not all(
            type(index) is int and 0 <= index < 2**31 and isinstance(token, str) for token, index in ids.items()
        ):
            raise TypeError("a token is a string with a whole number")
        byte_level = "ByteLevel" in json.dumps([values.get("pre_tokenizer"), values.get("decoder")])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError(f"{path}: is not a tokenizer of the tokenizers library; fetch it again") from error
    kind = str(model.get("type") or "BPE")[:40]
    if kind == "BPE":
        kind = "byte-level BPE" if byte_level else "BPE with byte fallback" if model.get("byte_fallback") else kind
    return kind, len(ids), ids


def _model_tokenizer(path: Path) -> tuple[str, int, dict[str, int]]:
    from arriero.formats.meta.tokenizer import is_tiktoken, read_tiktoken, special_tokens
    from arriero.formats.sentencepiece_model import read_sentencepiece_model

    content = read_bounded(path, VOCABULARY_FILE_LIMIT)
    if is_tiktoken(content):
        tokens = len(read_tiktoken(content, str(path)))
        special = special_tokens(llama31=False)
        return "tiktoken (Llama 3)", tokens + len(special), {name: tokens + i for i, name in enumerate(special)}
    pieces = read_sentencepiece_model(content, str(path)).tokens
    return "SentencePiece", len(pieces), {piece: index for index, piece in enumerate(pieces)}


_TOKENIZERS: tuple[tuple[str, Callable[[Path], tuple[str, int, dict[str, int]]]], ...] = (
    ("tokenizer.json", _json_tokenizer),
    ("tokenizer.model", _model_tokenizer),
    ("sentencepiece.bpe.model", _model_tokenizer),
)


def _adapter(found: Found, tensors: list[StoredTensor]) -> dict[str, Any]:
    parameters = sum(tensor.numbers for tensor in tensors)
    return {"adapter": adapter_facts(found, tensors), "parameters": parameters, **_weights(tensors)}


def _training(found: Found) -> dict[str, Any]:
    """What a run left beside the weights: where a checkpoint stands, which checkpoints a run has."""
    if found.part_of == "run":
        names = sorted(found.path.glob("checkpoint-*/manifest.json"), key=lambda path: path.stat().st_mtime)
        return {"training": {"checkpoints": [path.parent.name for path in names]}}
    if found.part_of is None:
        return {}
    path = found.path / "trainer_state.json"
    try:
        state = json.loads(read_bounded(path, SMALL_FILE_LIMIT))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not valid JSON; the checkpoint is damaged") from error
    if not isinstance(state, dict):
        raise FormatError(f"{path}: must hold a JSON object; the checkpoint is damaged")
    for key, kind, words in _STATE:
        value = state.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or abs(value) > LARGEST):
            raise FormatError(f"{path}: {key} must be {words}; the checkpoint is damaged")
    optimizer = [file for file in (found.path / "optimizer").glob("*") if file.is_file()]
    return {
        "training": {
            **{key: state.get(key) for key, _, _ in _STATE},
            "optimizer_bytes": sum(file.stat().st_size for file in optimizer),
        }
    }


_STATE: tuple[tuple[str, Any, str], ...] = (
    ("step", int, "a whole number"),
    ("total_steps", int, "a whole number"),
    ("tokens", int, "a whole number"),
    ("seconds", int | float, "a number"),
    ("best_metric", int | float, "a number"),
)


def as_json(inspection: Inspection, *, tensors: bool) -> dict[str, Any]:
    """All of it as plain values; a number that JSON does not have (NaN, infinity) is a word.

    Args:
        tensors: with the list of them.
    """
    listed = [{**asdict(tensor), "file": tensor.file.name} for tensor in inspection.tensors]
    result: dict[str, Any] = {"path": str(inspection.path), "what": inspection.what, **inspection.facts}
    return dict(_finite(result)) | ({"tensors": listed} if tensors else {})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
