"""What the launchers of several machines hear of each other, through a store in this process."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed import HashStore

from arriero.parallel.launching import other_machines
from arriero.parallel.launching.other_machines import OtherMachines


class Gone(HashStore):
    """A store whose machine has ended."""

    def add(self, *_: Any) -> int:
        raise RuntimeError("Connection reset by peer")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which only sleeping moves."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(other_machines.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(other_machines.time, "sleep", sleep)
    return now


def test_an_end_is_heard_once_a_second_and_waited_for(clock: list[float]) -> None:
    store = HashStore()
    here, there = (OtherMachines(store, number, 3, "10.0.0.1") for number in (0, 2))
    assert here.has_ended(5, 60) is None
    there.tell_end()
    for later, expected in ((0.5, None), (1.0, None), (4.9, None), (6.1, "machine 2")):
        clock[0] = 100.0 + later
        assert here.has_ended(5, 60) == expected


def test_a_store_that_is_gone_leaves_time_for_a_checkpoint(clock: list[float]) -> None:
    here = OtherMachines(Gone(), 1, 2, "10.0.0.1")
    here.tell_end()
    for later, expected in ((0, None), (59, None), (60, "machine 0 (10.0.0.1)")):
        clock[0] = 100.0 + later
        assert here.has_ended(5, 60) == expected
    assert here.missing(lambda: False) == "machine 0 (10.0.0.1)"


def test_the_machine_that_is_silent_is_missing(clock: list[float]) -> None:
    machines = [OtherMachines(HashStore(), number, 3, "h") for number in range(3)]
    for machine in machines:
        machine.store = machines[0].store
    assert machines[0].missing(lambda: False) == "machine 1 and 2"

    def third_lives() -> bool:
        machines[2].has_ended(5, 60)
        return False

    assert machines[0].missing(third_lives) == "machine 1"
    assert machines[0].missing(lambda: True) is None
    machines[2].tell_end()
    assert machines[0].missing(lambda: False) == "machine 2"
