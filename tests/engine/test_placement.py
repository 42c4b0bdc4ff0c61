"""When the threads of a step are bound to CPUs and when they are let go; and the binding itself."""

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from manylora.kernels import native
from manylora.kernels.placement import CHECK_EVERY_S, FIRST_PAUSE_S, FORGET_AFTER_S, ThreadPlacement, own_cpus

CPUS = [0, 1]
BUSY_NS = 150_000_000


class FakePlacer:
    """Counts what is asked of it. `busy` adds to the threads' times; `is_lost` says that they are not in place."""

    def __init__(self) -> None:
        self.placed: list[bool] = []
        self.times = (0, 0)
        self.is_lost = False

    def busy(self, run_ns: int = BUSY_NS, wait_ns: int = 0) -> None:
        self.times = (self.times[0] + run_ns, self.times[1] + wait_ns)

    def place_threads(self, cpus: Sequence[int], *, apart: bool) -> None:
        assert list(cpus) == CPUS
        self.placed.append(apart)

    def thread_times(self, cpus: Sequence[int]) -> tuple[int, int] | None:
        return None if self.is_lost else self.times


class Stepper:
    """A placement whose clock goes on between steps only as far as it is told."""

    def __init__(self, cpus: list[int] | None = None) -> None:
        self.now = 1000.0
        self.placer = FakePlacer()
        self.placement = ThreadPlacement(
            self.placer, cpus=lambda: CPUS if cpus is None else cpus, clock=lambda: self.now
        )

    def step(self, after_s: float = 0.02, run_ns: int = BUSY_NS, wait_ns: int = 0) -> None:
        self.now += after_s
        self.placer.busy(run_ns, wait_ns)
        self.placement.before_step()

    def steps_until(self, num_placed: int) -> float:
        """Seconds of steps that do not wait until something was placed so often in all."""
        began = self.now
        while len(self.placer.placed) < num_placed:
            self.step()
        return self.now - began


def test_threads_are_bound_before_the_first_step_and_stay_so_while_they_do_not_wait() -> None:
    stepper = Stepper()
    for _ in range(100):
        stepper.step(wait_ns=BUSY_NS // 10)
    assert stepper.placer.placed == [True]


def test_threads_that_wait_are_let_go_and_bound_again_after_a_pause() -> None:
    stepper = Stepper()
    stepper.step()
    stepper.step(CHECK_EVERY_S, wait_ns=BUSY_NS)
    assert stepper.placer.placed == [True, False]
    assert stepper.steps_until(3) == pytest.approx(FIRST_PAUSE_S, abs=0.021)
    assert stepper.placer.placed == [True, False, True]


def test_the_pause_grows_while_they_wait_each_time_and_shrinks_when_they_do_not() -> None:
    stepper = Stepper()
    stepper.step()
    pauses = []
    for _ in range(4):
        stepper.step(CHECK_EVERY_S, wait_ns=BUSY_NS)
        pauses.append(stepper.steps_until(len(stepper.placer.placed) + 1))
    assert pauses == pytest.approx([FIRST_PAUSE_S * 2**i for i in range(4)], abs=0.021)
    stepper.step(CHECK_EVERY_S)
    stepper.step(CHECK_EVERY_S, wait_ns=BUSY_NS)
    assert stepper.steps_until(len(stepper.placer.placed) + 1) == pytest.approx(FIRST_PAUSE_S, abs=0.021)


def test_after_a_rest_they_are_bound_at_once_however_long_the_pause_was_to_be() -> None:
    stepper = Stepper()
    stepper.step()
    for _ in range(5):
        stepper.step(CHECK_EVERY_S, wait_ns=BUSY_NS)
        stepper.steps_until(len(stepper.placer.placed) + 1)
    stepper.step(CHECK_EVERY_S, wait_ns=BUSY_NS)
    assert not stepper.placer.placed[-1]
    stepper.step(FORGET_AFTER_S + 0.01)
    assert stepper.placer.placed[-1]


def test_a_wait_beside_hardly_any_work_says_nothing() -> None:
    stepper = Stepper()
    stepper.step()
    stepper.step(CHECK_EVERY_S, run_ns=1_000_000, wait_ns=5_000_000)
    assert stepper.placer.placed == [True]
    stepper.step(CHECK_EVERY_S, wait_ns=BUSY_NS)  # both count when there has been enough
    assert stepper.placer.placed == [True, False]


@pytest.mark.parametrize("steps_before", [0, 1])
def test_threads_that_are_not_in_place_are_left_to_the_system_for_good(steps_before: int) -> None:
    stepper = Stepper()
    for _ in range(steps_before):
        stepper.step()
    stepper.placer.is_lost = True
    stepper.step(CHECK_EVERY_S)
    stepper.placer.is_lost = False
    for after_s in (0.02, CHECK_EVERY_S, FORGET_AFTER_S + 1, 1000):
        stepper.step(after_s)
    assert stepper.placer.placed == [True, False]


def test_nothing_is_bound_where_threads_and_cpus_are_not_as_many() -> None:
    stepper = Stepper(cpus=[])
    for after_s in (0.02, CHECK_EVERY_S, 1000):
        stepper.step(after_s)
    assert stepper.placer.placed == []


def test_own_cpus_are_all_of_them_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {5, 3}, raising=False)
    for threads, expected in ((1, []), (2, [3, 5]), (4, [])):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert own_cpus() == expected
    monkeypatch.setattr(sys, "platform", "darwin")
    assert own_cpus() == []


@pytest.mark.alone
@pytest.mark.skipif(
    not own_cpus() or not native.is_available(), reason="needs as many CPUs as threads, and the kernels"
)
def test_the_kernels_bind_every_thread_of_a_region_and_let_it_go() -> None:
    """On a thread of its own, as the binding stays with the thread."""
    cpus = own_cpus()
    seen: dict[str, object] = {}

    def run() -> None:
        native.place_threads(cpus, apart=True)
        me = threading.get_native_id()
        seen["mine"] = os.sched_getaffinity(me)
        seen["times"] = native.thread_times(cpus)
        seen["others"] = native.thread_times(cpus[::-1])
        single = [os.sched_getaffinity(int(each.name)) for each in Path("/proc/self/task").iterdir()]
        seen["bound"] = {min(each) for each in single if len(each) == 1}
        native.place_threads(cpus, apart=False)
        seen["after"] = os.sched_getaffinity(me)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen["mine"] == {cpus[0]}
    assert seen["bound"] == set(cpus)
    assert seen["others"] is None, "threads count only where they are meant to be"
    assert seen["after"] == set(cpus)
    times = seen["times"]
    assert isinstance(times, tuple)
    assert times[0] > 0
