"""Faults put into a step's phases, by number of the call or by the sequence that is in it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from manylora.engine.detokenizer import Detokenizer
from manylora.engine.model_runner import Outcome
from manylora.engine.recovery import FaultEvents
from manylora.engine.sequence import Plan, Scheduled, Sequence
from manylora.identity import AdapterRef
from tests.engine.harness import Rig

PHASES = ("schedule", "forward", "sample", "deliver")


class Broken(RuntimeError):
    """What the faults raise."""


@dataclass
class Faults(FaultEvents):
    """Which calls of a phase fail, and for whom. Install once on a rig; hears what the engine counts."""

    rig: Rig
    counted: list[tuple[str, str]] = field(default_factory=list)
    spoiled: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    at_call: dict[str, set[int]] = field(default_factory=lambda: {phase: set() for phase in PHASES})
    when: dict[str, Callable[[list[Sequence]], bool]] = field(default_factory=dict)
    error: Callable[[], Exception] = Broken

    def install(self) -> "Faults":
        engine, scheduler = self.rig.engine, self.rig.scheduler
        plan, forward, sample, add = scheduler.plan, engine.runner.forward, engine.runner.sample, engine.add
        engine._faults = engine._recovery._events = self

        def planned(only: Any = None) -> Plan:
            meant = [s for s in scheduler.sequences() if only is None or s in only]
            found = plan(only)  # what was planned is lost with the fault, as it would be in the middle
            self._check("schedule", meant)
            return found

        def forwarded(scheduled: list[Scheduled]) -> Any:
            logits = forward(scheduled)
            self._check("forward", [item.seq for item in scheduled])
            return logits

        def sampled(scheduled: list[Scheduled], logits: Any) -> list[Outcome]:
            result = sample(scheduled, logits)
            self._check("sample", [item.seq for item in scheduled])
            return result

        def added(seq: Sequence) -> None:
            add(seq)
            for each in (seq, *seq.followers):
                if each.detokenizer is not None:
                    each.detokenizer.add = self._delivering(each, each.detokenizer)  # type: ignore[method-assign,assignment]

        scheduler.plan = planned  # type: ignore[method-assign]
        engine.runner.forward = forwarded  # type: ignore[method-assign,assignment]
        engine.runner.sample = sampled  # type: ignore[method-assign,assignment]
        engine.add = added  # type: ignore[method-assign]
        return self

    def _delivering(self, seq: Sequence, detokenizer: Detokenizer) -> Callable[[Iterable[int]], str]:
        add = detokenizer.add

        def delivered(token_ids: Any) -> str:
            self._check("deliver", [seq])
            return add(token_ids)

        return delivered

    def _check(self, phase: str, seqs: list[Sequence]) -> None:
        self.calls[phase] += 1
        if self.calls[phase] in self.at_call[phase] or (phase in self.when and self.when[phase](seqs)):
            raise self.error()

    def after(self, phase: str, *calls: int) -> None:
        """Let the calls with these numbers fail, counted from now."""
        self.at_call[phase] |= {self.calls[phase] + call for call in calls}

    def of(self, phase: str, request_id: str, num_tokens: int = 0) -> None:
        """Let every call fail that has this request's sequence, once it has so many tokens of output."""
        self.when[phase] = lambda seqs: any(
            s.request_id == request_id and s.num_output_tokens >= num_tokens for s in seqs
        )

    def clear(self) -> None:
        self.when.clear()
        for calls in self.at_call.values():
            calls.clear()
        self.counted.clear()
        self.spoiled.clear()

    def on_step_failure(self, phase: str, result: str) -> None:
        self.counted.append((phase, result))

    def on_not_finite(self, ref: AdapterRef) -> None:
        self.spoiled.append(ref.name)
