"""`arriero inspect`: what a file or folder is, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.commands.terminal import printable
from arriero.config.option import REQUIRED, OptionGroup, option

if TYPE_CHECKING:
    from arriero.engine.inspection import Inspection
    from arriero.formats.stored_tensors import StoredTensor

HELP = "Tell what a model, bundle, adapter, tokenizer, corpus or file of tensors is, from headers alone."

_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNTS = ("", "K", "M", "B", "T")
_SHOWN = 20


@dataclass(kw_only=True)
class InspectOptions(OptionGroup):
    """What to look at."""

    path: str = option(
        REQUIRED,
        "a model or adapter of any format, a bundle, a run or checkpoint, a tokenizer, a corpus, a file of tensors; or a named "
        "model",
        aliases=("model_name_or_path", "model", "input"),
        positional=True,
    )
    tensors: bool = option(False, "list every tensor: name, shape, type, size")
    json: bool = option(False, "print JSON")
    cache_dir: str | None = option(
        None, "where downloaded models are kept (default: $ARRIERO_HOME or ~/.cache/arriero)"
    )


OPTIONS: tuple[type, ...] = (InspectOptions,)


def run(options: InspectOptions) -> int:
    """Print what is known."""
    from arriero.bundles.inspecting import inspect_bundle
    from arriero.engine.inspection import as_json, inspect
    from arriero.formats.bundle_folder import is_bundle

    path = _path(options)
    found = inspect_bundle(path) if is_bundle(path) else inspect(path)
    if options.json:
        print(json_text(as_json(found, tensors=options.tensors)))
        return 0
    rows = [("what", found.what), *_rows(found)]
    width = max(len(label) for label, _ in rows)
    lines = [printable(str(found.path)), *(f"  {label:<{width}}  {printable(text)}" for label, text in rows)]
    if options.tensors:
        lines += ["", *(f"  {line}" for line in _table(found.tensors))]
    print("\n".join(lines))
    return 0


def _path(options: InspectOptions) -> Path:
    """A local path as it is (a corpus's prefix too), any other name resolved to a model's folder."""
    path = Path(options.path).expanduser()
    if path.exists() or (
        path.parent != Path(".") and path.parent.is_dir() and any(path.parent.glob(f"{path.name}[_.]*"))
    ):
        return path
    from arriero.formats.download import resolve_model

    return resolve_model(options.path, cache_dir=Path(options.cache_dir).expanduser() if options.cache_dir else None)


def size_text(nbytes: int) -> str:
    """1,234,567 -> "1.23 MB": decimal, three digits."""
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return (
        f"{nbytes} B" if unit == 0 else f"{value:.3g} {_UNITS[unit]}" if value < 100 else f"{value:.0f} {_UNITS[unit]}"
    )


def count_text(count: int) -> str:
    """134,515,008 -> "134,515,008 (135M)"."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_COUNTS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{count:,}" if unit == 0 else f"{count:,} ({value:.3g}{_COUNTS[unit]})"


def json_text(values: Mapping[str, Any]) -> str:
    """JSON in UTF-8, in which every character that would steer a terminal is an escape."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    facts = found.facts
    if "bundle" in facts:
        yield from _bundle_rows(facts["bundle"])
    for label, key in (("name", "name"), ("architecture", "architecture"), ("not supported", "not_supported")):
        if key in facts:
            yield label, str(facts[key])
    yield from _adapter_rows(facts)
    if "parameters" in facts:
        yield "parameters", count_text(facts["parameters"])
    if "misfit" in facts:
        yield "", facts["misfit"]
    yield from _weight_rows(facts)
    yield from _shape_rows(facts)
    yield from _tokenizer_rows(facts)
    if "licence" in facts:
        yield "licence", facts["licence"]
    yield from _training_rows(facts.get("training", {}))
    for corpus in facts.get("corpora", []):
        sizes = f"{count_text(corpus['tokens'])} tokens, {corpus['documents']:,} documents"
        yield Path(corpus["prefix"]).name, f"{sizes}, the longest {corpus['longest_document']:,}, {corpus['dtype']}"


def _bundle_rows(bundle: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "kind", f"{bundle['kind']}, for {bundle['runs_in']}"
    yield "weights", bundle["weights"]
    yield "size", size_text(bundle["bytes"])
    prefix = f", of which a prefix takes {bundle['prefix']:,}" if bundle["prefix"] else ""
    yield "sequences", f"of {bundle['context']:,} tokens{prefix}"
    processor = "any processor" if bundle["isa"] == "any" else bundle["isa"]
    yield "made for", f"{bundle['device']}, {processor}"
    yield "made with", ", ".join(f"{name} {version}" for name, version in bundle["made_with"].items())
    yield "checked", bundle["check"]
    yield "runs here", "yes, if its hashes are right" if bundle["unusable"] is None else f"no: {bundle['unusable']}"


def _adapter_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    adapter = facts.get("adapter")
    if adapter is None:
        return
    yield "method", str(adapter["method"])
    if "tokens" in adapter:
        tokens = adapter["tokens"]
        length = f"{tokens:,} tokens" if isinstance(tokens, int) else f"number of tokens {_number(tokens)}"
        yield "prefix", length + (", made by a network" if adapter["projection"] else "")
    else:
        ranks = adapter["rank"] if isinstance(adapter["rank"], list) else [adapter["rank"]]
        yield "rank", f"{', '.join(map(_number, ranks))}, alpha {_number(adapter['alpha'])}"
        targets = adapter["targets"]
        yield "layers", targets if isinstance(targets, str) else _targets(targets)
    if adapter.get("base"):
        yield "base model", adapter["base"]


def _targets(names: Sequence[str]) -> str:
    """Names of layers or expressions for them; those that differ in the number of the layer alone become one."""
    layers: dict[str, list[int]] = {}
    for name in names:
        parts = name.replace("\\.", ".").removeprefix(".*").removesuffix(".*").split(".")
        at = parts.index("layers") + 1 if "layers" in parts[:-2] else 0
        if at and parts[at].isdecimal() and len(parts[at]) < 6:
            layers.setdefault(parts[-1], []).append(int(parts[at]))
        else:
            layers.setdefault(".".join(parts), [])
    shown = [kind + (f" of layers {_ranges(numbers)}" if numbers else "") for kind, numbers in sorted(layers.items())]
    rest = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return (", ".join(shown[:_SHOWN]) + rest) or "not given"


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2 and 5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " and ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _weight_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "dtypes" not in facts:
        return
    files = facts["files"]
    yield "size", f"{size_text(facts['bytes'])} in " + (files[0] if len(files) == 1 else f"{len(files)} files")
    kinds = facts["dtypes"]
    widths = [max((len(text) for text in column), default=0) for column in zip(*map(_kind, kinds.items()), strict=True)]
    for number, item in enumerate(kinds.items()):
        name, tensors, size = _kind(item)
        text = f"{name:<{widths[0]}}  {tensors:>{widths[1]}}  {size:>{widths[2]}}"
        yield "" if number else "types", text
    if "quantization" in facts:
        yield "quantised", facts["quantization"]


def _kind(item: tuple[str, Mapping[str, int]]) -> tuple[str, str, str]:
    name, kind = item
    return name, f"{kind['tensors']:,} tensor{'s' * (kind['tensors'] != 1)}", size_text(kind["bytes"])


def _shape_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "layers" not in facts:
        return
    yield (
        "layers",
        f"{facts['layers']}, hidden size {facts['hidden_size']:,}, feed-forward {facts['intermediate_size']:,}",
    )
    attention = facts["attention"]
    text = f"{attention['heads']} heads of {attention['head_dim']}, {attention['key_value_heads']} key-value heads"
    if attention["sliding_window"]:
        text += f", window {attention['sliding_window']:,} in {attention['windowed_layers']} layers"
    text += ", with biases" * bool(attention["bias"]) + ", norms of queries and keys" * bool(attention["qk_norm"])
    yield "attention", text
    rope = facts["rope"]
    scaling = dict(rope["scaling"] or {})
    kind = scaling.pop("rope_type", None)
    extra = f", {kind} scaling" + (f" by {_number(scaling['factor'])}" if "factor" in scaling else "") if kind else ""
    yield "positions", f"context of {facts['context']:,} tokens, RoPE theta {_number(rope['theta'])}{extra}"
    yield (
        "vocabulary",
        f"{facts['vocabulary']:,} rows, head " + ("is the embedding" if facts["tied_head"] else "of its own"),
    )


def _tokenizer_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    tokenizer = facts.get("tokenizer")
    if tokenizer is None:
        if "layers" in facts and facts.get("bundle", {}).get("kind") != "gguf":  # a GGUF file has its own
            yield "tokenizer", "missing: copy the tokenizer files of the base model there, for text to be read"
        return
    pre = f" ({tokenizer['pre']})" if "pre" in tokenizer else ""
    yield "tokenizer", f"{tokenizer['kind']}{pre}, {tokenizer['tokens']:,} tokens"
    special = [
        f"{role} {token['text']}" + (f" ({token['id']})" if token["id"] is not None else "")
        for role, token in tokenizer["special"].items()
    ]
    if special:
        yield "", ", ".join(special)
    yield "chat template", "yes" if facts.get("chat_template") else "no"


def _training_rows(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "checkpoints" in training:
        names = training["checkpoints"]
        yield "checkpoints", ", ".join(names) if names else "none kept"
    if "step" in training:
        total = f" of {training['total_steps']:,}" if training.get("total_steps") else ""
        text = f"step {_number(training['step'])}{total}"
        if training.get("tokens"):
            text += f", {count_text(training['tokens'])} tokens"
        if training.get("best_metric") is not None:
            text += f", best metric {training['best_metric']:.4g}"
        yield "training", text
        if training["optimizer_bytes"]:
            yield "optimizer", size_text(training["optimizer_bytes"])


def _number(value: Any) -> str:
    """10000.0 -> "10,000"; words that stand for a number as they are."""
    if value is None:
        return "not given"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)[:40]
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _table(tensors: list[StoredTensor]) -> Iterator[str]:
    rows = [
        (
            printable(tensor.name),
            " x ".join(map(str, tensor.shape)) or "one number",
            tensor.dtype,
            size_text(tensor.nbytes),
        )
        for tensor in tensors
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for name, shape, dtype, size in rows:
        yield f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}"
