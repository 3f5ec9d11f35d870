"""What computes an engine's steps with an ONNX bundle; NumPy and ONNX Runtime only."""

from __future__ import annotations

from arriero.errors import FormatError
from arriero.export.bundle import Bundle
from arriero.export.onnx_session import OnnxSession
from arriero.export.prefix_file import read_prefix
from arriero.export.slot_runner import SlotRunner


def open_runner(
    bundle: Bundle, slots: int, threads: int | None = None, *, spinning: bool = True, device: str | None = None
) -> SlotRunner:
    """See `kinds.open_runner`; the device is a CPU."""
    session = OnnxSession(bundle.graph, slots, threads, spinning=spinning)
    config = bundle.manifest.config
    shape = tuple(config.get(key) for key in ("num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size"))
    if (*session.cache_shape, session.vocab_size, session.context) != (*shape, bundle.manifest.context):
        raise FormatError(
            f"{bundle.graph}: is of another model or context than the manifest says; export the model again"
        )
    length = bundle.manifest.prefix_length
    if not length:
        return SlotRunner(session)
    layers, heads, head_dim = session.cache_shape
    return SlotRunner(session, read_prefix(bundle.folder, (layers, 2, heads, length, head_dim)))
