"""The engine: sequences go in, a step at a time their tokens come out. Synchronous, single-threaded."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from manylora.engine.detokenizer import Decode, Detokenizer
from manylora.engine.interface import Delta, FinishReason
from manylora.engine.model_runner import ModelRunner, StepResult
from manylora.engine.scheduler import Plan, Scheduled, Scheduler
from manylora.engine.sequence import Sequence
from manylora.errors import ManyloraError

PhaseObserver = Callable[[str, float], None]  # phase, seconds


@dataclass(frozen=True, slots=True)
class Output:
    """One sequence's share of a step. `captured`: the prompt's logits [positions, vocab], where asked for."""

    seq: Sequence
    delta: Delta
    error: ManyloraError | None = None
    captured: torch.Tensor | None = None


class Engine:
    """Scheduler, runner and detokenizers, in the order of a step."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        decode: Decode,
        eos_ids: frozenset[int],
        max_model_len: int,
        observe: PhaseObserver | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._decode = decode
        self._eos_ids = eos_ids
        self._max_model_len = max_model_len
        self._observe = observe or (lambda _phase, _seconds: None)
        self._detokenizers: dict[int, Detokenizer] = {}
        self.num_steps = 0
        self.made_progress = False

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, seq: Sequence) -> None:
        for each in (seq, *seq.followers):
            self._detokenizers[id(each)] = Detokenizer(
                self._decode, each.tokens[: each.num_prompt_tokens], each.params.stop
            )
        self.scheduler.add(seq)

    def abort(self, seqs: list[Sequence]) -> None:
        """Take sequences out, wherever they are; their blocks are free at once."""
        for seq in seqs:
            self.scheduler.finish(seq, FinishReason.ABORTED)
            self._detokenizers.pop(id(seq), None)

    def step(self) -> list[Output]:
        """Run one step. Returns nothing when everything that could run waits for its adapter."""
        began = time.perf_counter()
        plan = self.scheduler.plan()
        planned = self._lap("schedule", began)
        outputs = [self._failure(seq, error) for seq, error in plan.failed]
        self.made_progress = bool(plan.scheduled)
        if not plan.scheduled:
            return outputs
        logits = self.runner.forward(plan.scheduled)
        forwarded = self._lap("forward", planned)
        result = self.runner.sample(plan.scheduled, logits)
        sampled = self._lap("sample", forwarded)
        outputs += self._commit(plan, result)
        self._lap("deliver", sampled)
        self.num_steps += 1
        return outputs

    def _lap(self, phase: str, since: float) -> float:
        now = time.perf_counter()
        self._observe(phase, now - since)
        return now

    def _failure(self, seq: Sequence, error: ManyloraError) -> Output:
        self._detokenizers.pop(id(seq), None)
        return Output(seq, Delta(seq.index, "", (), finish_reason=FinishReason.ERROR), error)

    def _commit(self, plan: Plan, result: StepResult) -> list[Output]:
        ended = [item for item in plan.scheduled if item.samples]
        self.scheduler.commit(plan)
        return [self._advance(item, result) for item in ended]

    def _advance(self, item: Scheduled, result: StepResult) -> Output:
        """Give a sequence its new token, and end it where a stop condition holds."""
        seq = item.seq
        if seq.first_token_s is None:
            seq.first_token_s = time.monotonic()
        if not seq.params.max_tokens:
            return self._end_without_answer(seq)
        token_id = result.token_ids[id(seq)]
        is_first = not seq.num_output_tokens
        seq.append(token_id)
        self.scheduler.charge_output(seq)
        detokenizer = self._detokenizers[id(seq)]
        reason = self._stop_reason(seq, token_id)
        stopped_by_token = reason is FinishReason.STOP
        text = "" if stopped_by_token else detokenizer.add([token_id])
        if detokenizer.is_stopped:
            reason = FinishReason.STOP
        if reason is not None:
            text += detokenizer.flush()
            if detokenizer.is_stopped:
                reason = FinishReason.STOP
            self.scheduler.finish(seq, reason)
            del self._detokenizers[id(seq)]
        logprob = result.logprobs.get(id(seq))
        delta = Delta(
            seq.index,
            text,
            (token_id,),
            logprobs=(logprob,) if logprob is not None else (),
            finish_reason=reason,
            prompt_logprobs=tuple(seq.prompt_logprobs) if is_first else (),
            num_cached_tokens=seq.num_cached_tokens if is_first else 0,
        )
        return Output(seq, delta, captured=result.captured.get(id(seq)))

    def _end_without_answer(self, seq: Sequence) -> Output:
        """The prompt alone was asked for, to be scored or brought into the cache."""
        self.scheduler.finish(seq, FinishReason.LENGTH)
        del self._detokenizers[id(seq)]
        delta = Delta(
            seq.index,
            "",
            (),
            finish_reason=FinishReason.LENGTH,
            prompt_logprobs=tuple(seq.prompt_logprobs),
            num_cached_tokens=seq.num_cached_tokens,
        )
        return Output(seq, delta)

    def _stop_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        params = seq.params
        if token_id in params.stop_token_ids or (token_id in self._eos_ids and not params.ignore_eos):
            return FinishReason.STOP
        if seq.num_output_tokens >= params.max_tokens or seq.num_tokens >= self._max_model_len:
            return FinishReason.LENGTH
        return None
