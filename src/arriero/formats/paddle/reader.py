"""PaddleNLP model folders, read as HF ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.name_list import listed
from arriero.formats.paddle.checkpoint import (
    MODEL_STEM,
    Checkpoint,
    Piece,
    check_pieces,
    find_ranks,
    join,
    open_model_files,
    tensor_dtype,
)
from arriero.formats.paddle.config import read_paddle_config
from arriero.formats.paddle.names import BASE_PREFIXES, HEAD, HF_PREFIX, Place, places, stored_tensors
from arriero.formats.safe_tensors import INDEX_FILE, SINGLE_FILE, LazyTensor, read_index, read_shapes
from arriero.formats.side_files import read_side_files
from arriero.formats.source import ModelSource
from arriero.formats.tied_head import EMBEDDING, OWN_HEAD, same_bits
from arriero.models.config import LlamaConfig

SENTENCEPIECE = "sentencepiece.bpe.model"
TOKENIZER_MODEL = "tokenizer.model"
CHAT_TEMPLATE = "chat_template.json"


def is_paddle_folder(folder: str | Path) -> bool:
    """Whether a folder holds weights as PaddleNLP names them, judged by file names and, of safetensors, the tensors' names."""
    folder = Path(folder)
    if find_ranks(folder, MODEL_STEM) or (folder / f"{MODEL_STEM}.pdparams.index.json").is_file():
        return True
    try:
        if (folder / SINGLE_FILE).is_file():
            names = set(read_shapes(folder / SINGLE_FILE))
        elif (folder / INDEX_FILE).is_file():
            names = set(read_index(folder / INDEX_FILE))
        else:
            return False
    except FormatError:
        return False
    return any(name.split(".", 1)[0] in BASE_PREFIXES.values() for name in names)


def open_paddle(folder: str | Path) -> ModelSource:
    """The model of a PaddleNLP folder; nothing of it is in memory yet.

    Weights are `model_state.pdparams`, shards of it with an index, the files of the processes of tensor parallelism and of a
    pipeline (`model_state.tpNN_ppMM.pdparams`), joined as each tensor is loaded, or the safetensors files of a unified
    checkpoint. Tensors that hold q, k and v, or gate and up, together are taken apart.

    Raises:
        FormatError: naming the file, and what is missing, broken, unexpected or of a wrong shape. What processes hold
            differently, though they should not, is found when that tensor is loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: is not a folder; give a Paddle model folder")
    stored = read_paddle_config(folder)
    checkpoint = open_model_files(folder, stored.tensor_parallel_degree)
    try:
        config = _untied(folder, stored.model, checkpoint)
        found = _places(folder, config, checkpoint)
        kinds = {name: tensor_dtype(checkpoint.pieces[place.stored.name][0], name) for name, place in found.items()}
        tensors = {
            name: LazyTensor(place.shape, kinds[name], partial(_load, checkpoint.pieces, place))
            for name, place in found.items()
        }
        files, remarks = _side_files(folder)
        if config != stored.model:
            remarks = (f"{folder}: {OWN_HEAD}", *remarks)
    except BaseException:
        checkpoint.close()
        raise
    names = sorted({str(kind).removeprefix("torch.") for kind in kinds.values()})
    widest = max(kinds.values(), key=lambda kind: kind.itemsize)
    return ModelSource(
        path=folder,
        format="paddle",
        config=dataclasses.replace(config, dtype=str(widest).removeprefix("torch.")),
        tensors=tensors,
        files=files,
        about=(_origin(checkpoint, names), *stored.about, *remarks),
        close=checkpoint.close,
    )


def _load(pieces: Mapping[str, tuple[Piece, ...]], place: Place) -> Tensor:
    return join(pieces[place.stored.name], place)


def _untied(folder: Path, config: LlamaConfig, checkpoint: Checkpoint) -> LlamaConfig:
    """The configuration without tie_word_embeddings where the files hold a head of its own, as `tied_head.untied`.

    A copy of the embedding may lie as the embedding does, or as a head does.
    """
    name = EMBEDDING.replace(HF_PREFIX, BASE_PREFIXES[config.model_type], 1)
    if not config.tie_word_embeddings or not {HEAD, name} <= checkpoint.pieces.keys():
        return config
    if config.num_hidden_layers > len(checkpoint.pieces):  # as in `_places`
        return config
    own = dataclasses.replace(config, tie_word_embeddings=False)
    whole = {hf: place for hf, place in places(own, checkpoint.tp).items() if hf in (HEAD, EMBEDDING)}
    for hf, place in whole.items():
        pieces = checkpoint.pieces[place.stored.name]
        if hf == HEAD and tuple(pieces[0].shape) != place.stored.piece_shape(len(pieces)):
            as_embedding = dataclasses.replace(whole[EMBEDDING].stored, name=HEAD)
            place = whole[hf] = dataclasses.replace(whole[EMBEDDING], stored=as_embedding)
        check_pieces(pieces, place.stored)
    head, embedding = (_load(checkpoint.pieces, whole[hf]) for hf in (HEAD, EMBEDDING))
    return config if same_bits(head, embedding) else own


def _places(folder: Path, config: LlamaConfig, checkpoint: Checkpoint) -> dict[str, Place]:
    """Where every weight lies, after checking that the files hold these and nothing else."""
    if config.num_hidden_layers > len(checkpoint.pieces):  # before anything is built of a hostile number of layers
        raise FormatError(
            f"{folder}: {config.num_hidden_layers} layers are announced, but there are only {len(checkpoint.pieces)} tensors"
        )
    found = places(
        config,
        checkpoint.tp,
        fused_attention=any(name.endswith(".qkv_proj.weight") for name in checkpoint.pieces),
        fused_ffn=any(name.endswith(".gate_up_fused_proj.weight") for name in checkpoint.pieces),
    )
    wanted = stored_tensors(found)
    missing = [name for name in wanted if name not in checkpoint.pieces]
    if missing:
        bare = "; the decoder alone was saved, without its head" if "embed_tokens.weight" in checkpoint.pieces else ""
        raise FormatError(f"{folder}: missing {listed(missing)} (config.json needs it){bare}")
    unexpected = [name for name in checkpoint.pieces if name not in wanted and not _carries_nothing(name, config)]
    if unexpected:
        raise FormatError(f"{folder}: unexpected {listed(unexpected)}; config.json does not describe these weights")
    for name, tensor in wanted.items():
        check_pieces(checkpoint.pieces[name], tensor)
    return found


def _carries_nothing(name: str, config: LlamaConfig) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tie_word_embeddings)


def _origin(checkpoint: Checkpoint, kinds: list[str]) -> str:
    many = f", cut for {checkpoint.tp} processes of tensor parallelism" if checkpoint.tp > 1 else ""
    count = len(checkpoint.files)
    return f"Paddle weights ({', '.join(kinds)}) in {count} file{'s' * (count > 1)}{many}"


def _side_files(folder: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The tokenizer under the names of an HF folder, and what to tell the user."""
    files = read_side_files(folder)
    sentencepiece = files.pop(SENTENCEPIECE, None)
    if sentencepiece is not None:
        files.setdefault(TOKENIZER_MODEL, sentencepiece)
    template = files.get(CHAT_TEMPLATE)
    if template is None:
        return files, ()
    try:
        values = json.loads(template)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict) and "chat_template" in values:
        return files, ()
    del files[CHAT_TEMPLATE]
    return files, (f"{CHAT_TEMPLATE} is in PaddleNLP's own form and was left out: give a Jinja chat template instead",)
