"""How busy the load test itself was: what a reader needs to know before believing its latencies."""

import asyncio
import time
from dataclasses import dataclass

import numpy as np

__all__ = ["ClientLoad", "LoadMeter"]

_EVERY_S = 0.02


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """`lag`: how late the event loop woke up, so about how much too late an arrival may have been stamped."""

    wall_s: float
    cpu_s: float
    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float

    @property
    def cpu_share(self) -> float:
        """Processor time over wall time: 1 is one core."""
        return self.cpu_s / self.wall_s if self.wall_s else 0.0


class LoadMeter:
    """Samples the event loop's lag 50 times a second, and the process's CPU time."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lags_s: list[float] = []
        self._start_s = time.perf_counter()
        self._start_cpu_s = time.process_time()

    async def sample(self) -> None:
        """Runs until cancelled."""
        while True:
            due_s = time.perf_counter() + _EVERY_S
            await asyncio.sleep(_EVERY_S)
            self._lags_s.append(max(0.0, time.perf_counter() - due_s))

    def read(self) -> ClientLoad:
        lags = np.array(self._lags_s or [0.0]) * 1000
        return ClientLoad(
            wall_s=time.perf_counter() - self._start_s,
            cpu_s=time.process_time() - self._start_cpu_s,
            lag_p50_ms=float(np.quantile(lags, 0.5)),
            lag_p99_ms=float(np.quantile(lags, 0.99)),
            lag_max_ms=float(lags.max()),
        )
