"""What one of several processes holds of a tensor: a box of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Where a local tensor lies in the whole one.

    Attributes:
        shape: of the whole tensor.
        offset: of the box's first element, in each dimension.
        size: of the box in each dimension; a process may hold nothing, a size of 0.
        copies: processes of the run that hold this same box.
        writes: whether this process is the one of them that writes it to a file.
        stored_as: the name of the tensor in files, where it is another one's copy (a tied head).
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    copies: int = 1
    writes: bool = True
    stored_as: str | None = None

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Placement:
        """All of a tensor in one process."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def box(self) -> tuple[slice, ...]:
        """The index of the box in the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.size, strict=True))

    @property
    def is_whole(self) -> bool:
        return self.size == self.shape

    def within(self, outer: Placement) -> Placement:
        """The placement in the whole of `outer`, this one being a placement in `outer`'s box."""
        offset = tuple(a + b for a, b in zip(self.offset, outer.offset, strict=True))
        return Placement(outer.shape, offset, self.size, self.copies * outer.copies, self.writes and outer.writes)


@dataclass(frozen=True)
class Part:
    """A local tensor and where it lies."""

    tensor: Tensor
    placement: Placement
