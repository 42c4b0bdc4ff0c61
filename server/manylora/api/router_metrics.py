"""`/metrics/router`: what a router in front of several servers reads, by the names that vLLM and its routers use.

An endpoint picker of the Gateway API Inference Extension, or of llm-d, sends a request to a server whose queue is short
and which has the request's adapter in memory. It looks up the request's `model`, so adapters are listed by every name
that a client may send for the version that is there.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from manylora.catalog.interface import AdapterDirectory, Following
from manylora.engine.interface import AdapterRef, EngineClient, Residency
from manylora.errors import AdapterNotFound

__all__ = ["RouterMetrics"]

_LEVELS = {"device": "gpu", "host": "cpu"}


class RouterMetrics:
    """The text for one server. What it says of adapters is made again when it has changed, and not for each scrape."""

    def __init__(
        self, engine: EngineClient, directory: AdapterDirectory, following: Following | None, block_size: int
    ) -> None:
        """`following` tells when the directory has changed; without it, it is asked at each scrape."""
        self._engine = engine
        self._directory = directory
        self._following = following
        self._block_size = block_size
        self._residency: Residency | None = None
        self._revision: int | None = None
        self._names: dict[str, tuple[str, ...]] = {}  # by the version's id
        self._adapters = ""
        self._changed_at = time.time()

    def render(self) -> bytes:
        """Prometheus' text format."""
        stats, residency = self._engine.stats(), self._engine.residency()
        revision = None if self._following is None else self._following.revision
        if revision is None or (residency, revision) != (self._residency, self._revision):
            if self._residency is None or residency.activity != self._residency.activity:
                self._changed_at = time.time()
            self._residency, self._revision = residency, revision
            self._names = {ref.id: tuple(self._names_of(ref)) for ref in residency.refs()}
            self._adapters = "".join(self._adapter_lines(residency))
        model = f'model_name="{_escaped(self._engine.model.name)}"'
        used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        config = f'{model},block_size="{self._block_size}",num_gpu_blocks="{stats.kv_blocks_total}"'
        lines = [
            *_gauge("num_requests_waiting", "Requests that wait.", [(model, stats.waiting)]),
            *_gauge("num_requests_running", "Requests in the running batch.", [(model, stats.running)]),
            *_gauge("kv_cache_usage_perc", "Share of the KV cache's blocks in use; 1 is all.", [(model, used)]),
            *_gauge("cache_config_info", "The KV cache's size.", [(config, 1)]),
            *_gauge("max_gpu_lora_adapters", "Slots for adapters.", [(model, residency.num_slots)]),
            *_gauge("num_gpu_loaded_lora_adapters", "Adapters in slots.", [(model, len(residency.device))]),
            *_gauge("num_cpu_loaded_lora_adapters", "Adapters in host memory.", [(model, len(residency.host))]),
        ]
        return ("".join(lines) + self._adapters).encode()

    def _adapter_lines(self, residency: Residency) -> Iterator[str]:
        model = f'model_name="{_escaped(self._engine.model.name)}"'
        running, waiting = (",".join(self._all_names(refs)) for refs in residency.activity)
        labels = f'max_lora="{residency.num_slots}",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
        text = "Adapters of requests that run and that wait, and when these changed last."
        yield from _gauge("lora_requests_info", text, [(labels, round(self._changed_at, 3))])
        rows: dict[str, str] = {}
        for tier in ("host", "device"):  # an adapter in both is nearest on the device
            for ref in getattr(residency, tier):
                is_pinned = str(ref.id in residency.pinned).lower()
                facts = f'level="{_LEVELS[tier]}",pinned="{is_pinned}",rank="{self._directory.rank_of(ref)}"'
                rows.update(dict.fromkeys(self._names[ref.id], facts))
        loaded = [(f'{model},adapter_name="{name}",{facts}', 1) for name, facts in sorted(rows.items())]
        yield from _gauge("lora_adapter_loaded", "1 for each name of an adapter in memory.", loaded)

    def _all_names(self, refs: Iterable[AdapterRef]) -> list[str]:
        return sorted({name for ref in refs for name in self._names[ref.id]})

    def _names_of(self, ref: AdapterRef) -> Iterator[str]:
        """Names that lead to this version, for its owner at least; without a number where it is the active one."""
        for label, version in ((ref.name, None), (ref.label, ref.version)):
            with suppress(AdapterNotFound):  # one that is tried before it is published, or was deleted
                if self._directory.resolve(ref.tenant, ref.name, version) == ref:
                    yield label
                    yield f"{ref.tenant}/{label}"


def _gauge(name: str, text: str, samples: Iterable[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP vllm:{name} {text}\n# TYPE vllm:{name} gauge\n"
    for labels, value in samples:
        yield f"vllm:{name}{{{labels}}} {float(value)!r}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
