"""The folder of a run: who may write into it, and what it can go on from."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from arriero.config.checkpoint import CheckpointOptions
from arriero.errors import ConfigError, FormatError, PeerError
from arriero.formats.adapter_base import BASE_QUANTIZATION
from arriero.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from arriero.formats.peft_prefix import ENCODER_WEIGHTS
from arriero.formats.safe_tensors import WEIGHT_FILES
from arriero.parallel.processes import Processes
from arriero.quantization.qat import RANGES_FILE, SETTINGS_FILE
from arriero.training.checkpoint import MANIFEST, OPTIMIZER, RANDOM, checkpoint_step, list_checkpoints, verify

LOCK = ".lock"
SEEN_SECONDS = 10.0  # until which a file that one machine has written is seen by the others
MERGED, SHARDED = "merged", "sharded"  # other forms of the final model, in folders of their own
REPLACED = ".replaced"  # where an earlier final model waits until the new one is written
# What a run writes beside its checkpoints; other files are not touched.
RECORDS = (
    "train_log.jsonl",
    "samples.jsonl",
    "all_results.json",
    "eval_results.json",
    "loss.png",
    "reference_logps.safetensors",
)
# Of the final model, of whatever kind: a full one, an adapter, a prefix, one with rounded weights.
FINAL = (
    *WEIGHT_FILES,
    "config.json",
    "generation_config.json",
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ENCODER_WEIGHTS,
    SETTINGS_FILE,
    RANGES_FILE,
    BASE_QUANTIZATION,
)


class RunFolder:
    """A run folder that belongs to this run until it ends; use it as a context.

    Of several processes the first locks it, decides and changes files; the others are told.

    Attributes:
        path: the folder.
        resume: the checkpoint to go on from, None to start afresh.

    Raises:
        ConfigError: if it is in use by another run, holds something and neither overwriting nor resuming was asked for, or is
            not one folder for all processes.
        PeerError: in the other processes then.
    """

    def __init__(self, options: CheckpointOptions, processes: Processes | None = None) -> None:
        self.path = Path(options.output_dir)
        self.processes = processes or Processes()
        self._overwrite = options.overwrite_output_dir
        self._lock: int | None = None
        self._training = False
        self._made: list[Path] = []  # folders that were not there, the innermost first
        try:
            token = self.processes.by_first(lambda: self._claim(options))
            self._check_shared(token)
            if options.resume_from_checkpoint == "auto":
                self.resume = newest_checkpoint(self.path, self.processes)
                if self.resume is None:
                    print(f"no checkpoint in {self.path}: the run starts anew", flush=True)
            else:
                self.resume = Path(options.resume_from_checkpoint) if options.resume_from_checkpoint else None
        except BaseException:
            self._release()
            raise

    def _claim(self, options: CheckpointOptions) -> str:
        """Make the folder this run's.

        Returns:
            What its lock holds.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--output_dir {self.path} is a file: name a folder")
        explicit = options.resume_from_checkpoint not in (None, "auto")
        if explicit and not Path(str(options.resume_from_checkpoint)).is_dir():
            raise ConfigError(f"--resume_from_checkpoint {options.resume_from_checkpoint}: no such folder")
        used = self.path.is_dir() and any(entry.name != LOCK for entry in self.path.iterdir())
        if used and not (options.overwrite_output_dir or options.resume_from_checkpoint):
            raise ConfigError(
                f"--output_dir {self.path} is not empty: --overwrite_output_dir starts afresh, "
                "--resume_from_checkpoint auto goes on"
            )
        try:
            self._lock = self._acquire()
        except OSError as error:
            raise ConfigError(f"--output_dir {self.path}: cannot be written ({error.strerror})") from error
        self._remove_leftovers()
        self._restore()
        return os.pread(self._lock, 64, 0).decode("ascii")

    def _check_shared(self, token: str) -> None:
        """Refuse a folder that only the machine of rank 0 sees: checkpoints are written by all processes."""
        if self.processes.alone:
            return
        with self.processes.together():
            deadline = time.monotonic() + SEEN_SECONDS
            while self._token() != token:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"--output_dir {self.path} on the machine of rank {self.processes.rank} is not the folder that rank 0 "
                        "has there: name one that all machines share"
                    )
                time.sleep(0.2)

    def _token(self) -> str:
        try:
            return (self.path / LOCK).read_text(encoding="ascii", errors="replace")
        except OSError:
            return ""

    def _acquire(self) -> int:
        """The kernel drops the lock with the process, however it ends: it can never be stale."""
        while True:
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # a run that was refused has just removed the folder it had made
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(lock, 32, 0).decode("ascii", "replace").partition("\n")[0] or "unknown"
                os.close(lock)
                raise ConfigError(
                    f"--output_dir {self.path} is in use by another run (process {owner}): name another folder, "
                    "or wait for it"
                ) from None
            if self._is_there(lock):
                break
            os.close(lock)
        self._lock = lock  # now: a signal may end the run in what follows
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n{secrets.token_hex(8)}\n".encode("ascii"), 0)
        with contextlib.suppress(OSError):
            os.fsync(lock)  # other machines read it
        return lock

    def _is_there(self, lock: int) -> bool:
        """Whether the file that was locked is still the one in the folder: a run that ends removes its own."""
        try:
            there = os.stat(self.path / LOCK)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(lock))

    def _remove_leftovers(self) -> None:
        """Delete what a killed run left half-written: of a checkpoint in the folder, of the final model beside it."""
        whole = self.path.resolve()
        partial = r"\.checkpoint-\d+\.partial"
        for folder, name in (
            (whole, rf"{partial}|\.{partial}\.\w+\.tmp"),
            (whole.parent, rf"\.{re.escape(whole.name)}\.\w{{8}}\.tmp"),
        ):
            with contextlib.suppress(OSError):  # the folder around a run need not be readable
                for entry in [entry for entry in folder.iterdir() if re.fullmatch(name, entry.name)]:
                    shutil.rmtree(entry, ignore_errors=True)

    def clear(self) -> None:
        """To be called when the run is ready to start: with `--overwrite_output_dir` it deletes the checkpoints and records of
        an earlier one, and puts its final model aside until this run has ended well."""
        self._training = True
        if self._overwrite:
            self.processes.by_first(self._clear)

    def _clear(self) -> None:
        for checkpoint in self._own_checkpoints():
            shutil.rmtree(checkpoint)
        for name in RECORDS:
            (self.path / name).unlink(missing_ok=True)
        final = self._final()
        if final:
            aside = self.path / REPLACED
            shutil.rmtree(aside, ignore_errors=True)  # of the run before
            aside.mkdir()
            for path in final:
                path.rename(aside / path.name)

    def _final(self) -> list[Path]:
        """The files of the final model, and the folders of its other forms."""
        files = [path for pattern in FINAL for path in self.path.glob(pattern) if not path.is_dir()]
        forms = [self.path / form for form in (MERGED, SHARDED)]
        return files + [form for form in forms if (form / "config.json").is_file()]

    def _own_checkpoints(self) -> list[Path]:
        """Damaged and empty ones too, but not those of other programs, which name them alike."""
        marks = {MANIFEST, OPTIMIZER, RANDOM}
        held = {path: {entry.name for entry in path.iterdir()} for path in list_checkpoints(self.path)}
        return [path for path, entries in held.items() if not entries or entries & marks]

    def _restore(self) -> None:
        """Give back the final model that a run was to replace which has written neither a checkpoint nor its own."""
        aside = self.path / REPLACED
        if not aside.is_dir() or self._own_checkpoints() or self._final():
            return
        for path in list(aside.iterdir()):
            path.rename(self.path / path.name)
        aside.rmdir()

    def check_inputs(self, *names: str | None) -> None:
        """Refuse to overwrite what the run is made from.

        Raises:
            ConfigError: naming the input that lies in the folder.
            PeerError: in the other processes then.
        """
        self.processes.by_first(lambda: self._check_inputs(names))

    def _check_inputs(self, names: Sequence[str | None]) -> None:
        for name in names:
            inside = name is not None and Path(name).resolve().is_relative_to(self.path.resolve())
            if self._overwrite and inside and Path(str(name)).exists():
                raise ConfigError(
                    f"--overwrite_output_dir would delete {name}, which this run needs: give another --output_dir"
                )

    def drop_later(self, step: int) -> None:
        """Delete the checkpoints after a step: a run that goes on from there makes its own."""
        self.processes.by_first(lambda: self._drop_later(step))

    def _drop_later(self, step: int) -> None:
        for checkpoint in list_checkpoints(self.path):
            if checkpoint_step(checkpoint) > step:
                print(f"{checkpoint} is of the run as it went on before: deleted", flush=True)
                shutil.rmtree(checkpoint)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self._release(whole=kind is None and self._training)

    def _release(self, *, whole: bool = False) -> None:
        """Give the folder up; if nothing was written, as when the run was refused, it is as if it had never been made.

        Args:
            whole: the run has written its final model.
        """
        if self._lock is None:
            return
        aside = self.path / REPLACED
        with contextlib.suppress(OSError):  # what led here is to be told
            if whole:
                shutil.rmtree(aside, ignore_errors=True)
            else:
                self._restore()
                if aside.is_dir():
                    print(f"{aside}: the earlier final model, until this run is gone on with and ends", flush=True)
        (self.path / LOCK).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None
        with contextlib.suppress(OSError):  # it holds something
            for folder in self._made:
                folder.rmdir()


def newest_checkpoint(folder: Path, processes: Processes | None = None) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are named and passed over. Processes look at it together.

    Raises:
        FormatError: if there are checkpoints and none is whole.
    """
    processes = processes or Processes()
    names = processes.by_first(lambda: [checkpoint.name for checkpoint in list_checkpoints(folder)])
    checkpoints = [folder / name for name in names]
    for checkpoint in reversed(checkpoints):
        try:
            verify(checkpoint, processes)
        except (FormatError, PeerError) as error:
            print(f"warning: {error}")
            continue
        return checkpoint
    if checkpoints:
        raise FormatError(f"{folder}: no whole checkpoint is left: --overwrite_output_dir starts afresh")
    return None
