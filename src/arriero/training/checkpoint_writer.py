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
        self.training = self.processes = processes or Processes()
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
        *,
        at_once: bool = False,
    ) -> None:
        """Write `checkpoint-{state.step}`, then call `afterwards` with the state that was written.

        Args:
            at_once: not in the background.

        Raises:
            TrainingError: if this checkpoint, or the one before it, could not be written.
            PeerError: if that was so in another process.
        """
        self.wait()
        beside = self.asynchronous and not at_once
        snapshot = take_snapshot(store, optimizer, state, copy=beside)

        def write(snapshot: Snapshot) -> None:
            write_checkpoint(run_folder, snapshot, self.processes)
            afterwards(snapshot.state)

        if self._pool is None or not beside:
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

    def has_failed(self) -> bool:
        """Whether the checkpoint in the background is known to have failed in any process.

        Every process asks at the same steps; a message is sent only from a save until all of them have it on disk.
        """
        if self._pending is None:
            return False
        done = self._pending.done()
        failed = done and self._pending.exception() is not None
        running, failure = self.training.max([float(not done), float(failed)])
        if not running and not failure:
            self._pending = None
        return failure > 0.0

    def settle(self) -> str | None:
        """Wait for the last checkpoint, in every process.

        Returns:
            What went wrong with it, in any of them; None if it is on disk, or if there is nothing to wait for.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        failure = pending.exception()
        if not self.training.any(failure is not None):
            return None
        return "another process failed" if failure is None else " ".join(str(failure).split()) or type(failure).__name__
