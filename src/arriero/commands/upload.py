"""`arriero upload`: a model folder, an adapter folder or a GGUF file to the Hugging Face Hub."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from arriero.config.option import REQUIRED, OptionGroup, option

HELP = "Publish a model folder, an adapter folder or a .gguf file on the Hugging Face Hub; prints the commit's address."


@dataclass(kw_only=True)
class UploadOptions(OptionGroup):
    """Upload."""

    path: str = option(REQUIRED, "a model folder, an adapter folder or a .gguf file", positional=True)
    hub_model_id: str = option(REQUIRED, "the repository: owner/name", positional=True)
    private: bool = option(False, "make the new repository private")
    revision: str | None = option(None, "the branch (default: main); made when it is not there")
    commit_message: str | None = option(None, "the commit's title")
    create_pr: bool = option(False, "ask for the change in a pull request")
    license: str | None = option(
        None, "for the model card, as the Hub names it, e.g. apache-2.0 (default: told from the licence file)"
    )
    include: list[str] = option([], "patterns of further files of the folder, e.g. 'logs/*.jsonl'")


OPTIONS: tuple[type, ...] = (UploadOptions,)


def run(options: UploadOptions) -> int:
    """Upload and print the commit's (or pull request's) address."""
    from arriero.formats.upload import upload

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    url = upload(
        Path(os.path.expanduser(options.path)),
        options.hub_model_id,
        private=options.private,
        revision=options.revision,
        commit_message=options.commit_message,
        create_pr=options.create_pr,
        license=options.license,
        include=tuple(options.include),
        report=report,
    )
    print(url)
    return 0
