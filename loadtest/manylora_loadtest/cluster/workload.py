"""What a simulated cluster is asked: arrivals, adapters and how long each request takes once it runs."""

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manylora_loadtest.errors import ScenarioError
from manylora_loadtest.popularity import Popularity

__all__ = ["Crowd", "Workload", "drawn", "read_llm_trace"]

_PREFILL_S = 0.0002  # of a prompt's token, and below of an answer's
_TOKEN_S = 0.02


@dataclass(frozen=True, slots=True)
class Crowd:
    """From one share of the time to another, so many of all requests name one adapter that nobody asked for before."""

    start: float = 0.45
    end: float = 0.55
    share: float = 0.05


@dataclass(frozen=True, slots=True)
class Workload:
    """Request i comes at `at[i]` seconds, names `adapter[i]`, runs for `run_s[i]`. The last adapter is the crowd's."""

    at: NDArray[np.float64]
    adapter: NDArray[np.int64]
    run_s: NDArray[np.float64]
    num_adapters: int

    @property
    def crowd_adapter(self) -> int:
        return self.num_adapters - 1


def drawn(
    num_requests: int, num_adapters: int, rate: float, zipf: float, run_s: float, *, crowd: Crowd | None, seed: int
) -> Workload:
    """A Poisson process of `rate` requests a second; adapters by Zipf, in no order of their ids."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / rate, num_requests))
    adapter = _adapters(num_requests, num_adapters, zipf, rng)
    return Workload(at, _crowded(at, adapter, num_adapters, crowd, rng), np.full(num_requests, run_s), num_adapters)


def read_llm_trace(path: Path, num_adapters: int, zipf: float, *, speed: float = 1.0, seed: int = 0) -> Workload:
    """A public trace of LLM requests in Azure's format: a CSV of `TIMESTAMP,ContextTokens,GeneratedTokens`.

    It names no adapters, so these are drawn. Times are divided by `speed`. Raises ScenarioError naming the line.
    """
    rows: list[tuple[float, float]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                try:
                    moment = datetime.fromisoformat(row["TIMESTAMP"][:26])
                    tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                except (KeyError, TypeError, ValueError) as error:
                    raise ScenarioError(f"{path}, line {number}: no row of such a trace ({error})") from error
                rows.append((moment.timestamp(), tokens[0] * _PREFILL_S + tokens[1] * _TOKEN_S))
    except OSError as error:
        raise ScenarioError(f"the trace cannot be read: {error}") from error
    if not rows:
        raise ScenarioError(f"{path} has no requests")
    rows.sort()
    rng = np.random.default_rng(seed)
    at = np.array([(moment - rows[0][0]) / speed for moment, _ in rows])
    run_s = np.array([seconds for _, seconds in rows])
    return Workload(at, _adapters(len(rows), num_adapters, zipf, rng), run_s, num_adapters)


def _adapters(count: int, num_adapters: int, zipf: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """All but the last one, which is the crowd's."""
    ranks = Popularity(kind="zipf", s=zipf).draw(num_adapters - 1, count, rng)
    ids: NDArray[np.int64] = rng.permutation(num_adapters - 1)[ranks]
    return ids


def _crowded(
    at: NDArray[np.float64],
    adapter: NDArray[np.int64],
    num_adapters: int,
    crowd: Crowd | None,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    if crowd is None:
        return adapter
    end = at[-1]
    is_crowd = (at >= crowd.start * end) & (at < crowd.end * end) & (rng.random(len(at)) < crowd.share)
    return np.where(is_crowd, num_adapters - 1, adapter)
