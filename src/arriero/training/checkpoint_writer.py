"""Who writes checkpoints: the training process itself, or a thread beside it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from arriero.formats.parts import Part
from arriero.parallel.processes import Processes
from arriero.training.checkpoint import Snapshot, TrainState, WeightStore, take_snapshot, write_checkpoint


class CheckpointWriter:
    """Writes one checkpoint after the other.

    Args:
        processes: those that write together; each has a writer and calls it at the same steps.
        asynchronous: copy the run into host memory and write it while training goes on. It costs that memory once more;
            a checkpoint that is due before the last one is on disk waits for it.
    """

    def __init__(self, processes: Processes | None = None, *, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self.processes = processes or Processes()
        if asynchronous:
            self.processes = self.processes.side_channel()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def save(
        self,
        run_folder: Path,
        store: WeightStore,
        optimizer: dict[str, Part],
        state: TrainState,
        afterwards: Callable[[TrainState], None],
    ) -> None:
        """Write `checkpoint-{state.step}`, then call `afterwards` with the state that was written.

        Raises:
            TrainingError: if this checkpoint, or the one before it, could not be written.
            PeerError: if that was so in another process.
        """
        self.wait()
        snapshot = take_snapshot(store, optimizer, state, copy=self.asynchronous)

        def write(snapshot: Snapshot) -> None:
            write_checkpoint(run_folder, snapshot, self.processes)
            afterwards(snapshot.state)

        if self._pool is None:
            write(snapshot)
        else:
            self._pending = self._pool.submit(write, snapshot)

    def wait(self) -> None:
        """Until the last checkpoint is on disk.

        Raises:
            TrainingError: if it could not be written.
            PeerError: if that was so in another process.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
