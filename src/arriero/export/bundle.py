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
from arriero.export.kinds import KINDS, Kind
from arriero.export.processor import lacks
from arriero.formats.bundle_folder import MANIFEST as MANIFEST
from arriero.formats.bundle_folder import is_bundle as is_bundle
from arriero.formats.json_file import read_json_object
from arriero.formats.receipt import sha256_of
from arriero.formats.staging import staged_folder

FORMAT = 1
ANY = "any"
MAX_FILES = 10_000


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        kind: one of `KINDS`.
        graph: the file that the runtime loads.
        weights: how they are stored, in words.
        context: tokens of a sequence, the prompt's included.
        config: of the model, as config.json has it.
        generation: defaults of answers, as generation_config.json has them.
        check: numbers of the comparison with the model that it was made from, and with its own numbers in fp64.
        versions: of the packages that made it.
        device, isa: that it is made for; "any" for all.
        prefix_length: places that a learned prefix takes at the start of every sequence.
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
    prefix_length: int = 0
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
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if present - _names(folder):
        raise FormatError(
            f"{folder}: holds other files ({min(present - _names(folder))[:100]}), and a bundle has its folder for itself; "
            "choose another place"
        )
    return staged_folder(folder, replaces=("*",))


def _names(folder: Path) -> set[str]:
    """The files that a bundle in a folder says are its own, and its manifest; none where there is no bundle."""
    try:
        values = read_json_object(folder / MANIFEST, "")
    except FormatError:
        return set()
    files = values.get("files")
    return {*files, MANIFEST} if _is_known(values.get("kind")) and isinstance(files, dict) else set()


def _is_known(kind: object) -> bool:
    return isinstance(kind, str) and kind in KINDS


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder whose other files are complete; `files` is filled in.

    Raises:
        OSError: when it cannot be written.
        FormatError: a number of the model's files is none (NaN, Infinity), which JSON does not have.
    """
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    values = asdict(manifest) | {"files": files}
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except ValueError as error:
        raise FormatError(
            "config.json or generation_config.json of the model has NaN or Infinity as a number, which JSON does not have: "
            "correct it"
        ) from error
    (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")


def open_bundle(folder: str | Path) -> Bundle:
    """Check a bundle: the manifest, this machine, and every file.

    Raises:
        FormatError: the first thing that is not as it should be, and what to do.
    """
    bundle = read_bundle(folder)
    check_machine(bundle)
    check_files(bundle)
    _check_hashes(bundle.manifest, bundle.folder)
    return bundle


def read_bundle(folder: str | Path) -> Bundle:
    """What a bundle says of itself; nothing but its manifest is looked at, and nothing that it says is checked.

    Raises:
        FormatError: when that is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: is not a folder; a bundle is one (see `arriero export --help`)")
    refuse_model(folder)
    values = read_json_object(folder / MANIFEST, "a bundle has one; was the export interrupted?")
    return Bundle(folder, _read_manifest(values, folder / MANIFEST))


def refuse_model(folder: Path) -> None:
    """
    Raises:
        FormatError: the folder is a model's, which a bundle can be made of.
    """
    if (
        not (folder / MANIFEST).exists()
        and (folder / "config.json").is_file()
        and any(folder.glob("model*.safetensors"))
    ):
        raise FormatError(
            f"{folder}: is a model and no bundle: make one with `arriero export --model_path {folder} --output_path "
            f"inference/llama`, or ask the model itself with `arriero chat {folder}`"
        )


def _read_manifest(values: dict[str, Any], path: Path) -> Manifest:
    form = values.get("format")
    if form != FORMAT:
        raise FormatError(
            f"{path}: is of format {str(form)[:40]}, and this version of arriero reads {FORMAT}: "
            f"export the model again, or use the arriero that wrote it ({str(values.get('arriero'))[:40]})"
        )
    kind = values.get("kind")
    if not _is_known(kind):
        raise FormatError(f"{path}: the kind {str(kind)[:40]!r} is not known; known are {', '.join(KINDS)}")
    texts = ("kind", "graph", "weights", "device", "isa", "arriero")
    objects = ("config", "generation", "check", "versions", "files")
    numbers = ("context", "prefix_length")
    for key in (*texts, *objects, *numbers):
        wanted = str if key in texts else dict if key in objects else int
        if not isinstance(values.get(key), wanted) or isinstance(values[key], bool):
            raise FormatError(f"{path}: {key} must be a {_WORDS[wanted]}; export the model again")
    if not 0 <= values["prefix_length"] < values["context"]:
        raise FormatError(
            f"{path}: a prefix of {values['prefix_length']} and a context of {values['context']} cannot be; "
            "export the model again"
        )
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
    return Manifest(**{key: values[key] for key in (*texts, *objects, *numbers, "format")})


_WORDS = {str: "text", dict: "JSON object", int: "whole number"}


def _is_plain(name: str) -> bool:
    return (
        name not in ("", ".", "..", MANIFEST)
        and not set(name) & set("/\\\0")
        and not any("\ud800" <= character <= "\udfff" for character in name)
        and len(name.encode()) <= 255
    )


def check_machine(bundle: Bundle) -> None:
    """
    Raises:
        FormatError: the runtime, the processor or the GPU is not what it needs.
    """
    manifest, folder = bundle.manifest, bundle.folder
    kind = KINDS[manifest.kind]
    if kind.runtime is not None:
        _check_runtime(manifest, folder, kind.runtime, kind)
    if manifest.device not in kind.devices:
        raise FormatError(
            f"{folder}: is made for {manifest.device[:40]!r}, and {manifest.kind} bundles run on {' or '.join(kind.devices)}; "
            "export the model again"
        )
    lacking = None if manifest.isa == ANY else lacks(manifest.isa)
    if lacking is not None:
        raise FormatError(
            f"{folder}: is made for another processor: it needs {lacking}, which this one ({platform.machine()}) is not or has "
            "not; export the model on a machine like this one"
        )
    if manifest.device == "cuda":
        from arriero.export.torch_target import check_gpus

        check_gpus(bundle)


def _check_runtime(manifest: Manifest, folder: Path, runtime: str, kind: Kind) -> None:
    made = manifest.versions.get(runtime)
    if not isinstance(made, str) or _numbers(made) is None:
        raise FormatError(f"{folder}: does not say which version of {runtime} it is made for; export the model again")
    try:
        here = importlib.metadata.version(runtime)
    except importlib.metadata.PackageNotFoundError:
        raise FormatError(
            f"{folder}: needs {runtime} {made}, which is not installed: pip install 'arriero[{kind.extra}]'"
        ) from None
    needed, found = _numbers(made), _numbers(here)
    assert needed is not None
    if kind.same_version and found != needed:
        raise FormatError(
            f"{folder}: is made for {runtime} {made}, and {here} is installed: "
            f"pip install '{runtime}=={needed[0]}.{needed[1]}.*', or export the model again"
        )
    if found is None or found[0] != needed[0] or found < needed:
        raise FormatError(
            f"{folder}: is made for {runtime} {made}, and {here} is installed: "
            f"pip install '{runtime}>={made},<{needed[0] + 1}', or export the model again"
        )


def _numbers(version: str) -> tuple[int, int] | None:
    """Major and minor."""
    parts = version.split(".")
    if len(version) > 40 or len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()):
        return None
    return int(parts[0]), int(parts[1])


_AGAIN = "fetch or export the bundle again"


def check_files(bundle: Bundle) -> None:
    """
    Raises:
        FormatError: the folder does not hold the manifest's files, each of its size, and nothing else.
    """
    manifest, folder, again = bundle.manifest, bundle.folder, _AGAIN
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


def _check_hashes(manifest: Manifest, folder: Path) -> None:
    """Whether the files are those that were written."""
    for name, noted in manifest.files.items():
        try:
            hashed = sha256_of(folder / name)
        except OSError as error:
            raise FormatError(f"{folder / name}: cannot be read ({error.strerror})") from error
        if hashed != noted["sha256"]:
            raise FormatError(f"{folder / name}: is not what was written (its SHA-256 differs); {_AGAIN}")
