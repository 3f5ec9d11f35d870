"""From a model to a bundle with a GGUF file, which llama.cpp runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arriero.export.bundle import ANY, Bundle, Manifest, new_bundle, open_bundle, write_manifest
from arriero.export.model_files import generation_defaults, write_model_files
from arriero.formats.conversion import SMALL
from arriero.formats.detection import detect
from arriero.formats.lost_changes import kept_share
from arriero.formats.opening import Writing, open_model, write_model
from arriero.formats.source import ModelSource
from arriero.formats.verification import compare

GRAPH = "model.gguf"
# The number format of each kind of weights.
KINDS_OF = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "q8_0", "int4": "q4_k_m"}


def export_gguf(
    source: ModelSource, target: str | Path, weights: str | None, defaults: Mapping[str, Any] | None = None
) -> Bundle:
    """Write the bundle of a model; a tensor at a time is in memory. The file is compared with the model before it is kept.

    Args:
        weights: one of `KINDS_OF`; None: as they are.
        defaults: of answers, besides those of the model.

    Raises:
        FormatError: what a GGUF file cannot hold, a target in use, or a file that differs from the model.
    """
    how = Writing("gguf", gguf_kind=None if weights is None else KINDS_OF[weights])
    small = source.config.num_parameters() < SMALL
    with new_bundle(target) as staging:
        write_model(source, staging / GRAPH, how)
        with open_model(detect(staging / GRAPH)) as written:
            found = compare(source, written, dtype=how.rounds_to(source), lossy=how.is_lossy(source), logits=small)
            share = kept_share(source, written, source.updates)
        config = write_model_files(staging, source)
        manifest = Manifest(
            kind="gguf",
            graph=GRAPH,
            weights=how.kind_for(source),
            context=source.config.max_position_embeddings,
            config=config,
            generation=generation_defaults(source) | dict(defaults or {}),
            check=asdict(found) | ({"adapter_kept": share} if source.updates else {}),
            versions={},
            device=ANY,
        )
        write_manifest(staging, manifest)
    return open_bundle(target)
