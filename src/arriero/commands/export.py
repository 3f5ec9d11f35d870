"""`arriero export`: a bundle that runs without the model's Python code."""

from __future__ import annotations

from pathlib import Path

from arriero.commands.next_command import tell_next
from arriero.config.adapter import AdapterPathOptions
from arriero.config.export import ExportOptions

HELP = "Write a model, with its adapter if it has one, as a bundle that runs without the model's Python code."

OPTIONS: tuple[type, ...] = (ExportOptions, AdapterPathOptions)


def run(export: ExportOptions, adapter: AdapterPathOptions) -> int:
    """Export, check the bundle against the model, and say where it is and what the check gave."""
    from arriero.bundles.exporting import export_bundle
    from arriero.bundles.inspecting import check_words
    from arriero.export.kinds import RUNNABLE
    from arriero.formats.bundle_folder import is_bundle

    older = is_bundle(Path(export.output_path))
    bundle = export_bundle(export, adapter)
    size = sum(noted["size"] for noted in bundle.manifest.files.values())
    print(f"compared with the model: {check_words(bundle.manifest.kind, bundle.manifest.check)}")
    instead = ", in place of the bundle that was there" if older else ""
    print(f"{bundle.folder}: {bundle.manifest.kind}, {bundle.manifest.weights}, {size / 1e6:.1f} MB{instead}")
    if bundle.manifest.kind in RUNNABLE:
        tell_next("chat", bundle.folder)
    return 0
