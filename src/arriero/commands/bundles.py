"""Bundles as verbs find and open them. Of a kind that needs no torch, nothing here imports it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import FormatError

if TYPE_CHECKING:
    from arriero.engine.engine import Engine
    from arriero.export.bundle import Bundle


def bundle_folder(model_dir: str, prefix: str) -> Path:
    """The bundle that the two name: `model_dir/prefix`, where `arriero export --output_path model_dir/prefix` puts it, or
    `model_dir` itself.

    Raises:
        FormatError: there is none.
    """
    from arriero.export.bundle import MANIFEST

    folder = Path(model_dir).expanduser()
    named = folder / prefix
    if named.is_dir():
        return named
    if (folder / MANIFEST).exists():
        return folder
    raise FormatError(
        f"{folder}: holds no bundle, nor is there one in {named} (--model_prefix {prefix}); arriero export --output_path "
        f"{named} writes it"
    )


def default_length(bundle: Bundle) -> int:
    """The length of answers that a bundle asks for; a whole number from 1, whatever its manifest says."""
    length = bundle.manifest.generation.get("max_new_tokens")
    return length if isinstance(length, int) and not isinstance(length, bool) and length >= 1 else 100


def bundle_engine(bundle: Bundle, max_running: int, threads: int | None = None) -> Engine:
    """An engine over an open bundle.

    Args:
        max_running: prompts that are answered at once; fewer, with a warning, if the keys and values of so many that fill
            the bundle's context are more than half of the free memory.
        threads: of a computation on a CPU; default: the cores that this process may use.

    Raises:
        FormatError: its runtime cannot load it, or the engine does not run its kind.
        MissingExtraError: the runtime is not installed.
    """
    from arriero.data.tokenizer import load_tokenizer
    from arriero.engine.engine import Engine
    from arriero.engine.machine_memory import free_memory
    from arriero.export.kinds import open_runner, slot_bytes

    runner = open_runner(bundle, slots=max_running, threads=threads, memory=free_memory() // 2)
    if runner.num_blocks < max_running:
        size = slot_bytes(bundle) / 1e6
        print(
            f"arriero: warning: {runner.num_blocks} prompts are answered at once and not {max_running}: keys and values of one "
            f"take up to {size:.0f} MB; export the model with a smaller --context",
            file=sys.stderr,
        )
    return Engine(runner, load_tokenizer(bundle.folder), max_running=max_running)
