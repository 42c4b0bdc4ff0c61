"""The simulation: requests arrive, a policy sends each to a replica, replicas load adapters and answer."""

import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manylora_loadtest.cluster.policies import Policy, View
from manylora_loadtest.cluster.replicas import DEVICE, HOST, Replica, Shape, Tier
from manylora_loadtest.cluster.workload import Workload

__all__ = ["Loss", "Outcome", "simulate"]

_SAMPLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Loss:
    """At a share of the time so many replicas are gone at once; their requests are sent again."""

    at: float = 0.6
    num_replicas: int = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the requests met. `extra_s[i]` is what request i took beyond its own run: the queue and the load."""

    tier: NDArray[np.int8]
    extra_s: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]
    imbalance: float
    """Requests at the busiest replica, over the mean of all; averaged over time."""

    def share(self, tier: Tier) -> float:
        return float((self.tier == tier).mean())

    def p99_s(self) -> float:
        return float(np.percentile(self.extra_s, 99))

    def crowd_p99_s(self) -> float:
        return float(np.percentile(self.extra_s[self.is_crowd], 99)) if self.is_crowd.any() else math.nan


def simulate(workload: Workload, policy: Policy, shape: Shape, *, loss: Loss | None = None, seed: int = 0) -> Outcome:
    """Run the whole workload through a cluster that is empty at first."""
    return _Run(workload, policy, shape, loss, seed).outcome()


class _Run:
    def __init__(self, workload: Workload, policy: Policy, shape: Shape, loss: Loss | None, seed: int) -> None:
        self._work = workload
        self._policy = policy
        self._shape = shape
        self._replicas = [Replica(shape) for _ in range(shape.num_replicas)]
        self._view = View(shape, np.random.default_rng(seed), float(workload.run_s.mean()))
        self._ends: list[tuple[float, int, int, int]] = []  # when, which request of which replica, and its try
        self._tries = [0] * len(workload.at)
        self._unheard: deque[tuple[float, int, int, Tier]] = deque()
        self._tier = np.zeros(len(workload.at), np.int8)
        self._extra_s = np.zeros(len(workload.at))
        self._imbalances: list[float] = []
        self._next_sample_s = _SAMPLE_S
        self._loss = loss
        self._loss_s = math.inf if loss is None else loss.at * float(workload.at[-1])

    def outcome(self) -> Outcome:
        for number, (at, adapter) in enumerate(zip(self._work.at.tolist(), self._work.adapter.tolist(), strict=True)):
            self._go_on(at)
            self._view.note(adapter)
            self._send(number, adapter)
        self._go_on(math.inf)
        crowd = self._work.adapter == self._work.crowd_adapter
        return Outcome(self._tier, self._extra_s, crowd, float(np.mean(self._imbalances or [1.0])))

    def _go_on(self, until: float) -> None:
        """Let happen what happens before a time."""
        while self._ends and self._ends[0][0] <= until:
            now, number, replica, attempt = heapq.heappop(self._ends)
            self._hear(now)
            if attempt == self._tries[number]:  # else its replica died, and it runs elsewhere
                self._finish(now, number, replica)
        if math.isfinite(until):
            self._hear(until)

    def _hear(self, now: float) -> None:
        """The router's view as it is at a time."""
        if now >= self._loss_s:
            self._loss_s = math.inf
            self._view.now = now
            self._lose()
        self._view.now = now
        while self._unheard and self._unheard[0][0] <= now:
            _, replica, adapter, tier = self._unheard.popleft()
            places = self._view.known.setdefault(adapter, {})
            if tier in (DEVICE, HOST) and self._replicas[replica].is_alive:
                places[replica] = tier
            else:
                places.pop(replica, None)
                if not places:
                    del self._view.known[adapter]
        while now >= self._next_sample_s:
            loads = self._view.loads[np.isfinite(self._view.loads)]
            if loads.sum():
                self._imbalances.append(float(loads.max() / loads.mean()))
            self._next_sample_s += _SAMPLE_S

    def _send(self, number: int, adapter: int) -> None:
        replica = self._policy(self._view, adapter)
        self._view.loads[replica] += 1
        at = self._replicas[replica]
        if len(at.running) < self._shape.seats:
            self._start(number, replica)
        else:
            at.queue.append(number)

    def _start(self, number: int, replica: int) -> None:
        now, at = self._view.now, self._replicas[replica]
        tier, changed = at.take(int(self._work.adapter[number]))
        for adapter, tier_now in changed:
            self._unheard.append((now + self._shape.known_after_s, replica, adapter, tier_now))
        at.running.add(number)
        self._tier[number] = tier
        end = now + self._shape.load_s(tier) + float(self._work.run_s[number])
        heapq.heappush(self._ends, (end, number, replica, self._tries[number]))

    def _finish(self, now: float, number: int, replica: int) -> None:
        at = self._replicas[replica]
        at.running.remove(number)
        self._view.loads[replica] -= 1
        self._extra_s[number] = now - self._work.at[number] - self._work.run_s[number]
        if at.queue:
            self._start(at.queue.popleft(), replica)

    def _lose(self) -> None:
        assert self._loss is not None
        for replica in range(self._loss.num_replicas):
            lost = self._replicas[replica].die()
            self._view.loads[replica] = math.inf
            for places in self._view.known.values():
                places.pop(replica, None)
            for number in lost:
                self._tries[number] += 1
                self._send(number, int(self._work.adapter[number]))
