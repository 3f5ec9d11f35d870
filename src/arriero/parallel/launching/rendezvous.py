"""Where the launchers of a run's machines meet, and the store through which its processes find each other."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from arriero.errors import ConfigError

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500  # torchrun's
_MEETING_SECONDS = 900.0  # torchrun's
_STORE_TIMEOUT = timedelta(seconds=60)
QUIET_SECONDS = 5.0  # a longer wait is told


def say(line: str) -> None:
    """A line of the launcher itself."""
    print(f"arriero: {line}", file=sys.stderr, flush=True)


class _Wait:
    """A wait that is told once it is long."""

    def __init__(self) -> None:
        self.since, self.said = time.monotonic(), ""

    def tell(self, line: str) -> None:
        if line != self.said and time.monotonic() - self.since >= QUIET_SECONDS:
            self.said = line
            say(line)


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Which machines run together, and where they meet.

    Attributes:
        fewest, most: machines; equal unless they may come and go.
        machine: the number of this one; None: the rendezvous gives it one.
        address, port: of machine 0; port None: any (one machine), or `DEFAULT_PORT`.
        backend, endpoint: of torch's rendezvous, if the machines are not numbered.
        job: a name that the launchers of one run share.
    """

    fewest: int = 1
    most: int = 1
    machine: int | None = None
    address: str | None = None
    port: int | None = None
    backend: str | None = None
    endpoint: str | None = None
    job: str = "arriero"

    @property
    def place(self) -> str:
        """HOST:PORT, for messages."""
        port = self.port if self.port is not None else (0 if self.most == 1 else DEFAULT_PORT)
        return self.endpoint or f"{LOOPBACK if self.most == 1 else self.address}:{port}"

    @property
    def on_loopback(self) -> bool:
        """Whether all processes are on this machine, so that none has to be reached from another."""
        host = self.place.rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def handler(self) -> RendezvousHandler:
        """The rendezvous of this meeting."""
        if self.backend in (None, "static") and (self.most == 1 or self.machine is not None):
            return NumberedMachines(self)
        # A port of its own for the processes of each round: what a round that failed left in a store is not found there.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        return get_rendezvous_handler(
            RendezvousParameters(
                backend=self.backend or "c10d",
                endpoint=self.place,
                run_id=self.job,
                min_nodes=self.fewest,
                max_nodes=self.most,
                local_addr=LOOPBACK if self.on_loopback else None,
                timeout=int(_MEETING_SECONDS),
            )
        )


class NumberedMachines(RendezvousHandler):
    """A fixed number of machines, each with its number; one machine is the case that meets nobody.

    torch's own static rendezvous uses one store for every round, where the processes of a second round find addresses
    that the first has left. Here each round has a new store, in machine 0, and one machine listens on its loopback only.
    """

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.machine = meeting.machine or 0
        host, _, port = meeting.place.rpartition(":")
        self.host, self.port = host.strip("[]"), int(port)
        self.round = 0
        self.closed = False
        self._meeting_store: TCPStore | None = None
        self._round_store: TCPStore | None = None

    def get_backend(self) -> str:
        return "static"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all machines, and open the round's store.

        Raises:
            ConfigError: the port is taken.
            RendezvousTimeoutError: a machine is missing.
            RendezvousClosedError: a machine has ended the run.
        """
        deadline = time.monotonic() + _MEETING_SECONDS
        if self._meeting_store is None:
            self._meeting_store = self._listen(self.port) if self.machine == 0 else self._connect(self.port, deadline)
        store = self._meeting_store
        self.round += 1
        try:
            if self.machine == 0:
                self._round_store = self._listen(0)
                store.set(f"{self.round} port", str(self._round_store.port))
            wait = _Wait()
            present = store.add(self._present(self.round), 1)
            while present < self.meeting.most:
                if self.is_closed():
                    raise RendezvousClosedError
                if time.monotonic() > deadline:
                    raise RendezvousTimeoutError(f"{present} of {self.meeting.most} machines are there")
                wait.tell(f"{present} of {self.meeting.most} machines are here; waiting for the others")
                time.sleep(0.1)
                present = store.add(self._present(self.round), 0)
            port = int(store.get(f"{self.round} port"))
        except RuntimeError as error:  # machine 0 is gone
            raise RendezvousClosedError from error
        if self.machine != 0:
            self._round_store = self._connect(port, deadline)
        assert self._round_store is not None
        return RendezvousInfo(
            PrefixStore("launchers", self._round_store),
            self.machine,
            self.meeting.most,
            RendezvousStoreInfo(self.host, port),
        )

    def is_closed(self) -> bool:
        try:
            return self.closed or (self._meeting_store is not None and self._meeting_store.check(["closed"]))
        except RuntimeError:
            return True

    def set_closed(self) -> None:
        self.closed = True
        if self._meeting_store is not None:
            try:
                self._meeting_store.set("closed", "1")
            except RuntimeError:
                return  # machine 0, which held the store, is gone: that says the same

    def num_nodes_waiting(self) -> int:
        """More than 0 once another machine has begun the next round: this one has to follow."""
        if self.meeting.most == 1 or self._meeting_store is None:
            return 0
        try:
            return int(self._meeting_store.add(self._present(self.round + 1), 0))
        except RuntimeError:
            return 0

    def get_run_id(self) -> str:
        return self.meeting.job

    def shutdown(self) -> bool:
        self.set_closed()
        return True

    @staticmethod
    def _present(round_number: int) -> str:
        return f"{round_number} machines"

    def _listen(self, port: int) -> TCPStore:
        """A store in this process."""
        try:
            if self.meeting.on_loopback:
                listener = socket.create_server((self.host, port), family=_family(self.host))
            elif socket.has_dualstack_ipv6():
                listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
            else:
                listener = socket.create_server(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"port {port} is in use on this machine: give another one by --master") from error
            raise ConfigError(f"{self.host}:{port} cannot be listened on ({error.strerror}): check --master") from error
        port = listener.getsockname()[1]
        descriptor = listener.detach()
        return TCPStore(
            self.host, port, None, True, _STORE_TIMEOUT, wait_for_workers=False, master_listen_fd=descriptor
        )

    def _connect(self, port: int, deadline: float) -> TCPStore:
        """The store in machine 0."""
        wait = _Wait()
        while True:  # Python's own attempts, so that a signal ends the wait
            try:
                socket.create_connection((self.host, port), timeout=5).close()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RendezvousConnectionError(f"{self.host}:{port}: {error.strerror or error}") from error
                wait.tell(f"waiting for machine 0 at {self.host}:{port}")
                time.sleep(0.2)
        return TCPStore(self.host, port, None, False, _STORE_TIMEOUT, wait_for_workers=False)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
