"""The kinds of bundles: what runs each, and where. A new kind is a row here and an exporter in `bundles/exporting.py`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from arriero.export.bundle import Bundle


@dataclass(frozen=True)
class Kind:
    """What runs the bundles of a kind.

    Attributes:
        runtime: the package that does; None: none of Python.
        extra: of this package, that installs it.
        opener: the module with the kind's `open_runner`; None: the engine cannot run it.
        devices: that its bundles are made for.
        about: for a message: what it is for.
        same_version: whether the runtime must be of the same major and minor version, and not only as new.
    """

    runtime: str | None
    extra: str
    opener: str | None
    devices: tuple[str, ...]
    about: str
    same_version: bool = False


KINDS = {
    "onnx": Kind("onnxruntime", "export", "arriero.export.onnx_runner", ("cpu",), "ONNX Runtime"),
    "torch": Kind("torch", "export", "arriero.export.torch_runner", ("cpu", "cuda"), "torch"),
    "aoti": Kind("torch", "export", "arriero.export.aoti_runner", ("cpu", "cuda"), "torch", same_version=True),
    "gguf": Kind(None, "gguf", None, ("any",), "llama.cpp and programs that are built on it"),
}
# Of keys, on a GPU: its kernels of attention want masks that are aligned.
GPU_UNIT = 64
# Of the kinds that the engine runs.
RUNNABLE = tuple(name for name, kind in KINDS.items() if kind.opener is not None)


class BundleRunner(Protocol):
    """The engine's `Runner`, as far as it can be told without importing the engine."""

    num_blocks: int
    block_size: int
    vocab_size: int
    context: int
    prefix_length: int
    reuses: bool

    @property
    def recalled(self) -> Sequence[int]: ...
    @property
    def adapters(self) -> None: ...
    @property
    def library(self) -> Literal["torch", "numpy"]: ...
    @property
    def device(self) -> Any: ...
    def run(self, work: Sequence[Any]) -> Any: ...
    def begin(self, blocks: Sequence[int], start: int, end: int, adapter: int = 0) -> None: ...


def slot_bytes(bundle: Bundle) -> int:
    """What the keys and values of a sequence come to that fills the bundle's context: in fp32 on a CPU, else as weights are."""
    config, half = bundle.manifest.config, bundle.manifest.device != "cpu" and bundle.manifest.weights != "fp32"
    sizes = [config.get(key) for key in ("num_hidden_layers", "num_key_value_heads", "head_dim")]
    numbers = [size if isinstance(size, int) and size > 0 else 1 for size in sizes]  # a runtime refuses what is not one
    room = row_room(bundle.manifest.context, 1 if bundle.manifest.device == "cpu" else GPU_UNIT)
    return 2 * (2 if half else 4) * room * prod(numbers)


def row_room(context: int, unit: int) -> int:
    """Tokens that a row of keys has room for, in a unit of them; a traced length has more than one size."""
    return max(-(-context // unit) * unit, 2 * unit)


def open_runner(
    bundle: Bundle,
    *,
    slots: int,
    threads: int | None = None,
    memory: int | None = None,
    spinning: bool = True,
    device: str | None = None,
) -> BundleRunner:
    """What computes with a bundle.

    Args:
        slots: sequences that are computed at once; a kind with another layout of keys and values takes it as a hint.
        threads: of a computation on a CPU; default: the cores that this process may use.
        memory: bytes that the keys and values of all slots may come to. They are taken as sequences grow, but where not as
            many whole ones fit there are fewer slots, and one at least. None: no limit. On a GPU it is that GPU's memory which
            counts, and this does not.
        spinning: see `OnnxSession`.
        device: cuda:N, of a bundle for a GPU; None: this process' own.

    Raises:
        FormatError: its kind's runtime cannot load it, or the engine does not run the kind.
        MissingExtraError: the kind's runtime is not installed.
    """
    from arriero.errors import FormatError

    kind = KINDS[bundle.manifest.kind]
    if kind.opener is None:
        raise FormatError(
            f"{bundle.folder}: is a bundle of the kind {bundle.manifest.kind}, for {kind.about}: give {bundle.graph} to it, or "
            f"export the model as one of {', '.join(RUNNABLE)}"
        )
    if memory is not None and bundle.manifest.device != "cuda":
        slots = max(1, min(slots, memory // slot_bytes(bundle)))
    module: Any = importlib.import_module(kind.opener)
    runner: BundleRunner = module.open_runner(bundle, slots, threads, spinning=spinning, device=device)
    return runner
