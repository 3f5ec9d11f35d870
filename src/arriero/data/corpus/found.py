"""Which corpora `--input_dir` names, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from arriero.data.corpus.token_files import SUFFIXES, corpus_kinds
from arriero.errors import ConfigError, DataError


def find_corpora(input_dir: Sequence[str]) -> list[tuple[float, Path]]:
    """(weight, prefix) of every corpus, the weights summing to 1.

    An item is a folder (every corpus in it, by name), a prefix, or both with weights before them: "0.7 a 0.3 b". Items
    are joined, so `["0.7 a", "0.3 b"]` and `["0.7", "a", "0.3", "b"]` mean the same. A name may hold blanks if it is an
    item of its own, with or without the weight before it. The weight of a folder is shared equally by its corpora;
    without weights all corpora get the same.

    Raises:
        ConfigError: for a weight that is not a positive number, that is missing or has no corpus after it.
        DataError: if there is no corpus, or one is named twice.
    """
    weighted: list[tuple[float | None, str]] = []
    pending: str | None = None
    for item in input_dir:
        for word in _words(item):
            if not _is_number(word) or _exists(word):
                weighted.append((_weight(pending), word))
                pending = None
            elif pending is None:
                pending = word
            else:
                raise _no_corpus_after(pending)
    if pending is not None:
        raise _no_corpus_after(pending)
    if not weighted:
        raise ConfigError("--input_dir is empty: name a folder or the prefix of a corpus")
    given = [weight is not None for weight, _ in weighted]
    if any(given) and not all(given):
        name = weighted[given.index(False)][1]
        raise ConfigError(f"--input_dir: {name} has no weight but others have one: give all of them a weight, or none")
    found: list[tuple[float, Path]] = []
    for weight, name in weighted:
        prefixes = _prefixes(name)
        found += [(1.0 if weight is None else weight / len(prefixes), prefix) for prefix in prefixes]
    places = [prefix.resolve() for _, prefix in found]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise DataError(f"--input_dir names {found[i][1]} twice: name it once, with the sum of the weights")
    total = math.fsum(weight for weight, _ in found)
    return [(weight / total, prefix) for weight, prefix in found]


def _words(item: str) -> list[str]:
    """An item as names and weights: as a whole if that is a name, a weight and a name, or else every word of it."""
    if _exists(item):
        return [item]
    first, _, rest = item.strip().partition(" ")
    if _is_number(first) and _exists(rest.strip()):
        return [first, rest.strip()]
    return item.split()


def _exists(name: str) -> bool:
    return bool(name) and (Path(name).is_dir() or bool(corpus_kinds(_without_suffix(name))))


def _without_suffix(name: str) -> Path:
    """A prefix; the name of one of its files stands for it."""
    for suffix in SUFFIXES:
        if name.endswith(suffix) and Path(name).is_file():
            return Path(name[: -len(suffix)])
    return Path(name)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _no_corpus_after(weight: str) -> ConfigError:
    return ConfigError(f"--input_dir: the weight {weight} has no corpus after it: write weight, corpus, weight, corpus")


def _weight(word: str | None) -> float | None:
    if word is None:
        return None
    weight = float(word)
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"--input_dir: the weight {word} must be a number above 0 (leave a corpus of weight 0 out)")
    return weight


def _prefixes(name: str) -> list[Path]:
    folder = Path(name)
    prefix = _without_suffix(name)
    if corpus_kinds(prefix):
        return [prefix]
    if not folder.is_dir():
        raise DataError(
            f"{name}: no corpus there: neither a folder nor {name}_ids.npy, {name}_idx.npz or {name}.bin, .idx"
        )
    try:
        files = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    names = {file[: -len(suffix)] for file in files for suffix in SUFFIXES if file.endswith(suffix)}
    if not names:
        raise DataError(f"{folder}: holds no corpus (NAME_ids.npy with NAME_idx.npz, or NAME.bin with NAME.idx)")
    return [folder / prefix_name for prefix_name in sorted(names)]
