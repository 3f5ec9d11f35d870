"""An exported program read as data, and run.

`torch.export.load` is made for files that one trusts: it unpickles what the archive holds of sample inputs and constants,
evaluates expressions of sizes, and calls whatever function of torch a node names. Here one JSON record of the archive is
read, a node may name only an operator of `OPERATORS`, and its arguments are numbers, and values of nodes before it.

The record's format: torch/_export/serde/schema.py.
"""

from __future__ import annotations

import math
import operator
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.json_file import parse_json_object
from arriero.onednn import onednn_is_faster, onednn_product, takes

RECORD = "/models/model.json"
MAX_RECORD_BYTES = 256 * 2**20
SCHEMA = 8  # the major version of the record's format
# Those that `StepProgram` is traced to: none reads or writes beyond its tensors, or touches anything else.
OPERATORS = frozenset(
    [
        "add.Tensor",
        "arange.default",
        "cat.default",
        "chunk.default",
        "clone.default",
        "cos.default",
        "embedding.default",
        "gt.Tensor",
        "index_copy_.default",
        "index_select.default",
        "le.Tensor",
        "linear.default",
        "mul.Tensor",
        "narrow.default",
        "neg.default",
        "permute.default",
        "repeat.default",
        "reshape.default",
        "rms_norm.default",
        "roll.default",
        "scaled_dot_product_attention.default",
        "silu.default",
        "sin.default",
        "slice.Tensor",
        "sub.Tensor",
        "sym_size.int",
        "to.dtype",
        "unsqueeze.default",
        "view.default",
        "where.Scalar",
        "__and__.Tensor",
        "_assert_tensor_metadata.default",
    ]
)
_SIZE = 2**48  # beyond that of any tensor


def _of_sizes(function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """The same, which refuses a result that is no size: chains of products grow without end."""

    def bounded(one: int, other: int) -> int:
        found = function(one, other)
        if not -_SIZE < found < _SIZE:
            raise ValueError(f"a size of {str(found)[:30]}")
        return found

    return bounded


_ARITHMETIC = {
    "_operator.mul": _of_sizes(operator.mul),
    "_operator.add": _of_sizes(operator.add),
    "_operator.floordiv": _of_sizes(operator.floordiv),
}
# Of torch/_export/serde/schema.py, as far as programs use them.
_DTYPES = {5: torch.int64, 6: torch.float16, 7: torch.float32, 12: torch.bool, 13: torch.bfloat16}
_MEMORY_FORMATS = {1: torch.contiguous_format, 4: torch.preserve_format}
_STRIDED = 7
_POSITIONAL = 1


@dataclass(frozen=True)
class _Value:
    """What an input or a node has given.

    Attributes:
        place: among all values.
    """

    place: int


@dataclass(frozen=True)
class _Call:
    """A node.

    Attributes:
        results: places of what it gives.
        several: whether that is a list.
        unneeded: places that nothing reads after it.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    results: tuple[int, ...]
    several: bool
    unneeded: tuple[int, ...]


class TorchGraph:
    """A program of tensors with one result.

    Attributes:
        inputs: names, in order.
        dtypes: of each.
        shapes: of each; None for a size that the program leaves open.
    """

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        """
        Args:
            device: that it computes on, wherever it was traced; default: a CPU.

        Raises:
            FormatError: when the file is not such a program, or one that does more than compute.
        """
        self._path, self._device = path, device or torch.device("cpu")
        graph = self._open(_record(path))
        self._places: dict[str, int] = {}
        try:
            self.inputs = tuple(entry["as_tensor"]["name"] for entry in graph["inputs"])
            about = [graph["tensor_values"][name] for name in self.inputs]
            self.dtypes = tuple(_DTYPES[entry["dtype"]] for entry in about)
            self.shapes = tuple(tuple(size.get("as_int") for size in entry["sizes"]) for entry in about)
            for name in self.inputs:
                self._define(name)
            calls = [self._call(node) for node in graph["nodes"]]
            (result,) = graph["outputs"]
            self._result = self._find(result["as_tensor"]["name"]).place
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self._broken(f"its graph cannot be read ({type(error).__name__} {str(error)[:100]})") from error
        self._calls = self._forget(calls)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Compute.

        Args:
            inputs: of `self.inputs`; some may be written to.

        Raises:
            FormatError: when it cannot be computed: memory is short, or the program is none of arriero's.
        """
        try:
            return self._computed(inputs)
        except torch.OutOfMemoryError:  # of a GPU
            raise
        except (ArithmeticError, IndexError, MemoryError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FormatError(f"{self._path}: its program cannot be computed ({reason})") from error

    def _computed(self, inputs: Sequence[Tensor]) -> Tensor:
        values: list[Any] = [*inputs, *[None] * (len(self._places) - len(inputs))]
        for call in self._calls:
            arguments = [_resolved(argument, values) for argument in call.arguments]
            named = {key: _resolved(argument, values) for key, argument in call.named.items()}
            result = call.function(*arguments, **named)
            if call.several:
                for place, one in zip(call.results, result, strict=True):
                    values[place] = one
            elif call.results:
                values[call.results[0]] = result
            for place in call.unneeded:
                values[place] = None
        found: Tensor = values[self._result]
        return found

    def _broken(self, what: str) -> FormatError:
        return FormatError(f"{self._path}: {what}; export the model again")

    def _open(self, record: bytes) -> Mapping[str, Any]:
        """The graph of a record."""
        values = parse_json_object(record, f"{self._path}{RECORD}")
        version = values.get("schema_version")
        if not isinstance(version, dict) or version.get("major") != SCHEMA:
            raise self._broken(f"is of the format {str(version)[:60]} of exported programs, and {SCHEMA} is known")
        module = values.get("graph_module")
        graph = module.get("graph") if isinstance(module, dict) else None
        if not isinstance(graph, dict):
            raise self._broken("holds no graph")
        return graph

    def _define(self, name: str) -> int:
        if name in self._places:
            raise self._broken(f"names {name[:60]!r} twice")
        return self._places.setdefault(name, len(self._places))

    def _find(self, name: str) -> _Value:
        return _Value(self._places[name])

    def _call(self, node: Mapping[str, Any]) -> _Call:
        function = self._function(node["target"])
        arguments = [self._argument(entry["arg"]) for entry in node["inputs"] if entry["kind"] == _POSITIONAL]
        named = {
            str(entry["name"]): self._argument(entry["arg"]) for entry in node["inputs"] if entry["kind"] != _POSITIONAL
        }
        results, several = list[int](), False
        for output in node["outputs"]:
            ((kind, value),) = output.items()
            if kind == "as_tensor":
                results.append(self._define(value["name"]))
            elif kind == "as_sym_int":
                results.append(self._define(value["as_name"]))
            elif kind == "as_tensors":
                several = True
                results += [self._define(one["name"]) for one in value]
            else:
                raise self._broken(f"a node gives {kind[:40]!r}, which is not known")
        return _Call(function, tuple(arguments), named, tuple(results), several or len(results) > 1, ())

    def _function(self, target: str) -> Callable[..., Any]:
        if target in _ARITHMETIC:
            return _ARITHMETIC[target]
        name = target.removeprefix("torch.ops.aten.")
        if name not in OPERATORS:
            raise self._broken(f"uses {target[:80]!r}, which no program of arriero does")
        if name == "linear.default":
            return _linear
        packet, overload = name.split(".")
        found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
        return found

    def _argument(self, argument: Mapping[str, Any]) -> Any:
        """Plain values, `_Value`s, and lists of them."""
        ((kind, value),) = argument.items()
        match kind:
            case "as_none":
                return None
            case "as_tensor":
                return self._find(value["name"])
            case "as_tensors":
                return [self._find(one["name"]) for one in value]
            case "as_sym_int":
                return self._size(value)
            case "as_sym_ints":
                return [self._size(one) for one in value]
            case "as_int" | "as_bool":
                return int(value) if kind == "as_int" else bool(value)
            case "as_ints":
                return [int(one) for one in value]
            case "as_float":
                return {"Infinity": math.inf, "-Infinity": -math.inf}[value] if isinstance(value, str) else float(value)
            case "as_scalar_type":
                return _DTYPES[value]
            case "as_memory_format":
                return _MEMORY_FORMATS[value]
            case "as_layout" if value == _STRIDED:
                return torch.strided
            case "as_device":
                return self._device
        raise self._broken(f"has an argument {kind[:40]!r}, which is not known")

    def _size(self, value: Mapping[str, Any]) -> _Value | int:
        return self._find(value["as_name"]) if "as_name" in value else int(value["as_int"])

    def _forget(self, calls: Sequence[_Call]) -> tuple[_Call, ...]:
        """The same, each with what nothing reads after it."""
        needed, found = {self._result}, []
        for call in reversed(calls):
            read = set(_places((call.arguments, list(call.named.values())))) | set(call.results)
            found.append(replace(call, unneeded=tuple(sorted(read - needed))))
            needed |= read
        return tuple(reversed(found))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`aten.linear`, by oneDNN where that is faster, for few rows too; what does not fit is torch's to refuse."""
    fits = weight.dim() == 2 and x.dim() > 1 and x.shape[-1] == weight.shape[1] and weight.is_contiguous()
    plain = bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1])
    if fits and plain and x.numel() and onednn_is_faster() and takes(x, weight):
        return onednn_product(x, weight, bias)
    return F.linear(x, weight, bias)


def _record(path: Path) -> bytes:
    """The graph's record of an archive of `torch.export.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry for entry in archive.infolist() if entry.filename.endswith(RECORD)]
            if len(names) != 1:
                raise FormatError(f"{path}: holds {len(names)} programs, and one is expected; export the model again")
            if names[0].file_size > MAX_RECORD_BYTES or names[0].compress_type != zipfile.ZIP_STORED:
                raise FormatError(f"{path}: its program is too large or packed; export the model again")
            return archive.read(names[0])
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise FormatError(f"{path}: is no archive of an exported program ({error}); export the model again") from error


def _resolved(argument: Any, values: Sequence[Any]) -> Any:
    if type(argument) is _Value:
        return values[argument.place]
    if type(argument) is list:
        return [_resolved(one, values) for one in argument]
    return argument


def _places(argument: Any) -> list[int]:
    """Of all values in an argument."""
    if isinstance(argument, _Value):
        return [argument.place]
    if isinstance(argument, (list, tuple)):
        return [place for one in argument for place in _places(one)]
    return []
