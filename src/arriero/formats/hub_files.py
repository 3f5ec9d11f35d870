"""The files of a Hub repository, brought here: resumed where a transfer was cut, checked before they are in their place.

The Hub's library makes the cache, its links and its book-keeping. Two things it leaves open are done here first, for every
file that the Hub stores by its SHA-256 (Git LFS: all weights). Its partial files end with the process, so a transfer that
was cut goes on from a partial file of our own; and it compares sizes only, so the hash is compared here. A finished file
then lies where the library looks for it, and is not fetched again.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache as once
from pathlib import Path, PureWindowsPath

from arriero.errors import FormatError
from arriero.formats.hub_errors import hub_errors
from arriero.formats.receipt import sha256_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")  # owner/name
HUB_NOTES = ".cache/huggingface"  # of the Hub's library, in a folder that it filled
_CONNECTION_ERRORS = frozenset({"TransportError", "ConnectionError", "Timeout"})
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        path: its name in the repository, with slashes.
        size: bytes.
        sha256: of the content; None for a small file that is stored in Git itself.
        xet: whether the Hub holds it in chunks that the `hf_xet` package fetches.
    """

    path: str
    size: int
    sha256: str | None
    xet: bool


# From the files of a repository to the patterns of those to bring, or an error when there is nothing of use.
Choose = Callable[[list[HubFile]], list[str]]


def list_files(hub_id: str, revision: str | None) -> tuple[str, list[HubFile]]:
    """The commit that a revision (branch, tag, commit; None: main) stands for, and its files.

    Raises:
        FormatError: the answer is none of a Hub.
        Exception: what the Hub's library raises; see `hub_errors`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = api.model_info(hub_id, revision=revision).sha
    if commit is None:
        raise FormatError(f"{hub_id}: the Hub names no commit of it; this is not a Hub that models can be fetched from")
    files = [
        HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.xet_hash is not None)
        for entry in api.list_repo_tree(hub_id, recursive=True, revision=commit)
        if isinstance(entry, RepoFile)
    ]
    for file in files:
        if file.sha256 is not None and (not _SHA256.fullmatch(file.sha256) or file.size < 0):
            raise FormatError(f"{hub_id}: the Hub lists no valid SHA-256 and size of {file.path}")
    return commit, files


def fetch_files(
    hub_id: str, folder: Path | None, cache: Path | None, revision: str | None, choose: Choose, ignored: list[str]
) -> Path:
    """Bring some files of a repository.

    Without a way to the Hub, what the cache holds of the revision serves, which a line tells; it is copied where a folder is
    given. What the Hub refuses is not served so.

    Args:
        hub_id: `owner/name`.
        folder: where to; None: the cache.
        cache: the cache; None: the Hub's own, shared with other tools.
        revision: branch, tag or commit; None: main.
        choose: given the files, the patterns of those to bring.
        ignored: patterns of files that are not brought, unless a pattern of `choose` names their folder.

    Returns:
        The folder with the files: `folder`, or the commit's in the cache.

    Raises:
        FormatError: the repository is absent, closed to us, without what is needed; or a transfer failed, or what came
            is not what the Hub lists (it is then not kept).
    """
    from huggingface_hub import snapshot_download

    if folder is not None and folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder}: is a file, and a folder is to be written; choose another place")
    with hub_errors(hub_id, "download", "run it again, what has come so far is kept"):
        try:
            commit, files = list_files(hub_id, revision)
        except Exception as error:
            held = _cached(hub_id, cache, revision, choose, ignored) if _is_cut_off(error) else None
            if held is None:
                raise
            _tell_served(hub_id, held[0].name)
            return _copied(*held, folder) if folder is not None else held[0]
        wanted = _wanted(files, choose(files), ignored)
        for file in wanted:
            if not _stays_inside(file.path):
                raise FormatError(
                    f"{hub_id}: has a file {file.path!r}, whose name leads out of its folder; do not trust it"
                )
        places = {file: _Place.of(hub_id, file, folder, cache) for file in wanted if file.sha256 is not None}
        fetched_here = _place_files(hub_id, commit, places)
        found = Path(
            snapshot_download(
                hub_id,
                revision=revision,
                cache_dir=cache,
                local_dir=folder,
                allow_patterns=[_literally(file.path) for file in wanted],
            )
        )
        for file, place in places.items():
            if file not in fetched_here or not place.final.exists() or not place.final.samefile(found / file.path):
                _check(hub_id, file, found / file.path)
        return found


def fetch_file(hub_id: str, name: str, folder: Path | None, cache: Path | None, revision: str | None) -> Path:
    """Bring one file of a repository.

    Args:
        name: its path in the repository.
        hub_id, folder, cache, revision: as for `fetch_files`.

    Raises:
        FormatError: as for `fetch_files`, and when the repository has no such file, naming the nearest.
    """
    from arriero.config.values import nearest

    def choose(files: list[HubFile]) -> list[str]:
        names = [file.path for file in files if _stays_inside(file.path)]
        if not _stays_inside(name):
            raise FormatError(f"{hub_id}: --file {name!r} leads out of its folder; name a file within the repository")
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(sorted(names)[:8])}"
            raise FormatError(f"{hub_id}: has no file {name!r}; {hint}")
        return [_literally(name)]

    return fetch_files(hub_id, folder, cache, revision, choose, []) / name


def _literally(name: str) -> str:
    """The pattern of one file."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _stays_inside(name: str) -> bool:
    """Whether a file's name leads out of a folder on no system."""
    path = PureWindowsPath(name)  # takes both kinds of slashes
    return not path.anchor and ".." not in path.parts and "\\" not in name and "\0" not in name


def _wanted(files: list[HubFile], patterns: list[str], ignored: list[str]) -> list[HubFile]:
    """The files that match; of those that are ignored only what a pattern wants from their very folder."""
    inner = [pattern for pattern in patterns if "/" in pattern]
    return [
        file for file in files if _matches(file, inner) or (_matches(file, patterns) and not _matches(file, ignored))
    ]


def _matches(file: HubFile, patterns: list[str]) -> bool:
    return any(fnmatchcase(file.path, pattern) for pattern in patterns)


def _is_cut_off(error: Exception) -> bool:
    """Whether a call got no answer of the Hub: no connection, a broken one, none in time, or none allowed.

    The HTTP libraries (httpx, httpx2, requests) have these classes each of its own; the Hub's library makes a
    `ConnectionError` of HF_HUB_OFFLINE.
    """
    kinds = {kind.__name__ for found in (error, error.__cause__) for kind in type(found).__mro__}
    return bool(kinds & _CONNECTION_ERRORS)


@once
def _tell_served(hub_id: str, commit: str) -> None:
    """Said once in a process: a verb resolves a name several times."""
    from huggingface_hub import constants

    reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
    print(f"{hub_id}: {reason}; the cache serves commit {commit}", file=sys.stderr, flush=True)


def _cached(
    hub_id: str, cache: Path | None, revision: str | None, choose: Choose, ignored: list[str]
) -> tuple[Path, list[str]] | None:
    """The revision's folder in the cache and the files wanted of it; None when it is not there, incomplete or without what
    is needed."""
    from huggingface_hub import errors, snapshot_download

    def held(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                cache_dir=cache,
                local_files_only=True,
                allow_patterns=patterns,
                ignore_patterns=ignored,
            )
        )

    try:
        folder = held([])
        files = [path for path in folder.rglob("*") if path.is_file()]
        listed = [HubFile(path.relative_to(folder).as_posix(), path.stat().st_size, None, False) for path in files]
        patterns = choose(listed)
        return held(patterns), [
            file.path for file in _wanted(listed, patterns, ignored)
        ]  # which checks that it is complete
    except (FormatError, errors.LocalEntryNotFoundError):
        return None


def _copied(held: Path, names: list[str], folder: Path) -> Path:
    """Copy files of the cache into a folder, each of which appears there whole."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            shutil.copyfile(held / name, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return folder


@dataclass(frozen=True)
class _Place:
    """Where a file goes: what the Hub's library takes for its finished file, a partial file, and a lock for both."""

    final: Path
    partial: Path
    lock: Path
    metadata: Path | None  # what the library noted of the file that was there before

    @classmethod
    def of(cls, hub_id: str, file: HubFile, folder: Path | None, cache: Path | None) -> _Place:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        if folder is not None:
            notes = folder / ".cache" / "huggingface" / "download" / file.path
            partial = notes.with_name(f"{notes.name}.{file.sha256}.incomplete")
            return cls(
                folder / file.path,
                partial,
                notes.with_name(notes.name + ".lock"),
                notes.with_name(notes.name + ".metadata"),
            )
        root = Path(cache or constants.HF_HUB_CACHE).expanduser()
        name = repo_folder_name(repo_id=hub_id, repo_type="model")
        final = root / name / "blobs" / str(file.sha256)
        return cls(
            final, final.with_name(final.name + ".incomplete"), root / ".locks" / name / f"{final.name}.lock", None
        )

    def holds(self, file: HubFile) -> bool:
        """Whether the finished file is there. In the cache its name is its hash; in a plain folder it is read."""
        if not self.final.is_file() or self.final.stat().st_size != file.size:
            return False
        return self.metadata is None or sha256_of(self.final) == file.sha256


def _place_files(hub_id: str, commit: str, places: dict[HubFile, _Place]) -> set[HubFile]:
    """Fetch what is not there yet.

    Returns:
        The files that are now in their place and have been checked. The others are left to the Hub's library, as the Hub
        holds them in chunks (Xet).
    """
    from huggingface_hub.file_download import is_xet_available  # type: ignore[attr-defined]

    there = {file for file, place in places.items() if place.holds(file)}
    plain = [file for file in places if file not in there and not (file.xet and is_xet_available())]
    for file in places.keys() - there - set(plain):
        places[file].final.unlink(missing_ok=True)  # another content, which the library would keep for its name
    for file in plain:
        _transfer(hub_id, commit, file, places[file])
    return there | set(plain)


def _transfer(hub_id: str, commit: str, file: HubFile, place: _Place) -> None:
    """Fetch a file, or the rest of it after its partial file, check it and put it into its place."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

    for path in (place.final, place.partial, place.lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(place.lock):
        if place.holds(file):  # by another process
            return
        with place.partial.open("ab") as out:
            if out.tell() > file.size:
                out.truncate(0)
            # Sends the token to the Hub alone: a redirect to another host goes without it.
            http_get(
                hf_hub_url(hub_id, file.path, revision=commit),
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.path,
            )
        _check(hub_id, file, place.partial)
        if place.metadata is not None:
            place.metadata.unlink(missing_ok=True)
        os.replace(place.partial, place.final)


def _check(hub_id: str, file: HubFile, path: Path) -> None:
    """Compare a file that has come with what the Hub lists, and remove it if it is another.

    Raises:
        FormatError: it is another.
    """
    size = path.stat().st_size
    found = sha256_of(path) if size == file.size else f"{size} bytes"
    if found != file.sha256:
        target = path.resolve()
        path.unlink()
        target.unlink(missing_ok=True)
        listed = f"SHA-256 {file.sha256}" if size == file.size else f"{file.size} bytes"
        raise FormatError(
            f"{hub_id}: {file.path} came as {found}, but the Hub lists {listed}; it was removed, run it again"
        )
