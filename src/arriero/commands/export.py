"""`arriero export`: a bundle that runs without the model's Python code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arriero.config.adapter import AdapterPathOptions
from arriero.config.export import ExportOptions

if TYPE_CHECKING:
    from arriero.export.bundle import Bundle

HELP = "Write a model, with its adapter if it has one, as a bundle that runs without the model's Python code."

OPTIONS: tuple[type, ...] = (ExportOptions, AdapterPathOptions)


def run(export: ExportOptions, adapter: AdapterPathOptions) -> int:
    """Export, check the bundle against the model, and say where it is and what the check gave."""
    from arriero.bundles.exporting import export_bundle

    bundle = export_bundle(export, adapter)
    size = sum(noted["size"] for noted in bundle.manifest.files.values())
    print(f"compared with the model: {_found(bundle)}")
    print(f"{bundle.folder}: {bundle.manifest.kind}, {bundle.manifest.weights}, {size / 1e6:.1f} MB")
    return 0


def _found(bundle: Bundle) -> str:
    """What the comparison found, in words."""
    check = bundle.manifest.check
    if bundle.manifest.kind == "gguf":
        words = (
            f"{check['rounded']} of {check['tensors']} tensors rounded, by at most {check['largest']:.1e} of their norm"
        )
        return words + (f"; logits differ by at most {check['logits'][0]:.1e}" if check["logits"] else "")
    return (
        f"logits differ by at most {check['largest_difference']:.1e} (the largest is {check['largest_logit']:.1f}) with the "
        f"stored weights, by {check['original_difference']:.1e} of their norm with the original ones; of {check['tokens']} "
        f"likeliest tokens {check['original_agreement']:.1%} are the same"
    )
