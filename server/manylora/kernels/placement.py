"""Keeps the threads of a step on CPUs of their own, as long as nobody else needs those.

A virtual machine's CPU that has just gone to sleep counts as taken (`available_idle_cpu` in Linux asks whether
the host has it), so a thread that is woken for a few microseconds of work is put on the CPU of the thread
that wakes it. After a pause both threads of a step then share one of two CPUs for tens of milliseconds. Bound to a CPU
each, they do not; but beside another busy program, bound threads cannot move out of its way, and a step lasts as
long as its slowest thread. So they are bound, their waiting is watched, and where they wait they are let go.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from manylora.log import get_logger

CHECK_EVERY_S = 0.1
MOST_WAITING = 0.2  # of the time that the threads run: beside a process that mostly waits it is about a tenth
LEAST_RUN_NS = 50_000_000  # below, a share says nothing
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 60.0
FORGET_AFTER_S = 0.2  # without a step: who was busy then need not be now


class Placer(Protocol):
    """The part of `kernels.native` that is used here."""

    def place_threads(self, cpus: Sequence[int], *, apart: bool) -> None: ...

    def thread_times(self, cpus: Sequence[int]) -> tuple[int, int] | None: ...


def own_cpus() -> list[int]:
    """The CPUs this process may use, where each of torch's threads can have its own and all are used; else none.

    With fewer threads than CPUs the system's choice is left alone: other programs, and threads of one core, are not
    known here.
    """
    if sys.platform != "linux":
        return []
    cpus = sorted(os.sched_getaffinity(0))
    return cpus if len(cpus) == torch.get_num_threads() > 1 else []


class ThreadPlacement:
    """Call `before_step` on the thread that steps, before each step."""

    def __init__(
        self,
        placer: Placer,
        *,
        cpus: Callable[[], list[int]] = own_cpus,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._placer = placer
        self._find_cpus = cpus
        self._clock = clock
        self._cpus: list[int] | None = None  # known on the first step, whose thread's CPUs they are
        self._is_apart = False
        self._due_s = 0.0  # when to look again
        self._last_s = 0.0
        self._is_final = False  # left to the system for good
        self._pause_s = FIRST_PAUSE_S
        self._times = (0, 0)

    def before_step(self) -> None:
        """Bind the threads, look whether they wait, or let them go, if it is time for that."""
        now = self._clock()
        has_rested = now - self._last_s > FORGET_AFTER_S
        self._last_s = now
        if has_rested and not self._is_final:
            self._pause_s = FIRST_PAUSE_S
        elif now < self._due_s:
            return
        if self._cpus is None:
            self._cpus = self._find_cpus()
        if not self._cpus:
            self._give_up()
        elif not self._is_apart:
            self._bind(now)
        else:
            self._check(now)

    def _bind(self, now: float) -> None:
        assert self._cpus
        self._placer.place_threads(self._cpus, apart=True)
        times = self._placer.thread_times(self._cpus)
        if times is None:
            self._give_up()
            return
        self._is_apart = True
        self._times = times
        self._due_s = now + CHECK_EVERY_S

    def _check(self, now: float) -> None:
        assert self._cpus
        times = self._placer.thread_times(self._cpus)
        if times is None:  # the threads are others, which began on this one's CPU
            self._give_up()
            return
        run_ns, wait_ns = (new - old for new, old in zip(times, self._times, strict=True))
        self._due_s = now + CHECK_EVERY_S
        if run_ns < LEAST_RUN_NS:
            return
        if wait_ns > MOST_WAITING * run_ns:
            self._let_go()
            self._due_s = now + self._pause_s
            get_logger(__name__).debug("threads_let_go", waited_ms=wait_ns / 1e6, ran_ms=run_ns / 1e6)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return
        self._pause_s = FIRST_PAUSE_S
        self._times = times

    def _let_go(self) -> None:
        assert self._cpus
        self._placer.place_threads(self._cpus, apart=False)
        self._is_apart = False

    def _give_up(self) -> None:
        if self._cpus:
            self._let_go()
            get_logger(__name__).info("threads_not_bound", cpus=self._cpus)
        self._is_final = True
        self._due_s = float("inf")
