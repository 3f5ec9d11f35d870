"""From a finished model folder, adapter folder or GGUF file to a repository of the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arriero.errors import ConfigError, FormatError
from arriero.formats.hub_errors import hub_errors
from arriero.formats.hub_files import HUB_ID
from arriero.formats.model_card import CARD, base_model, model_card
from arriero.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from arriero.formats.safe_tensors import INDEX_FILE, SINGLE_FILE, WEIGHT_FILES, weight_files
from arriero.formats.side_files import ROUNDING_FILES
from arriero.formats.tensor_shards import is_sharded

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What belongs to a published model beside its weights. Never by itself: optimizer states, checkpoints, logs, data.
SIDE_FILES = ["config.json", "generation_config.json", "tokenizer*.json", "*.model", "special_tokens_map.json"]
SIDE_FILES += [
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
    CARD,
    *ROUNDING_FILES,
]

Kind = Literal["model", "adapter", "gguf"]


@dataclass(frozen=True)
class Parcel:
    """What goes to the Hub.

    Attributes:
        kind: what it is.
        files: name in the repository -> file here.
        size: bytes of all of them.
    """

    kind: Kind
    files: dict[str, Path]

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def collect(path: Path, include: tuple[str, ...] = ()) -> Parcel:
    """The files of a model folder, an adapter folder or a GGUF file that are published.

    Args:
        path: the folder or file.
        include: patterns of further files of the folder, such as `logs/*.jsonl`.

    Raises:
        FormatError: it is none of these, or not whole.
        ConfigError: a pattern matches no file, or leads out of the folder.
    """
    if path.is_file() and path.suffix.lower() == ".gguf":
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise FormatError(f"{path}: is no GGUF file, in spite of its name")
        return Parcel("gguf", {path.name: path})
    if not path.is_dir():
        raise FormatError(f"{path}: is neither a folder nor a .gguf file; give what is to be uploaded")
    files = {}
    kind: Kind = "model"
    if is_adapter(path):
        kind = "adapter"
        weights = [path / ADAPTER_WEIGHTS]
        if not weights[0].is_file():
            raise FormatError(f"{path}: has {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}; this adapter is not whole")
        files[ADAPTER_CONFIG] = path / ADAPTER_CONFIG
    else:
        weights = _model_weights(path)
        if weights != [path / SINGLE_FILE]:
            files[INDEX_FILE] = path / INDEX_FILE
    files |= {file.name: file for file in weights}
    side = [entry for entry in path.iterdir() if any(fnmatchcase(entry.name, pattern) for pattern in SIDE_FILES)]
    side += path.glob("additional_chat_templates/*.jinja")
    files |= {entry.relative_to(path).as_posix(): entry for entry in side if entry.is_file()}
    for pattern in include:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise ConfigError(f"--include {pattern}: leads out of {path}; give patterns of files in it")
        found = [entry for entry in path.glob(pattern) if entry.is_file()]
        if not found:
            raise ConfigError(f"--include {pattern}: matches no file of {path}")
        files |= {entry.relative_to(path).as_posix(): entry for entry in found}
    return Parcel(kind, dict(sorted(files.items())))


def _model_weights(folder: Path) -> list[Path]:
    if is_sharded(folder):
        raise FormatError(f"{folder}: holds one weight file a process; join them first: `arriero merge`")
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder}: has neither config.json nor {ADAPTER_CONFIG}; this is no model and no adapter")
    return weight_files(folder)  # raises when a shard is missing


def upload(
    path: Path,
    hub_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    include: tuple[str, ...] = (),
    report: Callable[[str], None],
) -> str:
    """Publish a model, an adapter or a GGUF file, in one commit.

    The repository is made when it is not there. Files that it has already are not sent again, so a broken upload goes on.
    A model card is added when there is none here and none on the Hub.

    Args:
        path: a model folder, an adapter folder or a .gguf file; nothing is written to it.
        hub_id: `owner/name`.
        private: make the repository private; refused when it exists and is public.
        revision: the branch; made when it is not there. Default: main.
        commit_message: default: what is uploaded.
        create_pr: ask for the change in a pull request; the repository must be there.
        license: for the model card, as the Hub names it (apache-2.0, llama3.2, ...); default: known from the licence file.
        include: patterns of further files of the folder.
        report: told what will be sent where, one line at a time.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        ConfigError: a wrong name, or no token.
        FormatError: what is there is not whole, the token has no right, or the upload fails.
    """
    parcel = collect(path, include)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    there = check_upload(hub_id, private=private, revision=revision)
    if there is None and create_pr:
        raise FormatError(f"{hub_id}: is not on the Hub; --create_pr needs a repository to ask")
    api = HfApi()
    with hub_errors(hub_id, "upload", "run it again, files that have arrived are not sent twice"):
        hidden = private if there is None else bool(there.private)
        report(f"{hub_id}: {_summary(parcel)}; {'private' if hidden else 'public'}{', new' if there is None else ''}")
        for name, file in parcel.files.items():
            report(f"  {name}  {_size(file.stat().st_size)}")
        if parcel.kind == "adapter" and base_model(parcel.files) is None:
            report(f"  note: {ADAPTER_CONFIG} names a base that is not on the Hub; tell others which one it needs")
        operations: list[Any] = [CommitOperationAdd(name, str(file)) for name, file in parcel.files.items()]
        on_hub = {sibling.rfilename for sibling in there.siblings or ()} if there is not None else set()
        if parcel.kind == "model":  # a file of the model that was there would be read in place of the new shards
            stale = sorted(
                name for name in on_hub - set(parcel.files) if any(fnmatchcase(name, old) for old in WEIGHT_FILES)
            )
            operations += [CommitOperationDelete(name) for name in stale]
            for name in stale:
                report(f"  {name}  removed: weights of the version before")
        if CARD not in parcel.files and CARD not in on_hub:
            card = model_card(hub_id, parcel.kind, parcel.files, license)
            operations.append(CommitOperationAdd(CARD, card.encode()))
            report(f"  {CARD}  a minimal model card, as there is none")
        if there is None:
            api.create_repo(hub_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(hub_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            hub_id,
            operations,
            commit_message=commit_message or f"Upload {parcel.kind} {path.resolve().name}",
            revision=revision,
            create_pr=create_pr,
        )
        return str(commit.pr_url or commit.commit_url)


def check_upload(hub_id: str, *, private: bool = False, revision: str | None = None) -> Any:
    """Find out, before anything is sent or made, whether an upload can work.

    Returns:
        What the Hub says of the repository (`huggingface_hub.ModelInfo`); None: it is not there yet.

    Raises:
        ConfigError: a wrong name, no token, or a public repository for what shall be private.
        FormatError: the token is not accepted or may only read, or the Hub cannot be reached.
    """
    if not HUB_ID.fullmatch(hub_id):
        raise ConfigError(f"{hub_id}: is no Hub id; write owner/name")
    from huggingface_hub import HfApi, constants, get_token

    tokens = f"{constants.ENDPOINT}/settings/tokens"
    if get_token() is None:
        raise ConfigError(
            f"{hub_id}: an upload needs a token; set HF_TOKEN or run `hf auth login` (one with the right to write: {tokens})"
        )
    api = HfApi()
    with hub_errors(hub_id, "upload", "run it again"):
        about = api.whoami()
        token = about.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise FormatError(
                f"{hub_id}: the token {token.get('displayName', '')!r} of {about.get('name')} may only read; make one with "
                f"the right to write: {tokens}"
            )
        there = _existing(api, hub_id, revision)
    if there is not None and private and not there.private:
        raise ConfigError(f"{hub_id}: is public on the Hub already; --private would not hide what is uploaded")
    return there


def _existing(api: HfApi, hub_id: str, revision: str | None) -> Any:
    """What the Hub says of the repository at the revision, or at main where that has none; None: it is not there."""
    from huggingface_hub import errors

    try:
        return api.model_info(hub_id, revision=revision)
    except errors.GatedRepoError:
        raise
    except errors.RevisionNotFoundError:
        return api.model_info(hub_id)
    except errors.RepositoryNotFoundError:
        return None


def _summary(parcel: Parcel) -> str:
    files = "1 file" if len(parcel.files) == 1 else f"{len(parcel.files)} files"
    return f"{'a GGUF model' if parcel.kind == 'gguf' else f'the {parcel.kind}'}, {files}, {_size(parcel.size)}"


def _size(count: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {unit}"
    return f"{count} bytes"
