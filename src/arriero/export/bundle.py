"""A bundle: a folder with a model, all that runs it, and a manifest that says so.

```text
inference/
  manifest.json        what is here: kind, versions, sizes and hashes, configuration, defaults, numbers of the check
  model.onnx           the graph; names beside it what the kind needs
  weights.bin          its weights, to be mapped
  config.json, tokenizer files, chat template, generation_config.json, licence
```

A bundle is opened with every check before a runtime sees a byte of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import stat
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arriero import __version__
from arriero.errors import FormatError
from arriero.formats.json_file import read_json_object
from arriero.formats.receipt import sha256_of
from arriero.formats.staging import staged_folder

MANIFEST = "manifest.json"
FORMAT = 1
ANY = "any"
MAX_FILES = 10_000
# The package that runs each kind.
RUNTIMES = {"onnx": "onnxruntime"}


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        kind: one of `RUNTIMES`.
        graph: the file that the runtime loads.
        weights: how they are stored, in words.
        context: tokens of a sequence, the prompt's included.
        config: of the model, as config.json has it.
        generation: defaults of answers, as generation_config.json has them.
        check: numbers of the comparison with the model that it was made from.
        versions: of the packages that made it.
        device, isa: that it is made for; "any" for every instruction set.
        files: size and SHA-256 of every other file, by name.
        format: of the manifest.
        arriero: the version that wrote it.
    """

    kind: str
    graph: str
    weights: str
    context: int
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    check: Mapping[str, Any]
    versions: Mapping[str, str]
    device: str = "cpu"
    isa: str = ANY
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    format: int = FORMAT
    arriero: str = __version__


@dataclass(frozen=True)
class Bundle:
    """A checked bundle."""

    folder: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        """The file that the runtime loads."""
        return self.folder / self.manifest.graph


def new_bundle(folder: str | Path) -> AbstractContextManager[Path]:
    """A staging folder whose files become the bundle, as a whole or not at all; an older bundle in its place is replaced.

    Raises:
        FormatError: if the folder holds anything else, or cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not _is_bundle(folder):
        raise FormatError(f"{folder}: holds other files, and a bundle has its folder for itself; choose another place")
    return staged_folder(folder, replaces=("*",))


def _is_bundle(folder: Path) -> bool:
    try:
        values = read_json_object(folder / MANIFEST, "")
    except FormatError:
        return False
    return values.get("kind") in RUNTIMES and isinstance(values.get("files"), dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder whose other files are complete; `files` is filled in.

    Raises:
        OSError: when it cannot be written.
    """
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    values = asdict(manifest) | {"files": files}
    (folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def open_bundle(folder: str | Path) -> Bundle:
    """Check a bundle: the manifest, this machine, and every file.

    Raises:
        FormatError: the first thing that is not as it should be, and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: is not a folder; a bundle is one (see `arriero export --help`)")
    values = read_json_object(folder / MANIFEST, "a bundle has one; was the export interrupted?")
    manifest = _read_manifest(values, folder / MANIFEST)
    _check_machine(manifest, folder)
    _check_files(manifest, folder)
    return Bundle(folder, manifest)


def _read_manifest(values: dict[str, Any], path: Path) -> Manifest:
    form = values.get("format")
    if form != FORMAT:
        raise FormatError(
            f"{path}: is of format {str(form)[:40]}, and this version of arriero reads {FORMAT}: "
            f"export the model again, or use the arriero that wrote it ({str(values.get('arriero'))[:40]})"
        )
    kind = values.get("kind")
    if kind not in RUNTIMES:
        raise FormatError(f"{path}: the kind {str(kind)[:40]!r} is not known; known are {', '.join(RUNTIMES)}")
    texts = ("kind", "graph", "weights", "device", "isa", "arriero")
    objects = ("config", "generation", "check", "versions", "files")
    for key in (*texts, *objects, "context"):
        wanted = str if key in texts else dict if key in objects else int
        if not isinstance(values.get(key), wanted) or isinstance(values[key], bool):
            raise FormatError(f"{path}: {key} must be a {_WORDS[wanted]}; export the model again")
    for name, noted in values["files"].items():
        if not _is_plain(name):
            raise FormatError(f"{path}: names the file {name[:100]!r}; only plain names of files beside it are allowed")
        if (
            not isinstance(noted, dict)
            or not isinstance(noted.get("size"), int)
            or not isinstance(noted.get("sha256"), str)
        ):
            raise FormatError(f"{path}: lacks the size or SHA-256 of {name}; export the model again")
    if values["graph"] not in values["files"]:
        raise FormatError(f"{path}: names the graph {values['graph'][:100]!r}, which is not among its files")
    return Manifest(**{key: values[key] for key in (*texts, *objects, "context", "format")})


_WORDS = {str: "text", dict: "JSON object", int: "whole number"}


def _is_plain(name: str) -> bool:
    return (
        name not in ("", ".", "..", MANIFEST)
        and not set(name) & set("/\\\0")
        and len(name.encode("utf-8", "surrogatepass")) <= 255
    )


def _check_machine(manifest: Manifest, folder: Path) -> None:
    """Whether the runtime and the processor are those that the bundle needs."""
    runtime = RUNTIMES[manifest.kind]
    made = manifest.versions.get(runtime)
    if not isinstance(made, str) or _numbers(made) is None:
        raise FormatError(f"{folder}: does not say which version of {runtime} it is made for; export the model again")
    try:
        here = importlib.metadata.version(runtime)
    except importlib.metadata.PackageNotFoundError:
        raise FormatError(
            f"{folder}: needs {runtime} {made}, which is not installed: pip install 'arriero[export]'"
        ) from None
    needed, found = _numbers(made), _numbers(here)
    assert needed is not None
    if found is None or found[0] != needed[0] or found < needed:
        raise FormatError(
            f"{folder}: is made for {runtime} {made}, and {here} is installed: "
            f"pip install '{runtime}>={made},<{needed[0] + 1}', or export the model again"
        )
    if manifest.isa not in (ANY, platform.machine()):
        raise FormatError(
            f"{folder}: is made for processors of the kind {manifest.isa[:40]}, and this one is {platform.machine()}: "
            "export the model on a machine like this one"
        )


def _numbers(version: str) -> tuple[int, int] | None:
    """Major and minor."""
    parts = version.split(".")
    if len(version) > 40 or len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()):
        return None
    return int(parts[0]), int(parts[1])


def _check_files(manifest: Manifest, folder: Path) -> None:
    """Whether the folder holds the manifest's files, all of them as they were written, and nothing else."""
    again = "fetch or export the bundle again"
    present = set()
    for path in folder.iterdir():
        present.add(path.name)
        if len(present) > MAX_FILES:
            raise FormatError(f"{folder}: has more than {MAX_FILES} files; this is no bundle")
    extra = sorted(present - manifest.files.keys() - {MANIFEST})
    if extra:
        raise FormatError(f"{folder}: {extra[0][:100]} is not part of the bundle; remove it, or {again}")
    for name, noted in manifest.files.items():
        path = folder / name
        try:
            found = path.lstat()
        except OSError:
            raise FormatError(f"{path}: is missing; {again}") from None
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{path}: is no regular file (a link, say), and may lead anywhere; {again}")
        if found.st_size != noted["size"]:
            raise FormatError(f"{path}: has {found.st_size} bytes, and {noted['size']} were written; {again}")
    for name, noted in manifest.files.items():
        try:
            hashed = sha256_of(folder / name)
        except OSError as error:
            raise FormatError(f"{folder / name}: cannot be read ({error.strerror})") from error
        if hashed != noted["sha256"]:
            raise FormatError(f"{folder / name}: is not what was written (its SHA-256 differs); {again}")
