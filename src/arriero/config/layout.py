"""How the processes of a run share one model and its data: five degrees, and where each process stands."""

from __future__ import annotations

from dataclasses import dataclass, fields

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
SCHEDULES = ("1f1b", "interleaved", "zero_bubble", "zbv")
CONTEXT_METHODS = ("auto", "gather", "ring")


@dataclass(frozen=True)
class Coordinates:
    """Where one process stands on each axis, from 0."""

    pp: int = 0
    dp_replicate: int = 0
    dp_shard: int = 0
    cp: int = 0
    tp: int = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism. Ranks are numbered with `tp` fastest and `pp` slowest.

    Attributes:
        pp: pipeline stages' processes: each holds `virtual` runs of layers.
        dp_replicate: copies of the model that see other data.
        dp_shard: processes that see other data and share out optimizer (stage 1), gradients (2), weights (3).
        cp: processes that share out each sequence.
        tp: processes that share out each weight matrix.
        stage: what `dp_shard` x `cp` share out, 1 to 3; 0 where both are 1.
        offload: whether the shards live in host memory.
        virtual: stages of the pipeline in each process.
        schedule: of the pipeline, one of `SCHEDULES`.
        sequence_parallel: whether `tp` also shares out the tokens between the matrices.
        context_method: how `cp` attends to tokens of other processes, one of `CONTEXT_METHODS`.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    stage: int = 0
    offload: bool = False
    virtual: int = 1
    schedule: str = "1f1b"
    sequence_parallel: bool = True
    context_method: str = "auto"

    @property
    def size(self) -> int:
        """Processes."""
        return self.pp * self.data * self.cp * self.tp

    @property
    def data(self) -> int:
        """Processes, or groups of them, that each see other rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def stages(self) -> int:
        """Runs of layers that the pipeline is cut into."""
        return self.pp * self.virtual

    @property
    def degrees(self) -> tuple[int, ...]:
        """In the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands."""
        at = {}
        for axis in reversed(AXES):
            rank, at[axis] = divmod(rank, getattr(self, axis))
        return Coordinates(**at)

    def rank(self, at: Coordinates) -> int:
        """The rank that stands there."""
        number = 0
        for axis in AXES:
            number = number * getattr(self, axis) + getattr(at, axis)
        return number

    def data_rank(self, rank: int) -> int:
        """Which rows a rank sees: 0 to `data` - 1."""
        at = self.coordinates(rank)
        return at.dp_replicate * self.dp_shard + at.dp_shard

    def has_ring(self, device: str) -> bool:
        """Whether keys and values go around the processes of `cp` on a kind of device, or are gathered."""
        return self.cp > 1 and (self.context_method == "ring" or (self.context_method == "auto" and device == "cuda"))

    def stages_of(self, pp: int) -> tuple[int, ...]:
        """The stages of one process of the pipeline: in a loop, or for "zbv" there and back in a V."""
        if self.schedule == "zbv":
            return (pp, self.stages - 1 - pp)
        return tuple(range(pp, self.stages, self.pp))

    def process_of(self, stage: int) -> int:
        """The process of the pipeline (its coordinate on `pp`) that holds a stage."""
        return next(pp for pp in range(self.pp) if stage in self.stages_of(pp))

    def __str__(self) -> str:
        """E.g. "tp2 x pp2", "dp_shard4 (stage2)", "one process"."""
        words = [f"{axis}{degree}" for axis, degree in zip(AXES, self.degrees, strict=True) if degree > 1]
        notes = []
        if self.stage:
            notes.append(f"stage{self.stage}" + (" offload" if self.offload else ""))
        if self.pp > 1:
            notes.append(self.schedule + (f", {self.virtual} stages each" if self.virtual > 1 else ""))
        if self.cp > 1 and self.context_method != "auto":
            notes.append(self.context_method)
        if self.tp > 1 and not self.sequence_parallel:
            notes.append("whole sequences")
        return (" x ".join(words) or "one process") + (f" ({'; '.join(notes)})" if notes else "")


assert set(AXES) == {field.name for field in fields(Coordinates)}
