"""HF folders whose weights are files of torch.save: `pytorch_model.bin`, one or a sharded set with its index."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.hf import check_state
from arriero.formats.safe_tensors import read_index
from arriero.formats.side_files import ROUNDING_FILES, read_side_files
from arriero.formats.source import ModelSource
from arriero.formats.tied_head import OWN_HEAD, state_untied
from arriero.formats.torch_files import TorchFile, read_torch_file
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import weight_shapes

BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
# What a training program's wrapper puts before every name.
_WRAPPERS = ("module.", "_orig_mod.")
_HEAD = "lm_head.weight"


def bin_files(folder: str | Path) -> list[Path]:
    """The `.bin` files of a model folder, in order; none when it has no such weights.

    Raises:
        FormatError: when the index is broken, or names a file that is absent or lies elsewhere.
    """
    folder = Path(folder)
    if (folder / BIN_FILE).is_file():
        return [folder / BIN_FILE]
    if not (folder / BIN_INDEX_FILE).is_file():
        return []
    return [folder / name for name in sorted(set(read_index(folder / BIN_INDEX_FILE, ".bin").values()))]


def open_bin_folder(folder: str | Path) -> ModelSource:
    """The model of an HF folder with `.bin` weights; nothing in them is run (see `torch_files.py`).

    Checkpoints saved from the bare decoder (names without "model.") or from within a wrapper ("module.") are understood.

    Raises:
        FormatError: when a file is missing or broken, two hold the same tensor, or the weights do not fit config.json.
    """
    folder = Path(folder)
    config = LlamaConfig.from_file(folder)
    paths = bin_files(folder)
    if not paths:
        raise FormatError(
            f"{folder}: holds neither {BIN_FILE} nor {BIN_INDEX_FILE}; this is not a folder of .bin weights"
        )
    files: list[TorchFile] = []
    state: dict[str, Tensor] = {}
    for path in paths:
        files.append(read_torch_file(path))
        for name, tensor in files[-1].tensors.items():
            if name in state:
                raise FormatError(f"{path}: holds {name}, which another file holds too; fetch the model again")
            state[name] = tensor
    state = _plain_names(state)
    stated, config = config, state_untied(config, state)
    check_state(config, {name: tuple(tensor.shape) for name, tensor in state.items()}, str(folder))
    tensors = {name: state[name] for name in weight_shapes(config)}
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})

    def close() -> None:
        tensors.clear()
        for file in files:
            file.close()

    return ModelSource(
        path=folder,
        format="hf",
        config=config,
        tensors=tensors,
        files=read_side_files(folder),
        about=(
            f"weights of torch.save ({', '.join(kinds)}), read as data: nothing in them was run",
            *([f"{folder}: {OWN_HEAD}"] if config != stated else []),
        ),
        close=close,
        rounding=read_side_files(folder, ROUNDING_FILES),
    )


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    if "embed_tokens.weight" in state:
        state = {name if name == _HEAD else f"model.{name}": tensor for name, tensor in state.items()}
    return state
