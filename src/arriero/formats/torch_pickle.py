"""The pickle in a file of torch.save, read as data: what it describes, without making any of it.

It knows the instructions that torch.save uses (protocol 2) and the handful of names that a state dict needs, each of which
only becomes a description. It imports nothing, calls nothing and takes no memory beyond a few times the pickle itself, unlike
torch.load(weights_only=True), whose allow-list can be asked for buffers of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NoReturn

import torch

from arriero.errors import FormatError
from arriero.formats.pickle_machine import PROTOCOL_2, Actions, PickleMachine

MAX_PICKLE_BYTES = 2 * 2**20
MAX_DIMENSIONS = 8

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
ORDERED_DICT = "collections OrderedDict"


class Function(Enum):
    """What a file may call; nothing of it is imported."""

    TENSOR = "a tensor"
    PARAMETER = "a parameter"
    ORDERED_DICT = "a dict"


@dataclass(frozen=True)
class DescribedStorage:
    """`count` numbers of a dtype in the record data/`key`."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class DescribedTensor:
    """A strided view of a storage; offset and strides count numbers. Not checked against the storage."""

    storage: DescribedStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(code: bytes, source: str) -> Any:
    """What a pickle describes: dicts, lists, tuples, texts, numbers, and descriptions of storages and tensors.

    Raises:
        FormatError: for a name or an instruction that a state dict of torch.save never has, or a broken pickle.
    """
    if len(code) > MAX_PICKLE_BYTES:
        raise FormatError(f"{source}: its pickle has {len(code)} bytes, more than any model's ({MAX_PICKLE_BYTES})")
    return TorchPickle(code, source).run()


class TorchPickle(PickleMachine):
    """Runs the pickle of one file.

    Args:
        code: the pickle.
        source: for messages.
    """

    protocols = range(2, 3)
    actions: ClassVar[Actions] = {**PROTOCOL_2, ord("Q"): lambda machine: machine._persistent_id()}
    names: ClassVar[Mapping[str, Any]] = {
        REBUILD_TENSOR: Function.TENSOR,
        "torch._utils _rebuild_parameter": Function.PARAMETER,
        ORDERED_DICT: Function.ORDERED_DICT,
        **{f"torch {name}": dtype for name, dtype in STORAGES.items()},
    }
    leaves = (DescribedStorage, DescribedTensor)

    def __init__(self, code: bytes, source: str) -> None:
        super().__init__(code)
        self._source = source

    def text(self, at: int, length: int) -> str:
        try:
            return str(self.content[at : at + length], "utf-8")
        except UnicodeDecodeError:
            self.fail("text that is not UTF-8")

    def key(self, value: Any) -> str | int:
        if not isinstance(value, str | int):
            self.fail("a key that is neither text nor an integer")
        return value

    def call(self, called: Enum, arguments: tuple[Any, ...]) -> Any:
        match called, arguments:
            case Function.TENSOR, (
                DescribedStorage() as storage,
                offset,
                tuple() as shape,
                tuple() as stride,
                _,
                _,
                *more,
            ):
                if len(more) <= 1:  # of metadata
                    return self._tensor(storage, offset, shape, stride)
            case Function.PARAMETER, (DescribedTensor() as tensor, _, _):
                return tensor
            case Function.ORDERED_DICT, ():
                return {}
        return super().call(called, arguments)

    def _tensor(
        self, storage: DescribedStorage, offset: Any, shape: tuple[Any, ...], stride: tuple[Any, ...]
    ) -> DescribedTensor:
        if (
            len(shape) != len(stride)
            or len(shape) > MAX_DIMENSIONS
            or not all(map(_is_count, (offset, *shape, *stride)))
        ):
            self.fail("a tensor of no shape")
        return DescribedTensor(storage, offset, shape, stride)

    def build(self, target: Any, state: Any) -> Any:
        # The state of an OrderedDict: torch's `_metadata` of modules, which says nothing about weights.
        return target if isinstance(target, dict) else super().build(target, state)

    def _persistent_id(self) -> None:
        match self.pop_last(1):
            case [("storage", torch.dtype() as dtype, str() as key, _, count)] if _is_count(count):
                self.make(DescribedStorage(key, dtype, count))
            case _:
                self.fail("a reference to no storage")

    # Errors

    def refuse_start(self) -> NoReturn:
        if self.content[:1] != b"\x80" or len(self.content) < 3:
            self.fail("it does not begin as one")
        raise FormatError(
            f"{self._source}: its pickle has protocol {self.content[1]}; torch.save writes 2 unless told otherwise: "
            "save it again"
        )

    def fail(self, what: str) -> NoReturn:
        raise FormatError(
            f"{self._source}: its pickle is cut short or corrupt: {what} (at byte {self.opcode_at}); fetch it again"
        )

    def distrust(self, what: str) -> NoReturn:
        raise FormatError(
            f"{self._source}: its pickle {what} (at byte {self.opcode_at}), an instruction that weights do not need; nothing "
            "was run. Keep only the tensors: torch.save(model.state_dict(), ...)"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48
