"""Who encodes the units: this process, processes of this machine, or the tasks of a Ray cluster.

The results come in the order of the units, and no more units than a few a worker are on the way at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from arriero.data.corpus.documents import Refusal
from arriero.data.corpus.encoding import EncodedUnit, Encoder, EncodingRules
from arriero.data.corpus.units import Unit
from arriero.data.tokenizer import load_tokenizer
from arriero.data.tokenizer_files import SIDE_FILES
from arriero.errors import DataError, require

Result = EncodedUnit | Refusal
T = TypeVar("T")

# Units on the way for each worker: one in its hands, one waiting, and one that waits for its turn to be written.
UNITS_PER_WORKER = 3
PARALLELISM = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class EncodingJob:
    """What a worker needs to know: where the tokenizer's files are, and the rules."""

    tokenizer_folder: str
    rules: EncodingRules


def encode_units(
    units: Iterator[Unit], job: EncodingJob, workers: int, executor: str
) -> Generator[tuple[Unit, Result]]:
    """Encode units.

    Args:
        workers: how many units are encoded at a time, each on one core.
        executor: "local" or "ray".

    Returns:
        (the unit without its payload, its ids or its first bad document), in the order of the units.

    Raises:
        DataError: a worker was killed.
        MissingExtraError: ray is asked for and not installed.
    """
    with _one_core_each():
        if executor == "ray":
            yield from _encode_by_ray(units, job, workers)
        elif workers == 1:
            encoder = Encoder(load_tokenizer(job.tokenizer_folder), job.rules)
            for unit in units:
                yield _without_payload(unit), encoder.encode(unit.kind, unit.payload, unit.text_bytes)
        else:
            yield from _encode_by_processes(units, job, workers)


@contextlib.contextmanager
def _one_core_each() -> Iterator[None]:
    """The tokenizers library, which would use all cores, uses one here and in processes that are started meanwhile."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before


def _without_payload(unit: Unit) -> Unit:
    return replace(unit, payload=b"")


def _in_order(
    units: Iterator[Unit], send: Callable[[Unit], T], receive: Callable[[T], Result], limit: int
) -> Iterator[tuple[Unit, Result]]:
    """Send units off while fewer than `limit` are on the way; receive the oldest first."""
    waiting: deque[tuple[Unit, T]] = deque()
    for unit in units:
        waiting.append((_without_payload(unit), send(unit)))
        if len(waiting) >= limit:
            oldest, pending = waiting.popleft()
            yield oldest, receive(pending)
    while waiting:
        oldest, pending = waiting.popleft()
        yield oldest, receive(pending)


def _encode_by_processes(units: Iterator[Unit], job: EncodingJob, workers: int) -> Iterator[tuple[Unit, Result]]:
    # Spawned, not forked: the tokenizers library has threads, and a fork of a process with threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job,))

    def send(unit: Unit) -> Future[Result]:
        with _begun_whole():
            return pool.submit(_encode, unit.kind, unit.payload, unit.text_bytes)

    try:
        yield from _in_order(
            units,
            send,
            lambda future: future.result(),
            UNITS_PER_WORKER * workers,
        )
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed (by lack of memory, perhaps); the same command with fewer --workers goes on "
            "where this one stopped"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _begun_whole() -> Iterator[None]:
    """Within it SIGTERM waits: a process that is begun by half complains that nothing came."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if noted:
            signal.raise_signal(signal.SIGTERM)


_encoder: Encoder | None = None


def _begin(job: EncodingJob) -> None:
    """Make this process a worker."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of the process that started this one
    os.environ[PARALLELISM] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _encoder = Encoder(load_tokenizer(job.tokenizer_folder), job.rules)


def _leave_with_parent() -> None:
    """A pool's workers do not notice that their parent was killed: they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode(kind: str, payload: bytes | list[str], text_bytes: int) -> Result:
    assert _encoder is not None
    return _encoder.encode(kind, payload, text_bytes)


def _encode_by_ray(units: Iterator[Unit], job: EncodingJob, workers: int) -> Iterator[tuple[Unit, Result]]:
    ray = require("ray", "ray")
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if not os.environ.get("RAY_ADDRESS"):
            options |= {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(**options)
        except Exception as error:  # what a cluster that cannot be reached raises differs between versions
            raise DataError(f"--executor ray: no cluster ({' '.join(str(error).split())[:300]})") from error
    try:
        task = ray.remote(num_cpus=1)(_encode_on_cluster)
        files = ray.put(_tokenizer_files(Path(job.tokenizer_folder)))

        def receive(pending: Any) -> Result:
            try:
                result: Result = ray.get(pending)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[0][:300]
                raise DataError(f"--executor ray: {reason}; the same command goes on where this one stopped") from error
            return result

        yield from _in_order(
            units,
            lambda unit: task.remote(files, job.rules, unit.kind, unit.payload, unit.text_bytes),
            receive,
            UNITS_PER_WORKER * workers,
        )
    finally:
        if started:
            ray.shutdown()


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files; the other machines of a cluster need not have them."""
    names = [*SIDE_FILES, "config.json"]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


_cluster_encoder: tuple[dict[str, bytes], EncodingRules, Encoder] | None = None


def _encode_on_cluster(
    files: dict[str, bytes], rules: EncodingRules, kind: str, payload: bytes | list[str], text_bytes: int
) -> Result:
    """A task: a process of the cluster runs many of them and keeps its encoder from one to the next."""
    global _cluster_encoder
    if _cluster_encoder is None or _cluster_encoder[:2] != (files, rules):
        os.environ[PARALLELISM] = "false"
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            _cluster_encoder = (files, rules, Encoder(load_tokenizer(folder), rules))
    return _cluster_encoder[2].encode(kind, payload, text_bytes)
