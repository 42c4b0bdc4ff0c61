"""Proof at start that the wrapped model computes what the untouched one did.

An architecture with a twist that the wrapping does not know of (an odd position encoding, a cache shared
between layers) would otherwise be served wrongly without a word.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from manylora.errors import ModelUnusable
from manylora.kernels.batch import Batch
from manylora.kernels.interface import LoraPlan, plan_of
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.slots import Place
from manylora.models.kv_cache import KVCache
from manylora.models.probes import PROBE_STRENGTH, Probe, ProbeAdapter
from manylora.models.refusals import refusing
from manylora.models.states import cut
from manylora.models.wrapping import WrappedModel

__all__ = ["SelfCheck", "single_sequence"]

_CHUNK = 7  # tokens of a probe in the first step

_STRONG = 1.0  # the adapter's strength there


@dataclass(frozen=True, slots=True)
class _Run:
    """One sequence of a trial: a probe's tokens, with its adapter or without, in blocks of its own."""

    probe: Probe
    is_adapted: bool
    first_block: int

    @property
    def expected(self) -> torch.Tensor:
        return self.probe.adapted if self.is_adapted else self.probe.base


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A layer's arguments in one step, and what it made of them: the residual stream [1, T, hidden]."""

    before: torch.Tensor
    kwargs: Mapping[str, Any]
    after: torch.Tensor


class SelfCheck:
    """Runs the survey's probes through the wrapped model, all in one batch, so that neighbours are proven apart too."""

    def __init__(self, wrapped: WrappedModel, cache: KVCache) -> None:
        self._wrapped = wrapped
        self._cache = cache
        self._backend = wrapped.backend
        self._tolerance = wrapped.backend.tolerance(wrapped.model.dtype)
        self._memory = self._load_adapter(PROBE_STRENGTH)

    def _load_adapter(self, strength: float) -> DeviceMemory:
        wrapped = self._wrapped
        packed = ProbeAdapter(wrapped.survey.modules, wrapped.model.dtype, strength).packed(wrapped.sites)
        memory = DeviceMemory(len(wrapped.modules), 1, self._backend.device, self._backend.allocate)
        place = Place(0, 0, 0, is_new_slab=True)
        memory.allocate(place, packed.layout, 1)
        memory.fill(place, packed)
        memory.publish(place, packed)
        return memory

    def check(self) -> None:
        """The whole model against the untouched one. Raises ModelUnusable when the logits differ."""
        with refusing(self._wrapped.model, "it was checked"):
            for runs in self._groups():
                self._check(runs)
        if self._wrapped.states is not None:
            self._wrapped.states.clear()

    def _check(self, runs: list[_Run]) -> None:
        found: list[list[torch.Tensor]] = [[] for _ in runs]
        wanted: list[list[torch.Tensor]] = [[] for _ in runs]
        for spans in self._steps(runs):
            # Of a chunk some rows' logits are left out, as in a prompt: what runs on logit rows only has to keep up.
            rows = [
                list(range(end - start)) if end - start == 1 else list(range(1, end - start)) for start, end in spans
            ]
            logits = iter(self._run(runs, spans, rows))
            for i, (start, _) in enumerate(spans):
                for row in rows[i]:
                    found[i].append(next(logits))
                    wanted[i].append(runs[i].expected[start + row])
        for i, run in enumerate(runs):
            self._compare(run, torch.stack(found[i]), torch.stack(wanted[i]))

    def _compare(self, run: _Run, found: torch.Tensor, wanted: torch.Tensor) -> None:
        difference = float((found - wanted).square().mean().sqrt() / wanted.std().clamp(min=1e-6))
        if not difference <= self._tolerance.model:
            where = f" from position {run.probe.start} on" if run.probe.start else ""
            whose = " with an adapter on every module" if run.is_adapted else ""
            raise ModelUnusable(
                f"{type(self._wrapped.model).__name__} computes something that this server does not reproduce{where}"
                f"{whose} (logits differ by {difference:.3g} of their spread, {self._tolerance.model:.3g} is allowed)."
            )

    def proven(self, candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Which of `candidates` compute what the layers at their paths do, early and far out, adapted and not.

        A candidate takes the residual stream, which it changes in place, and the layer's keyword arguments.
        """
        good = dict(candidates)
        if not good:
            return good
        gentle, self._memory = self._memory, self._load_adapter(_STRONG)
        with refusing(self._wrapped.model, "it was checked"):
            for runs in self._groups():
                length = runs[0].probe.token_ids.shape[0]
                for spans in ([(0, length - 1)] * len(runs), [(length - 1, length)] * len(runs)):
                    with self._recording(good) as recorded, self._batch(runs, spans, [[0] for _ in spans]):
                        self._forward()
                        counts = [end - start for start, end in spans]
                        good = {path: c for path, c in good.items() if self._agrees(c, recorded.get(path), counts)}
        self._memory = gentle
        return good

    def _agrees(self, candidate: nn.Module, layer: _Recorded | None, counts: list[int]) -> bool:
        if layer is None:
            return False
        after = layer.before.clone()
        try:
            candidate(after, **layer.kwargs)
        except Exception:  # noqa: BLE001 - it does not fit, for whatever reason
            return False
        runs = (torch.split(stream[0], counts) for stream in (after, layer.after, layer.before))
        for found, wanted, before in zip(*runs, strict=True):
            # A step of the stream's own format is each number's due; a few channels of it are often huge.
            due = torch.finfo(wanted.dtype).eps * wanted.float().abs()
            excess = ((found.float() - wanted.float()).abs() - due).clamp(min=0)
            if not _rms(excess) <= self._tolerance.layer * _rms(wanted.float() - before.float()):
                return False
        return True

    @contextmanager
    def _recording(self, paths: Mapping[str, nn.Module]) -> Iterator[dict[str, _Recorded]]:
        recorded: dict[str, _Recorded] = {}
        handles = []
        for path in paths:
            entered: list[tuple[torch.Tensor, Mapping[str, Any]]] = []

            def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kept: Any = entered) -> None:
                given = dict(kwargs)
                hidden = args[0] if args else given.pop("hidden_states")
                kept.append((hidden.clone(), given))

            def leave(_module: nn.Module, _args: Any, out: Any, kept: Any = entered, path: str = path) -> None:
                after = out[0] if isinstance(out, tuple) else out
                before, given = kept.pop()
                recorded[path] = _Recorded(before, given, after.clone())

            layer = self._wrapped.model.get_submodule(path)
            handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(leave))
        try:
            yield recorded
        finally:
            for handle in handles:
                handle.remove()

    def _groups(self) -> Iterator[list[_Run]]:
        """All sequences, as many at a time as the cache has room for."""
        probes = self._wrapped.survey.probes
        blocks = -(-probes[0].token_ids.shape[0] // self._cache.block_size)
        wanted = [(probe, is_adapted) for probe in probes for is_adapted in (False, True)]
        size = max(1, self._cache.num_blocks // blocks)
        for at in range(0, len(wanted), size):
            yield [_Run(*each, blocks * number) for number, each in enumerate(wanted[at : at + size])]

    @staticmethod
    def _steps(runs: list[_Run]) -> Iterator[list[tuple[int, int]]]:
        """Each sequence's span of tokens, step by step: a chunk, one token, another chunk on top of both, one more."""
        length = runs[0].probe.token_ids.shape[0]
        bounds = sorted({0, min(_CHUNK, length - 1), min(_CHUNK + 1, length - 1), length - 1, length})
        for start, end in itertools.pairwise(bounds):
            yield [(start, end)] * len(runs)

    def _run(self, runs: list[_Run], spans: list[tuple[int, int]], rows: list[list[int]]) -> torch.Tensor:
        """Logits, float32 [rows wanted, vocab]."""
        with self._batch(runs, spans, rows):
            return self._forward()

    @torch.inference_mode()
    def _forward(self) -> torch.Tensor:
        batch = self._wrapped.context.current()
        output = self._wrapped.model(
            input_ids=batch.token_ids[None],
            position_ids=self._wrapped.position_ids(batch),
            use_cache=False,
            logits_to_keep=batch.logit_rows,
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    @contextmanager
    def _batch(self, runs: list[_Run], spans: list[tuple[int, int]], rows: list[list[int]]) -> Iterator[None]:
        with torch.inference_mode():
            self._wrapped.context.batch = self._build(runs, spans, rows)
            try:
                yield
            finally:
                self._wrapped.context.batch = None

    def _build(self, runs: list[_Run], spans: list[tuple[int, int]], rows: list[list[int]]) -> Batch:
        device, size = self._memory.device, self._cache.block_size
        counts = [end - start for start, end in spans]
        starts = [0, *np.cumsum(counts).tolist()]
        blocks = -(-runs[0].probe.token_ids.shape[0] // size)
        numbers = [torch.arange(start, end, device=device) for start, end in spans]
        slots = np.repeat(np.array([0 if run.is_adapted else -1 for run in runs], dtype=np.int32), counts)
        logit_rows = [starts[i] + row for i, wanted in enumerate(rows) for row in wanted]
        batch = Batch(
            token_ids=torch.cat([run.probe.token_ids[a:b] for run, (a, b) in zip(runs, spans, strict=True)]),
            positions=torch.cat([n + run.probe.start for run, n in zip(runs, numbers, strict=True)]),
            kv_slots=torch.cat([n + run.first_block * size for run, n in zip(runs, numbers, strict=True)]),
            block_tables=torch.tensor(
                [list(range(run.first_block, run.first_block + blocks)) for run in runs],
                dtype=torch.int32,
                device=device,
            ),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor([end for _, end in spans], dtype=torch.int32, device=device),
            num_decode=sum(count == 1 for count in counts),
            starts=tuple(starts),
            lens=tuple(end for _, end in spans),
            logit_rows=torch.tensor(logit_rows, device=device),
            lora=self._plan(slots),
            logit_lora=self._plan(slots[logit_rows]),
        )
        store = self._wrapped.states
        if store is None:
            return batch
        at_once = self._wrapped.survey.continues
        sizes = [(n,) if at_once or not start else (1,) * n for n, (start, _) in zip(counts, spans, strict=True)]
        states = [
            store.begin(i, start, size, committed=start)
            for i, ((start, _), size) in enumerate(zip(spans, sizes, strict=True))
        ]
        return replace(batch, pieces=cut(batch, sizes, states, slots, self._plan))

    def _plan(self, slots: np.ndarray) -> LoraPlan | None:
        return plan_of(self._backend.lora, self._memory, slots)


def _rms(values: torch.Tensor) -> float:
    return float(values.float().square().mean().sqrt())


def single_sequence(token_ids: torch.Tensor, start: int, cache: KVCache) -> Batch:
    """A batch of one sequence's tokens from position `start` on, in blocks 0, 1, 2… of the cache."""
    count = token_ids.shape[0]
    device = token_ids.device
    positions = torch.arange(start, start + count, device=device)
    num_blocks = -(-(start + count) // cache.block_size)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        kv_slots=positions,
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        context_lens=torch.tensor([start + count], dtype=torch.int32, device=device),
        num_decode=int(count == 1),
        starts=(0, count),
        lens=(start + count,),
        logit_rows=torch.arange(count, device=device),
    )
