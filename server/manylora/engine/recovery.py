"""What is done when a step raises: as little as possible ends with it.

A fault may be chance, the size of the batch, one sequence, or the engine itself, and nothing it says tells which. So
the step is run again in parts, down to single sequences: who fails alone has failed, and the rest goes on. A step
with nobody's input shows whether the engine can run anything at all; where that fails, the engine has ended.

Running again changes no answer. A step writes its keys and values to the same places each time, and what it found
reaches a sequence only once it is whole; with the C++ kernels a row is the same to the last bit in any batch. Where
layers keep a state, parts of a prompt end where its pieces do; a single piece that memory is too short for runs in
halves, and their sums may differ from the whole's in the last bits.
"""

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from manylora.engine.interface import AdapterRef, SamplingParams
from manylora.engine.model_runner import Outcome
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Plan, Scheduled, Sequence
from manylora.errors import AdapterNotFinite, ModelNotFinite, NothingAllowed, SequenceFailed, quoted
from manylora.log import get_logger

__all__ = ["Fault", "FaultEvents", "Recovery", "Unrecoverable", "failure_of", "log_ended", "log_failure", "not_finite"]

_PROOFS: Final = 3  # tries of a step with nobody's input before the engine counts as dead


class Unrecoverable(Exception):
    """The engine fails without anybody's input, or cannot be brought back to a known state. The cause is chained."""


class FaultEvents:
    """Hears of every fault, once for each step that raised. Called on the engine's thread."""

    def on_step_failure(self, phase: str, result: str) -> None:
        """`result`: `retried` (nobody failed), `isolated` (a sequence did, alone) or `fatal` (the engine ended)."""

    def on_not_finite(self, ref: AdapterRef) -> None:
        """A sequence of this adapter, alone and as it is, ended because its logits were not finite."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What `phase` of a step raised. Its frames are emptied: they hold the tensors of the step."""

    phase: str
    error: Exception

    @classmethod
    def of(cls, phase: str, error: Exception) -> "Fault":
        each: BaseException | None = error
        while each is not None:
            traceback.clear_frames(each.__traceback__)
            each = each.__cause__ or each.__context__
        return cls(phase, error)

    @property
    def is_memory(self) -> bool:
        """There was no memory for it, so less at a time may go well."""
        if isinstance(self.error, MemoryError | torch.OutOfMemoryError):
            return True
        return isinstance(self.error, RuntimeError) and "allocate memory" in str(self.error)  # torch's, on CPUs


@dataclass(slots=True)
class Parts:
    """A step that was run in parts: what each of its items got, and who failed alone."""

    outcomes: list[Outcome]
    failed: list[tuple[Sequence, Fault]] = field(default_factory=list)


_Part = list[tuple[int, Scheduled]]  # some of a step's items, or pieces of them, by the item's number in the step


def failure_of(fault: Fault) -> SequenceFailed:
    """What the caller of a failed sequence is told."""
    return SequenceFailed(
        f"The engine failed on this request ({fault.phase}: {type(fault.error).__name__}); other requests were not "
        "affected. The server's log has the details. Should it fail again when it is sent again, tell the operator."
    )


def not_finite(seq: Sequence) -> SequenceFailed:
    """What the caller of a sequence is told whose logits hold NaN or infinity."""
    if not seq.mix.parts:
        return ModelNotFinite("The base model's logits for this request hold NaN or infinity, so there is no answer.")
    kind = "adapter" if seq.mix.is_plain else "mix"
    return AdapterNotFinite(
        f"With the {kind} {quoted(seq.mix.label)} this request's logits hold NaN or infinity, so there is no answer. "
        "Train the adapter again, with a lower learning rate or in float32, or go "
        "back to an earlier version."
    )


def nothing_may_come(seq: Sequence) -> NothingAllowed:
    """What the caller of a sequence is told whose own rules leave no token to go on with."""
    params = seq.params
    asked = {
        "allowed_token_ids": params.allowed_token_ids,
        "bad_words": params.bad_words,
        "what the answer must look like": params.grammar,
    }
    named = " and ".join(name for name, value in asked.items() if value)
    return NothingAllowed(
        f"After {seq.num_output_tokens} tokens of the answer no token is left that may come next: {named} rule them "
        "all out. Rule out less."
    )


class Recovery:
    """Runs again what failed; `attempt` runs a part of a step."""

    def __init__(
        self,
        scheduler: Scheduler,
        attempt: Callable[[list[Scheduled]], list[Outcome] | Fault],
        *,
        spare_block: int | None,
        events: FaultEvents,
    ) -> None:
        self._scheduler = scheduler
        self._attempt = attempt
        self._spare_block = spare_block  # of the cache, which no sequence is ever given; None: inputs run whole
        self._events = events

    # a step

    def run_in_parts(self, scheduled: list[Scheduled], fault: Fault) -> Parts:
        """Run a step that raised `fault` again, without drafts, in halves of halves. Raises Unrecoverable."""
        found = Parts([Outcome() for _ in scheduled])
        if fault.is_memory:
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where CUDA is not in use
        whole = [(i, replace(item, draft=())) for i, item in enumerate(scheduled)]
        open_parts = self._smaller(whole, fault) or [whole]
        is_proven = False
        while open_parts:
            part = open_parts.pop()
            items = [item for _, item in part]
            done = self._attempt(items)
            if isinstance(done, Fault) and len(part) == 1:
                done = self._attempt(items)  # once more, before one sequence is held to be the cause
            if not isinstance(done, Fault):
                for (number, _), outcome in zip(part, done, strict=True):
                    found.outcomes[number].add(outcome)
                is_proven = True
                continue
            if not is_proven:
                self._prove(done)
                is_proven = True
            smaller = self._smaller(part, done)
            if smaller:
                open_parts += smaller
                continue
            number, guilty = part[0]
            found.failed.append((guilty.seq, done))
            open_parts = [p for p in open_parts if p[0][0] != number]  # its later tokens
        self._tell(fault, [seq for seq, _ in found.failed])
        return found

    def _prove(self, fault: Fault) -> None:
        """Run one token of nobody's. Raises Unrecoverable where that fails, too."""
        for _ in range(_PROOFS):
            if self._spare_block is None:
                seq = Sequence("proof", [0], SamplingParams(max_tokens=0, pooling="mean"))
            else:
                seq = Sequence("proof", [0], SamplingParams(max_tokens=1, temperature=1.0, seed=0, logprobs=1))
                seq.block_table = [self._spare_block]
            if not isinstance(self._attempt([Scheduled(seq, 0, 1)]), Fault):
                return
        self._events.on_step_failure(fault.phase, "fatal")
        raise Unrecoverable from fault.error

    def _smaller(self, part: _Part, fault: Fault) -> list[_Part]:
        """A part in two, the one to run first last.

        One sequence only where memory is short, which its parts may not be, and where it may be cut at all.
        """
        half = len(part) // 2
        if half:
            return [part[half:], part[:half]]
        number, item = part[0]
        first = self._scheduler.half_of(item)
        if not first or not fault.is_memory or self._spare_block is None:
            return []
        rest = Scheduled(item.seq, item.start + first, item.num_tokens - first)
        return [[(number, rest)], [(number, Scheduled(item.seq, item.start, first))]]

    # a plan

    def plan_again(self, fault: Fault) -> Plan:
        """Plan again after planning raised `fault`: as before, then without whom it fails for. Raises Unrecoverable."""
        failed: list[Sequence] = []
        num_rounds = 0
        while isinstance(plan := self._plan(), Fault):
            guilty, is_sure = self._whose_plan_fails(plan)
            if guilty is None:
                plan = Plan()  # it has passed, and left nobody to plan for
                break
            num_rounds += 1
            if not is_sure and num_rounds < _PROOFS:
                continue
            failed.append(guilty)
            log_failure(guilty, plan)
            self._scheduler.fail(guilty, failure_of(plan))
        self._tell(fault, failed)
        return plan

    def _plan(self, only: list[Sequence] | None = None) -> Plan | Fault:
        """The scheduler's plan, or what it raised."""
        try:
            return self._scheduler.plan() if only is None else self._scheduler.plan(set(only))
        except Exception as error:  # noqa: BLE001 - whatever it is, its sequence is looked for
            return Fault.of("schedule", error)

    def _whose_plan_fails(self, fault: Fault) -> tuple[Sequence | None, bool]:
        """Whom planning fails for, None where there is nobody; and whether it does for this sequence alone.

        Raises Unrecoverable.
        """
        if all(isinstance(self._plan([]), Fault) for _ in range(_PROOFS)):
            self._events.on_step_failure(fault.phase, "fatal")
            raise Unrecoverable from fault.error
        suspects = list(self._scheduler.sequences())
        if not suspects:
            return None, False
        while len(suspects) > 1:
            half = suspects[: len(suspects) // 2]
            suspects = half if isinstance(self._plan(half), Fault) else suspects[len(half) :]
        return suspects[0], isinstance(self._plan(suspects), Fault)

    def _tell(self, fault: Fault, failed: list[Sequence]) -> None:
        self._events.on_step_failure(fault.phase, "isolated" if failed else "retried")
        if not failed:
            get_logger(__name__).warning("step_retried", phase=fault.phase, error=repr(fault.error)[:200])


def log_failure(seq: Sequence, fault: Fault) -> None:
    """The one line of a failed sequence, with the traceback."""
    get_logger(__name__).error("sequence_failed", **_named(seq), phase=fault.phase, exc_info=fault.error)


def log_ended(seq: Sequence, error: SequenceFailed) -> None:
    """The one line of a sequence that nothing was raised for."""
    get_logger(__name__).error("sequence_failed", **_named(seq), code=error.code)


def _named(seq: Sequence) -> dict[str, str | int]:
    return {"job_id": seq.request_id, "choice": seq.index, "tenant": seq.tenant, "adapter": seq.mix.label}
