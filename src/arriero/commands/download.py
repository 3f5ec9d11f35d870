"""`arriero download`: a named or Hub model, or the one that pip ships, into a local folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from arriero.config.option import REQUIRED, OptionGroup, option

HELP = "Bring a named or Hub model into a local folder; prints the folder."


@dataclass(kw_only=True)
class DownloadOptions(OptionGroup):
    """Download."""

    model_name_or_path: str = option(
        REQUIRED,
        "a named model (smollm2-135m-instruct, llama-3.2-1b, ...) or a Hugging Face Hub id",
        aliases=("model",),
        positional=True,
    )
    file: str | None = option(None, "one file of a Hub repository alone, such as a .gguf; prints the file")
    output_dir: str | None = option(None, "folder to put it into (default: the cache)")
    revision: str | None = option(None, "branch, tag or commit of a Hub model")
    cache_dir: str | None = option(
        None, "where downloaded models are kept (default: $ARRIERO_HOME or ~/.cache/arriero)"
    )


OPTIONS: tuple[type, ...] = (DownloadOptions,)


def run(options: DownloadOptions) -> int:
    """Fetch the model and print its folder."""
    from arriero.errors import ConfigError
    from arriero.formats.download import fetch_hub_file, fetch_model

    name = options.model_name_or_path
    if Path(os.path.expanduser(name)).is_dir():
        raise ConfigError(f"{name}: is a folder on this machine already; there is nothing to download")
    folder = Path(options.output_dir).expanduser() if options.output_dir else None
    cache_dir = Path(options.cache_dir).expanduser() if options.cache_dir else None
    if options.file is not None:
        print(fetch_hub_file(name, options.file, folder, cache_dir, options.revision))
    else:
        print(fetch_model(name, folder=folder, cache_dir=cache_dir, revision=options.revision))
    return 0
