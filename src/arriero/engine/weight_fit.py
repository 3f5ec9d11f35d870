"""Whether the weights in a model's files are those that its configuration describes, judged as loading judges it."""

from __future__ import annotations

from collections.abc import Sequence

from arriero.errors import FormatError
from arriero.formats.detection import Found
from arriero.formats.stored_tensors import StoredTensor
from arriero.models.config import LlamaConfig


def misfit(found: Found, config: LlamaConfig, tensors: Sequence[StoredTensor]) -> str | None:
    """Why the weights do not fit the configuration; None if they do. No weight is read.

    Args:
        tensors: all that the files hold.
    """
    if config.num_hidden_layers > len(tensors):  # before anything is built of a hostile number of layers
        return f"{config.num_hidden_layers:,} layers are announced, but there are only {len(tensors):,} tensors"
    try:
        _check(found, config, tensors)
    except FormatError as error:
        return str(error).removeprefix(f"{found.path}: ")
    return None


def _check(found: Found, config: LlamaConfig, tensors: Sequence[StoredTensor]) -> None:
    from arriero.formats.hf import check_state

    source = str(found.path)
    match found.kind:
        case "hf":
            from arriero.formats.quantized import QuantizedFolder, is_quantized

            plain = {tensor.name: tensor.shape for tensor in tensors}
            check_state(
                config, QuantizedFolder(source, config).plain_shapes() if is_quantized(config) else plain, source
            )
        case "hf-shards":
            from arriero.formats.tensor_shards import ShardedState

            ShardedState(source, config)
        case "hf-bin":
            from arriero.formats.bin_folder import open_bin_folder

            open_bin_folder(source).close()
        case "paddle":
            from arriero.formats.paddle.reader import open_paddle

            open_paddle(source).close()
        case "gguf":
            from arriero.formats.gguf.names import ROPE_FREQUENCIES, hf_name

            own = {hf_name(t.name, source): t.shape for t in tensors if t.name != ROPE_FREQUENCIES}
            check_state(config, own, source)
