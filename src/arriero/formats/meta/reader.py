"""A folder of Meta's (`consolidated.NN.pth`, params.json, tokenizer.model) as a model of HF names and layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.hf import check_state
from arriero.formats.meta import tokenizer
from arriero.formats.meta.names import EMBEDDING, HEAD, ROWS, NameRow, from_meta, is_frequencies
from arriero.formats.meta.params import PARAMS_FILE, Params, read_params, scaled_rope
from arriero.formats.rope_layout import pairs_to_halves
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.side_files import read_side_files
from arriero.formats.source import ModelSource
from arriero.formats.torch_files import TorchFile, read_torch_file
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import weight_shapes

_FILE = re.compile(r"consolidated\.(\d{2,3})\.pth")
_HF_CONFIG = "config.json"
# What params.json says, so that a config.json beside it must agree on.
_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
)


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a folder, one a rank of model parallelism, in order.

    Raises:
        FormatError: when there is none, or a rank's is missing.
    """
    found = {int(match[1]): path for path in folder.glob("consolidated.*") if (match := _FILE.fullmatch(path.name))}
    if not found:
        raise FormatError(f"{folder}: holds no consolidated.00.pth; this is not a folder of Meta's weights")
    missing = [rank for rank in range(max(found)) if rank not in found]
    if missing:
        raise FormatError(f"{folder}: consolidated.{missing[0]:02d}.pth is missing; fetch it again")
    return [found[rank] for rank in sorted(found)]


def open_meta(folder: str | Path) -> ModelSource:
    """The model of a folder of Meta's; shards of model parallelism are joined as they are loaded.

    The head counts as tied when it has the embedding's numbers (or is left out): params.json does not say. What it does not
    know either (context length, special ids) comes from a config.json beside it if one is there, as `write_meta` leaves it,
    else from what the generations of LLaMA differ in; `about` tells.

    Raises:
        FormatError: when a file is missing or broken, shards do not fit each other, or weights do not fit params.json.
    """
    folder = Path(folder)
    paths = shard_files(folder)
    params = read_params(folder / PARAMS_FILE)
    opened = [read_torch_file(path) for path in paths]
    shards = _Shards(folder, opened, params)
    tied = shards.is_tied()
    files, about = _side_files(folder, params)
    config, remarks = _config(folder, params, shards, tied, files)
    about += remarks
    shapes = {name: entry.shape for name, entry in shards.entries.items()}
    check_state(config, shapes, str(folder))
    tensors = {name: shards.tensor(name, config) for name in weight_shapes(config)}

    def close() -> None:
        tensors.clear()
        for file in opened:
            file.close()

    return ModelSource(folder, "meta", config, tensors, files, tuple(about), close)


@dataclass(frozen=True)
class _Entry:
    """A tensor in the files of all ranks.

    Attributes:
        parts: what each rank has.
        cut: the dimension along which they are joined; None: all have the same.
        copies: how many ranks in a row share one part (more ranks than key-value heads).
        shape: of the whole tensor.
    """

    row: NameRow
    parts: tuple[Tensor, ...]
    cut: int | None
    copies: int
    shape: tuple[int, ...]


class _Shards:
    """The tensors of all ranks by HF name, checked to fit each other and params.json."""

    def __init__(self, folder: Path, files: Sequence[TorchFile], params: Params) -> None:
        self.folder = folder
        self.params = params
        names = [{name for name in file.tensors if not is_frequencies(name)} for file in files]
        for file, own in zip(files, names, strict=True):
            if different := sorted(own ^ names[0]):
                raise FormatError(f"{file.path}: {different[0][:80]!r} is in only one of it and {files[0].path.name}")
        self.entries: dict[str, _Entry] = {}
        for meta_name in names[0]:
            name, row = from_meta(meta_name, str(folder))
            self.entries[name] = self._entry(meta_name, row, tuple(file.tensors[meta_name] for file in files))
        self._check_complete()

    def _entry(self, name: str, row: NameRow, parts: tuple[Tensor, ...]) -> _Entry:
        first = parts[0]
        if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
            raise FormatError(f"{self.folder}: {name} has another shape or dtype in one file than in another")
        if first.dim() != (1 if row.cut is None else 2):
            raise FormatError(f"{self.folder}: {name} has the shape {list(first.shape)}; a LLaMA's has not")
        cut, count = row.cut, len(parts)
        if row is EMBEDDING and first.shape[1] != self.params.dim:
            cut = 1
        if cut is None or count == 1:
            return _Entry(row, parts, None, count, tuple(first.shape))
        copies = 1
        if row.meta in ("layers.N.attention.wk.weight", "layers.N.attention.wv.weight"):
            whole = self.params.n_kv_heads * (self.params.dim // self.params.n_heads)
            copies = max(first.shape[0] * count // whole, 1)
            if count % copies:
                raise FormatError(
                    f"{self.folder}: {name} has {first.shape[0]} rows in each of {count} files; {whole} are whole"
                )
        shape = list(first.shape)
        shape[cut] = shape[cut] * count // copies
        return _Entry(row, parts, cut, copies, tuple(shape))

    def _check_complete(self) -> None:
        layers = self.params.n_layers
        if layers > len(self.entries):
            raise FormatError(
                f"{self.folder}: {PARAMS_FILE} has {layers} layers, the files only {len(self.entries)} tensors"
            )
        for row in ROWS:
            for layer in range(layers) if "N" in row.hf.split(".") else range(1):
                if row is not HEAD and row.hf.replace("N", str(layer)) not in self.entries:
                    raise FormatError(
                        f"{self.folder}: {row.meta.replace('N', str(layer))} is missing; fetch the model again"
                    )
        found = self.entries["model.layers.0.mlp.gate_proj.weight"].shape[0]
        if self.params.intermediate_size not in (None, found):
            raise FormatError(
                f"{self.folder}: multiple_of and ffn_dim_multiplier of {PARAMS_FILE} give a feed-forward width of "
                f"{self.params.intermediate_size}, but layers.0.feed_forward.w1.weight has {found} rows"
            )

    def tensor(self, name: str, config: LlamaConfig) -> Tensor | LazyTensor:
        """The whole tensor, in HF's layout; made when it is loaded unless it stands in the file as it is."""
        entry = self.entries[name]
        if not entry.row.permuted and len(entry.parts) == 1:
            return entry.parts[0]
        heads = config.num_attention_heads if name.endswith("q_proj.weight") else config.num_key_value_heads

        def load() -> Tensor:
            whole = self._joined(name, entry)
            return pairs_to_halves(whole, heads) if entry.row.permuted else whole

        return LazyTensor(entry.shape, entry.parts[0].dtype, load)

    def _joined(self, name: str, entry: _Entry) -> Tensor:
        groups = [entry.parts[start : start + entry.copies] for start in range(0, len(entry.parts), entry.copies)]
        for group in groups:
            if any(not torch.equal(group[0], other) for other in group[1:]):
                raise FormatError(
                    f"{self.folder}: {name} should be the same in files that differ in it; fetch them again"
                )
        if entry.cut is None:
            return entry.parts[0]
        return torch.cat([group[0] for group in groups], dim=entry.cut)

    def is_tied(self) -> bool:
        """Whether the head is the embedding: the same place in the file, the same numbers, or no head at all."""
        head, embedding = self.entries.get(HEAD.hf), self.entries[EMBEDDING.hf]
        if head is None:
            return True
        if head.shape != embedding.shape:
            return False
        if embedding.cut == head.cut:
            pairs = zip(head.parts, embedding.parts, strict=True)
            return all(one.data_ptr() == two.data_ptr() or _same(one, two) for one, two in pairs)
        height, width = head.parts[0].shape[0], embedding.parts[0].shape[1]
        return all(
            _same(one[:, column * width : (column + 1) * width], two[row * height : (row + 1) * height])
            for row, one in enumerate(head.parts)
            for column, two in enumerate(embedding.parts)
        )


def _same(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one[:1], two[:1]) and torch.equal(one, two)  # two heads differ in the first row already


def _side_files(folder: Path, params: Params) -> tuple[dict[str, bytes], list[str]]:
    files, about = read_side_files(folder), []
    source = folder / tokenizer.TOKENIZER_FILE
    if tokenizer.TOKENIZER_FILE not in files and "tokenizer.json" not in files:
        # download.sh of LLaMA 1 and 2 puts one file beside the folders of all sizes.
        source = folder.absolute().parent / tokenizer.TOKENIZER_FILE
        files |= read_side_files(source.parent, (source.name,))
        about += [f"tokenizer: {source}"] if source.name in files else []
    model = files.get(tokenizer.TOKENIZER_FILE)
    if model is not None and tokenizer.is_tiktoken(model):
        del files[tokenizer.TOKENIZER_FILE]
        if "tokenizer.json" not in files:
            tokens = tokenizer.read_tiktoken(model, str(source))
            files |= tokenizer.hf_files(tokens, llama31=params.use_scaled_rope, context=params.context)
    elif model is not None and "tokenizer.json" not in files:
        files.setdefault("tokenizer_config.json", tokenizer.sentencepiece_config())
    return files, about


def _config(
    folder: Path, params: Params, shards: _Shards, tied: bool, files: Mapping[str, bytes]
) -> tuple[LlamaConfig, list[str]]:
    vocabulary = shards.entries[EMBEDDING.hf].shape[0]
    if params.vocab_size not in (None, vocabulary):
        raise FormatError(
            f"{folder}: vocab_size of {PARAMS_FILE} is {params.vocab_size}, but tok_embeddings.weight has {vocabulary} rows"
        )
    kinds = {entry.parts[0].dtype for entry in shards.entries.values()}
    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": params.dim,
        "intermediate_size": shards.entries["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads,
        "max_position_embeddings": params.context,
        "rms_norm_eps": params.norm_eps,
        "rope_theta": params.rope_theta,
        "rope_scaling": scaled_rope(tied) if params.use_scaled_rope else None,
        "tie_word_embeddings": tied,
        "torch_dtype": str(max(kinds, key=lambda kind: kind.itemsize)).removeprefix("torch."),
        **_special_ids(files, vocabulary),
    }
    config = LlamaConfig.from_dict(values, source=str(folder / PARAMS_FILE))
    if not (folder / _HF_CONFIG).is_file():
        guess = f"context length {params.context}: known from the generation, {PARAMS_FILE} does not say"
        return config, [] if params.max_seq_len is not None else [guess]
    beside = LlamaConfig.from_file(folder)
    for key in _SHARED_KEYS:
        if getattr(beside, key) != getattr(config, key):
            raise FormatError(
                f"{folder}: {key} is {getattr(beside, key)} in {_HF_CONFIG} but {getattr(config, key)} by {PARAMS_FILE} and "
                "the weights; remove or mend one of them"
            )
    return replace(beside, dtype=config.dtype), []


def _special_ids(files: Mapping[str, bytes], vocabulary: int) -> dict[str, Any]:
    """The ids that begin and end a text: Meta's `bos_id` and `stop_tokens`."""
    if "tokenizer.json" not in files:
        return {"bos_token_id": 1, "eos_token_id": 2} if vocabulary > 2 else {}
    try:
        added = {token["content"]: token["id"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    stops = [added[name] for name in (tokenizer.END, tokenizer.MESSAGE, tokenizer.TURN) if name in added]
    if tokenizer.BEGIN not in added or not stops:
        return {}
    return {"bos_token_id": added[tokenizer.BEGIN], "eos_token_id": stops}
