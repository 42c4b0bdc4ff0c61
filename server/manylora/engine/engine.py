"""The engine: sequences go in, a step at a time their tokens come out. Synchronous, single-threaded."""

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from manylora.engine.constraints import Constraints, is_late
from manylora.engine.detokenizer import Decode, Detokenizer
from manylora.engine.interface import Delta, FinishReason, Task, TokenLogprob
from manylora.engine.model_runner import Outcome, Runner, allowed_bits
from manylora.engine.pooling import Pool
from manylora.engine.recovery import (
    Fault,
    FaultEvents,
    Recovery,
    failure_of,
    log_ended,
    log_failure,
    not_finite,
    nothing_may_come,
)
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Scheduled, Sequence
from manylora.engine.speech_rules import SpeechRules
from manylora.engine.token_rules import Rules, TokenRules
from manylora.errors import ManyloraError
from manylora.grammars.masks import MaskMaker
from manylora.threads import Home

PhaseObserver = Callable[[str, float], None]  # phase, seconds


@dataclass(frozen=True, slots=True)
class Output:
    """One sequence's share of a step. `captured`: the prompt's logits, float32 [positions, vocab], where asked for."""

    seq: Sequence
    delta: Delta
    error: ManyloraError | None = None
    captured: np.ndarray | None = None


class Engine:
    """Scheduler, runner and detokenizers, in the order of a step. Used on one thread, whichever is the first."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        decode: Decode,
        eos_ids: frozenset[int],
        max_model_len: int,
        observe: PhaseObserver | None = None,
        faults: FaultEvents | None = None,
        masks: MaskMaker | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._decode = decode
        self._eos_ids = eos_ids
        self._max_model_len = max_model_len
        self._vocab_size = runner.vocab_size
        self._observe = observe or (lambda _phase, _seconds: None)
        self._faults = faults or FaultEvents()
        self._constraints = Constraints(masks or MaskMaker(eos_ids))
        self._recovery = Recovery(scheduler, self._attempt, spare_block=runner.spare_block, events=self._faults)
        self._home = Home()
        self._phase = "schedule"  # of the step, as the metrics call it
        self.num_steps = 0
        self.made_progress = False

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, seq: Sequence) -> None:
        assert self._home.is_here()
        for each in (seq, *seq.followers):
            each.detokenizer = self._detokenizer(each)
            each.max_num_tokens = min(each.max_num_tokens, self._max_model_len - each.num_virtual)
            each.rules = self._rules(each)
            self._constraints.add(each)
        self.scheduler.add(seq)

    def _rules(self, seq: Sequence) -> Rules | None:
        vocab_size = seq.mix.vocab_size(self._vocab_size)
        if seq.params.speech is not None:
            return SpeechRules(seq.params.speech, vocab_size)
        return TokenRules.of(seq.params, self._ends_of(seq), vocab_size)

    def _ends_of(self, seq: Sequence) -> frozenset[int]:
        """The tokens that end a sequence, unless its request ignores them."""
        return self._eos_ids if seq.end_id is None else self._eos_ids | {seq.end_id}

    def _detokenizer(self, seq: Sequence) -> Detokenizer:
        params, decode = seq.params, seq.decode or self._decode
        return Detokenizer(
            decode if params.skip_special_tokens else partial(decode, skip_special_tokens=False),
            seq.tokens[: seq.num_prompt_tokens],
            params.stop,
            min_tokens=params.min_tokens,
            include_stop=params.include_stop,
        )

    def abort(self, seqs: list[Sequence]) -> None:
        """Take sequences out, wherever they are; their blocks are free at once."""
        assert self._home.is_here()
        for seq in seqs:
            self.scheduler.finish(seq, FinishReason.ABORTED)

    def fail(self, seqs: list[Sequence], error: Exception) -> list[Output]:
        """End these sequences, wherever they are, because what was to be done with them raised `error`."""
        assert self._home.is_here()
        fault = Fault.of("request", error)
        self._faults.on_step_failure(fault.phase, "isolated")
        return [self._end_alone(seq, fault) for seq in seqs if not seq.is_finished]

    def step(self) -> list[Output]:
        """Run one step. Returns nothing when everything that could run waits for its adapter.

        A sequence that the step fails for ends alone. Raises Unrecoverable when the engine runs nothing any more.
        """
        assert self._home.is_here()
        began = time.perf_counter()
        outputs = [self._go_on(seq) for seq in self._constraints.due()]
        try:
            plan = self.scheduler.plan()
        except Exception as error:  # noqa: BLE001 - whatever it is, its sequence is looked for
            plan = self._recovery.plan_again(Fault.of("schedule", error))
        self._lap("schedule", began)
        outputs += [_failure(seq, error) for seq, error in self.scheduler.take_failed()]
        self.made_progress = bool(plan.scheduled)
        if not plan.scheduled:
            return outputs
        planned = time.perf_counter()
        outcomes, sampled = self._outcomes(plan.scheduled, outputs)
        self.scheduler.ran(plan, sampled - planned)
        for item, outcome in zip(plan.scheduled, outcomes, strict=True):
            output = self._commit(item, outcome) if not item.seq.is_finished else None
            if output is not None:
                outputs.append(output)
        self._lap("deliver", sampled)
        self.num_steps += 1
        return outputs

    def _outcomes(self, scheduled: list[Scheduled], outputs: list[Output]) -> tuple[list[Outcome], float]:
        """What each item gets, and when the step's sampling was done. Who failed alone is ended, in `outputs`."""
        outcomes = self._attempt(scheduled)
        sampled = time.perf_counter()
        if isinstance(outcomes, Fault):
            parts = self._recovery.run_in_parts(scheduled, outcomes)
            outputs += [self._end_alone(seq, fault, is_spoiled=True) for seq, fault in parts.failed]
            return parts.outcomes, sampled
        spoiled = [i for i, item in enumerate(scheduled) if item.draft and not outcomes[i].is_finite]
        if spoiled:  # attention multiplies what a draft made with zeros for those before it, and NaN stays NaN
            again, _ = self._outcomes([replace(scheduled[i], draft=()) for i in spoiled], outputs)
            for i, outcome in zip(spoiled, again, strict=True):
                outcomes[i] = outcome
        return outcomes, sampled

    def _attempt(self, scheduled: list[Scheduled]) -> list[Outcome] | Fault:
        try:
            return self._run(scheduled)
        except Exception as error:  # noqa: BLE001 - whatever it is, the step is run in parts
            return Fault.of(self._phase, error)

    def _run(self, scheduled: list[Scheduled]) -> list[Outcome]:
        """Forward and sample; no sequence changes."""
        began = time.perf_counter()
        self._phase = "forward"
        logits = self.runner.forward(scheduled)
        forwarded = self._lap(self._phase, began)
        self._phase = "sample"
        self._constraints.wait(scheduled)
        outcomes = self.runner.sample(scheduled, logits)
        self._lap(self._phase, forwarded)
        return outcomes

    def close(self) -> None:
        """End what works beside it."""
        self._constraints.close()

    def _lap(self, phase: str, since: float) -> float:
        now = time.perf_counter()
        self._observe(phase, now - since)
        return now

    def _end_alone(self, seq: Sequence, fault: Fault, *, is_spoiled: bool = False) -> Output:
        log_failure(seq, fault)
        return self._end(seq, failure_of(fault), is_spoiled=is_spoiled)

    def _end(self, seq: Sequence, error: ManyloraError, *, is_spoiled: bool = False) -> Output:
        if is_spoiled:
            self.scheduler.blocks.spoil(seq)
        self.scheduler.finish(seq, FinishReason.ERROR)
        return _failure(seq, error)

    def _commit(self, item: Scheduled, outcome: Outcome) -> Output | None:
        """Give a sequence what the step found for it."""
        seq = item.seq
        if outcome.error is not None:
            return self._end(seq, outcome.error)
        if not outcome.is_finite and _is_dead_end(seq):
            return self._end(seq, nothing_may_come(seq))
        if not outcome.is_finite and not seq.capture_logits:
            return self._end_not_finite(seq)
        if is_late(item, outcome):
            return None  # the same is run again
        try:
            self._take_prompt(item, outcome)
            self.scheduler.commit(item)
            return self._finish_step(item, outcome) if item.reaches_end else None
        except Exception as error:  # noqa: BLE001 - whatever it is, it is of this sequence alone
            fault = Fault.of("deliver", error)
            self._faults.on_step_failure(fault.phase, "isolated")
            return self._end_alone(seq, fault, is_spoiled=not seq.is_finished)

    def _end_not_finite(self, seq: Sequence) -> Output:
        if seq.mix.parts and seq.mix.is_plain:  # of a mix nobody knows which part it was, or whether any is to blame
            self._faults.on_not_finite(seq.mix.refs[0])
        error = not_finite(seq)
        log_ended(seq, error)
        return self._end(seq, error, is_spoiled=True)

    def _take_prompt(self, item: Scheduled, outcome: Outcome) -> None:
        """What the logits of its prompt told, where they were asked for."""
        seq = item.seq
        if seq.params.pooling is not None and outcome.pooled is None:
            if item.begins or seq.pool is None:
                seq.pool = Pool(seq.params.pooling)
            seq.pool.add(outcome.hidden)
        if not seq.scores_prompt:
            return
        if item.begins:
            seq.prompt_logprobs, seq.captured = [], []
        seq.prompt_logprobs += outcome.prompt_logprobs
        seq.captured += outcome.captured

    def _finish_step(self, item: Scheduled, outcome: Outcome) -> Output:
        """All of the sequence's tokens have run: do what it is for."""
        seq = item.seq
        if seq.first_token_s is None:
            seq.first_token_s = time.monotonic()
        match seq.task:
            case Task.GENERATE:
                return self._advance(item, outcome)
            case Task.SCORE:
                return self._end_scored(seq)
            case Task.POOL:
                return self._end_pooled(seq, outcome)

    def _advance(self, item: Scheduled, outcome: Outcome) -> Output:
        """Give a sequence its new tokens, and end it where a stop condition holds."""
        seq = item.seq
        if seq.constraint is not None and not outcome.token_ids:
            return self._go_on(seq)
        before = seq.num_tokens
        text, reason = self._append(seq, outcome.token_ids)
        num_taken = seq.num_tokens - before
        num_accepted = min(outcome.num_accepted, num_taken - 1) if item.draft else 0
        if item.draft:
            self.scheduler.accept(item, num_accepted)
        if reason is None and seq.constraint is not None:
            seq.constraint.advance(seq.tokens[before:])
        output = self._taken(seq, num_taken, text, reason, outcome.logprobs)
        if item.draft:
            output = replace(
                output, delta=replace(output.delta, num_drafted=len(item.draft), num_accepted=num_accepted)
            )
        return output

    def _go_on(self, seq: Sequence) -> Output:
        """Give a sequence what its grammar says must come, or end it where that says that nothing may."""
        constraint = seq.constraint
        assert constraint is not None
        try:
            if constraint.error is not None:
                return self._end(seq, constraint.error)
            before = seq.num_tokens
            text, reason = self._append(seq, constraint.take_forced())
            if reason is None and constraint.is_complete:
                assert seq.detokenizer is not None
                text, reason = text + seq.detokenizer.flush(), FinishReason.STOP
            return self._taken(seq, seq.num_tokens - before, text, reason)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is of this sequence alone
            fault = Fault.of("deliver", error)
            self._faults.on_step_failure(fault.phase, "isolated")
            return self._end_alone(seq, fault)

    def _taken(
        self,
        seq: Sequence,
        num_taken: int,
        text: str,
        reason: FinishReason | None,
        logprobs: SequenceOf[TokenLogprob] = (),
    ) -> Output:
        """The share of a sequence that took so many tokens, and ended for this reason if there is one."""
        is_first = num_taken == seq.num_output_tokens
        self.scheduler.charge_output(seq, num_taken)
        stop_reason = self._stopped_by(seq) if reason is FinishReason.STOP else None
        if reason is not None:
            self.scheduler.finish(seq, reason)
        delta = Delta(
            seq.index,
            text,
            tuple(seq.tokens[seq.num_tokens - num_taken :]),
            logprobs=tuple(logprobs[:num_taken]),
            finish_reason=reason,
            prompt_logprobs=tuple(seq.prompt_logprobs) if is_first else (),
            num_cached_tokens=seq.num_cached_tokens if is_first and seq.index == 0 else 0,
            stop_reason=stop_reason,
        )
        return Output(seq, delta, captured=_captured(seq))

    def _append(self, seq: Sequence, token_ids: SequenceOf[int]) -> tuple[str, FinishReason | None]:
        """Append tokens up to the first at which the sequence ends; their text, and why it ends if it does."""
        detokenizer = seq.detokenizer
        assert detokenizer is not None
        text = ""
        for token_id in token_ids:
            seq.append(token_id)
            reason = self._stop_reason(seq, token_id)
            if reason is not FinishReason.STOP or seq.params.include_stop:
                text += detokenizer.add([token_id])
            if reason is not None or detokenizer.is_stopped:
                text += detokenizer.flush()
                return text, FinishReason.STOP if detokenizer.is_stopped else reason
        return text, None

    def _end_scored(self, seq: Sequence) -> Output:
        """The prompt alone was asked for, to be scored or brought into the cache."""
        self.scheduler.finish(seq, FinishReason.LENGTH)
        delta = Delta(
            seq.index,
            "",
            (),
            finish_reason=FinishReason.LENGTH,
            prompt_logprobs=tuple(seq.prompt_logprobs),
            num_cached_tokens=seq.num_cached_tokens if seq.index == 0 else 0,
        )
        return Output(seq, delta, captured=_captured(seq))

    def _stopped_by(self, seq: Sequence) -> str | int | None:
        """What of the request has ended a sequence: a stop string, or a token that is not the model's own end."""
        if seq.detokenizer is not None and seq.detokenizer.stopped_by is not None:
            return seq.detokenizer.stopped_by
        last = seq.tokens[-1]
        is_named = last in seq.params.stop_token_ids and (last not in self._ends_of(seq) or seq.params.ignore_eos)
        return last if is_named else None

    def _end_pooled(self, seq: Sequence, outcome: Outcome) -> Output:
        """One vector was asked for."""
        vector = outcome.pooled
        if vector is None:
            assert seq.pool is not None
            vector = seq.pool.vector
        if not np.isfinite(vector).all():
            return self._end_not_finite(seq)
        self.scheduler.finish(seq, FinishReason.STOP)
        cached = seq.num_cached_tokens
        stop = FinishReason.STOP
        delta = Delta(seq.index, "", (), finish_reason=stop, num_cached_tokens=cached, pooled=vector, head=outcome.head)
        return Output(seq, delta)

    def _stop_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        params = seq.params
        is_end = token_id in self._eos_ids or token_id == seq.end_id
        if token_id in params.stop_token_ids or (is_end and not params.ignore_eos):
            return FinishReason.STOP
        if seq.num_tokens >= seq.max_num_tokens:
            return FinishReason.LENGTH
        return None


def _is_dead_end(seq: Sequence) -> bool:
    """Whether the request's own rules leave no token that could come next."""
    bits = allowed_bits(seq) if seq.rules is not None else None
    return bits is not None and not bits.any()


def _captured(seq: Sequence) -> np.ndarray | None:
    return np.concatenate(seq.captured) if seq.captured else None


def _failure(seq: Sequence, error: ManyloraError) -> Output:
    return Output(seq, Delta(seq.index, "", (), finish_reason=FinishReason.ERROR), error)
