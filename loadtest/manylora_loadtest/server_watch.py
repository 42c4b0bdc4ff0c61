"""Watches the server while the load runs: its process's memory, files and threads, its blocks and slots in use.

What leaks grows for as long as the load lasts. Growth is the median of the run's last quarter less that of its second
one: the first quarter is left to what fills up once (caches, pools), and medians do not care about single peaks.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import aiohttp
import psutil

from manylora_loadtest.client import Client
from manylora_loadtest.stream import authorization

__all__ = ["ServerFigures", "ServerSample", "ServerWatch", "server_figures"]

_EVERY_S: Final = 1.0
_SETTLED_WITHIN_S: Final = 60.0
_MEGABYTE: Final = 1e6


@dataclass(frozen=True, slots=True)
class ServerSample:
    """The server at one moment; None for what could not be seen. `memory_bytes` is its own, without mapped files."""

    at_s: float
    memory_bytes: int | None = None
    open_files: int | None = None
    threads: int | None = None
    running: int | None = None
    waiting: int | None = None
    kv_blocks: int | None = None
    slots: int | None = None


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """How much more there was in the last quarter than in the second, and what was still in use at the end."""

    memory_growth_mb: float | None
    open_files_growth: float | None
    threads_growth: float | None
    kv_blocks_growth: float | None
    slots_growth: float | None
    kv_blocks_left: int | None
    slots_left: int | None


class ServerWatch:
    """Samples once a second. `pid`: the server's process on this machine; None leaves its memory and files unseen."""

    def __init__(self, client: Client, key: str | None, clock: Callable[[], float], pid: int | None) -> None:
        self._client = client
        self._key = key
        self._clock = clock
        self._pid = pid
        self.samples: list[ServerSample] = []

    async def sample(self) -> None:
        """Runs until cancelled."""
        while self._pid is not None:
            self.samples.append(await self._look())
            await asyncio.sleep(_EVERY_S)

    async def settle(self) -> None:
        """The load is over: wait for what still runs, for a while, and take the last sample."""
        if self._pid is None:
            return
        until_s = self._clock() + _SETTLED_WITHIN_S
        while (last := await self._look()).running != 0 or last.waiting or last.kv_blocks or last.slots:
            if self._clock() > until_s:
                break
            await asyncio.sleep(0.2)
        self.samples.append(last)

    async def _look(self) -> ServerSample:
        stats = await self._stats()
        seen: dict[str, int | None] = {
            "running": stats.get("running"),
            "waiting": stats.get("waiting"),
            "kv_blocks": stats.get("kv_blocks_used"),
            "slots": stats.get("slots_used"),
        }
        try:
            process = psutil.Process(self._pid)
            memory = process.memory_info()
            seen["memory_bytes"] = memory.rss - getattr(memory, "shared", 0)
            seen["open_files"] = process.num_fds()
            seen["threads"] = process.num_threads()
        except psutil.Error:  # it ended
            pass
        return ServerSample(self._clock(), **seen)

    async def _stats(self) -> dict[str, Any]:
        try:
            headers = authorization(self._key)
            async with self._client.session.get(self._client.url + "/v1/stats", headers=headers) as response:
                stats = await response.json(content_type=None) if response.status == 200 else {}
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return {}
        return stats if isinstance(stats, dict) else {}


def server_figures(samples: Sequence[ServerSample], start_s: float, end_s: float) -> ServerFigures | None:
    """None where nothing was watched. `start_s`, `end_s`: of the load, between which growth is measured."""
    if not samples:
        return None
    quarter_s = (end_s - start_s) / 4
    early = [s for s in samples if start_s + quarter_s <= s.at_s < start_s + 2 * quarter_s]
    late = [s for s in samples if start_s + 3 * quarter_s <= s.at_s <= end_s]

    def growth(name: str, unit: float = 1.0) -> float | None:
        before, after = (
            [value for sample in part if (value := getattr(sample, name)) is not None] for part in (early, late)
        )
        return (median(after) - median(before)) / unit if before and after else None

    return ServerFigures(
        memory_growth_mb=growth("memory_bytes", _MEGABYTE),
        open_files_growth=growth("open_files"),
        threads_growth=growth("threads"),
        kv_blocks_growth=growth("kv_blocks"),
        slots_growth=growth("slots"),
        kv_blocks_left=samples[-1].kv_blocks,
        slots_left=samples[-1].slots,
    )
