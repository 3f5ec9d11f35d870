"""Bundles and the engine together: how a model becomes one (`exporting`), and how one answers (`running`)."""
