"""What a bundle is, from its manifest and the sizes of its files: for `arriero inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.engine.inspection import Inspection, refused_values, shape_facts, tokenizer_facts
from arriero.errors import FormatError
from arriero.export.bundle import Bundle, check_files, check_machine, read_bundle
from arriero.export.kinds import KINDS
from arriero.models.config import LlamaConfig

_LARGEST = 2**62  # of a number that is shown
_VERSIONS = ("onnxruntime", "torch", "onnx")


def inspect_bundle(folder: str | Path) -> Inspection:
    """What a bundle says of itself, and whether it would be run here; hashes are not computed, and no runtime is loaded.

    Raises:
        FormatError: its manifest is broken.
    """
    bundle = read_bundle(folder)
    manifest = bundle.manifest
    sizes = [noted["size"] for noted in manifest.files.values()]
    if not all(0 <= size <= _LARGEST for size in (*sizes, sum(sizes), manifest.context)):
        raise FormatError(f"{bundle.folder}: its manifest has sizes that cannot be; fetch or export the bundle again")
    versions = {name: manifest.versions[name] for name in _VERSIONS if name in manifest.versions}
    facts: dict[str, Any] = {
        "kind": manifest.kind,
        "runs_in": KINDS[manifest.kind].about,
        "weights": manifest.weights[:300],
        "bytes": sum(sizes),
        "graph": manifest.graph[:200],
        "context": manifest.context,
        "prefix": manifest.prefix_length,
        "device": manifest.device[:40],
        "isa": manifest.isa[:400],
        "made_with": {"arriero": manifest.arriero[:40]} | {name: str(text)[:40] for name, text in versions.items()},
        "check": check_words(manifest.kind, manifest.check),
        "unusable": _refusal(bundle),
    }
    return Inspection(bundle.folder, "bundle of arriero export", {"bundle": facts, **_model(bundle)})


def _refusal(bundle: Bundle) -> str | None:
    """Why it would not be run here."""
    try:
        check_machine(bundle)
        check_files(bundle)
    except FormatError as error:
        return str(error).removeprefix(f"{bundle.folder}: ")[:500]
    kind = KINDS[bundle.manifest.kind]
    return None if kind.opener else f"{bundle.manifest.graph[:200]} is for {kind.about}"


def _model(bundle: Bundle) -> dict[str, Any]:
    try:
        with refused_values(bundle.folder):
            config = LlamaConfig.from_dict(bundle.manifest.config, source="the manifest's configuration")
            facts = {"architecture": config.model_type, "parameters": config.num_parameters(), **shape_facts(config)}
    except FormatError as error:
        facts = {"architecture": "unknown", "not_supported": str(error)[:400]}
    return facts | tokenizer_facts(bundle.folder)


def check_words(kind: str, check: Mapping[str, Any]) -> str:
    """What the comparison with the model found when it was exported, in words."""
    try:
        if kind == "gguf":
            logits = check["logits"]
            return (
                f"{check['rounded']:d} of {check['tensors']:d} tensors rounded, by at most {check['largest']:.1e} of their norm"
                + (f"; logits differ by at most {logits[0]:.1e}" if logits else "")
            )[:300]
        return (
            f"logits differ by at most {check['largest_difference']:.1e} (the largest is {check['largest_logit']:.1f}) with "
            f"the stored weights, by {check['original_difference']:.1e} of their norm with the original ones; of "
            f"{check['tokens']:d} likeliest tokens {check['original_agreement']:.1%} are the same"
        )[:300]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return "not noted"
