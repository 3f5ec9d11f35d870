"""A model from one format into another: written beside its place, compared with the original, then put there."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import FormatError
from arriero.formats.detection import Found, detect
from arriero.formats.lost_changes import nearness_warning
from arriero.formats.opening import MODEL_FILES, Writing, open_model, write_model
from arriero.formats.source import ModelSource
from arriero.formats.staging import beside, staged_file, staged_folder
from arriero.formats.verification import Comparison, compare
from arriero.models.config import LlamaConfig, told_already

# Below it a conversion is verified unless told otherwise, and logits are compared: the model fits into memory.
SMALL = 2_000_000_000
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What `convert_model` did.

    Attributes:
        config: of the model.
        notes: what a user wants to know about source and target, a line each.
        comparison: of the two; None if it was not asked for.
    """

    config: LlamaConfig
    notes: tuple[str, ...]
    comparison: Comparison | None


def convert_model(
    found: Found,
    output: Path,
    how: Writing,
    *,
    verify: bool | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write a model in another format, a tensor at a time; `output` appears when all is done, or not at all.

    Args:
        output: a folder; of GGUF a file. What is there is replaced.
        verify: compare every tensor, and in a model of less than `SMALL` parameters the logits of a prompt, with the
            original's; None: if it has less than `SMALL` parameters.
        progress: told what is done ("convert", "verify"), bytes done and bytes in all.

    Raises:
        FormatError: when the source is broken, the format cannot hold it, it cannot be written, or a comparison fails.
    """

    def report(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    with open_model(found) as source, staged_output(output, is_file=how.format == "gguf") as place:
        small = source.config.num_parameters() < SMALL
        notes = source.about + write_model(source, place, how, report("convert")) + _lost(source, how)
        comparison = None
        if verify or (verify is None and small):
            with told_already():
                copy = open_model(detect(place))
            with copy as written:
                comparison = compare(
                    source,
                    written,
                    dtype=how.rounds_to(source),
                    lossy=how.is_lossy(source),
                    logits=small,
                    progress=report("verify"),
                )
        config = source.config
    return Conversion(config, notes, comparison)


def _lost(source: ModelSource, how: Writing) -> tuple[str, ...]:
    """A note where 4 bits lose what a training changed last."""
    if how.format != "gguf":
        return ()
    instead = "--gguf_type q8_0 keeps it; so does the adapter itself, converted to GGUF"
    warning = nearness_warning(source, instead, how.kind_for(source))
    return () if warning is None else (f"warning: {warning}",)


@contextlib.contextmanager
def staged_output(output: Path, *, is_file: bool) -> Iterator[Path]:
    """A place beside `output`, of the same name; what is written there takes its place when the block ends well.

    Raises:
        FormatError: also one from within the block, which then names `output` and not the place.
    """
    place = output
    try:
        if is_file:
            with staged_file(output) as place:
                yield place
        else:
            with staged_folder(output, replaces=MODEL_FILES) as staging:
                place = staging / Path(os.path.realpath(output)).name
                yield place
                for path in sorted(place.iterdir()):
                    path.rename(staging / path.name)
                place.rmdir()
    except FormatError as error:
        raise FormatError(_told_of(output, place, str(error))) from error


def _told_of(output: Path, place: Path, text: str) -> str:
    """A message with the output's name instead of that of its place, or of a temporary one beside that."""
    if place == output:
        return text
    inner = rf"{beside(place)}(?:{os.sep}{re.escape(place.name)})?"
    return re.sub(
        rf"{re.escape(str(place.parent) + os.sep)}(?:{inner}|{re.escape(place.name)})", lambda _: str(output), text
    )
