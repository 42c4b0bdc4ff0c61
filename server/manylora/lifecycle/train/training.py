"""The training loop: only the low-rank parameters move, and it can stop and go on anywhere."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from manylora.errors import ManyloraError
from manylora.lifecycle.base import Base
from manylora.lifecycle.data.batches import epoch_order, sorted_batches
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.progress import Listener, Progress, in_words
from manylora.lifecycle.train.config import Schedule
from manylora.lifecycle.train.objectives import Answers, Objective

_ENOUGH_STEPS = 3
_FORWARD_SHARE = 0.5  # of a training step's time, before an evaluation was measured: it has no backward pass


@dataclass(slots=True)
class History:
    """What happened so far; together with weights, optimizer and random state it is a checkpoint."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    train_loss: list[tuple[int, float]] = field(default_factory=list)
    eval_loss: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf
    stale: int = 0  # evaluations since the best one


@dataclass(slots=True)
class Pace:
    """Seconds and tokens of this process's steps and evaluations."""

    step_s: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    evaluation_s: list[float] = field(default_factory=list)

    def remaining_s(self, tokens_left: int, evaluations_left: int, evaluation_tokens: int) -> float | None:
        """Seconds to the end; None before there were enough steps to tell.

        The first step also allocates and warms caches, so it is not counted. Steps are of unequal length, so what
        counts is the time for a token.
        """
        if len(self.step_s) < _ENOUGH_STEPS:
            return None
        per_token = sum(self.step_s[1:]) / max(1, sum(self.step_tokens[1:]))
        if self.evaluation_s:
            per_evaluation = sum(self.evaluation_s) / len(self.evaluation_s)
        else:
            per_evaluation = per_token * _FORWARD_SHARE * evaluation_tokens
        return per_token * tokens_left + per_evaluation * evaluations_left


class Diverged(ManyloraError):
    """The loss or a gradient is no longer a number."""


class Trainer:
    """Trains the parameters of `model` that require a gradient.

    `run` returns whether it reached the end (False: `should_stop` said so). Raises Diverged when the
    loss stops being a number. `estimate` is what was first said about the whole time: (after step, seconds).
    """

    def __init__(
        self,
        model: nn.Module,
        base: Base,
        train: Sequence[Encoded],
        held_out: Sequence[Encoded],
        schedule: Schedule,
        objective: Objective | None = None,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.history = History()
        self.estimate: tuple[int, float] | None = None
        self._pace = Pace()
        self.objective = objective or Answers(model, base)
        self._values: dict[str, float] = {}
        self._train = train
        self._held_out = held_out
        self._tokens_per_epoch, self._held_out_tokens = _num_tokens(train), _num_tokens(held_out)
        self._order: tuple[int, list[list[int]]] = (-1, [])
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(_groups(self.parameters, schedule), lr=schedule.lr)

    @property
    def num_steps(self) -> int:
        return self.schedule.epochs * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        batches = math.ceil(len(self._train) / self.schedule.batch_size)
        return math.ceil(batches / self.schedule.accumulate)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero. `step` counts from 0."""
        warmup = max(1, round(self.schedule.warmup * self.num_steps))
        if step < warmup:
            return self.schedule.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_steps - warmup)
        return self.schedule.lr * 0.5 * (1 + math.cos(math.pi * done))

    @property
    def planned_tokens(self) -> int:
        """What all steps learn from together, if none is left out."""
        return self.schedule.epochs * self._tokens_per_epoch

    def progress(self, stage: str, done: int = 0, total: int = 0, values: dict[str, float] | None = None) -> Progress:
        """An event with what was taken so far."""
        history = self.history
        return Progress(stage, done, total, values=values or {}, tokens=history.num_tokens, seconds=history.seconds)

    def run(
        self,
        listen: Listener,
        should_stop: Callable[[], bool],
        on_checkpoint: Callable[[], None],
        on_evaluation: Callable[[], None] = lambda: None,
    ) -> bool:
        while self.history.step < self.num_steps and not self._is_stale:
            if should_stop():
                on_checkpoint()
                return False
            loss = self._timed_step()
            if self._evaluates_after(self.history.step):
                self._evaluate(listen)
                on_evaluation()
            self._tell(listen, loss)
            if self.history.step % self.schedule.checkpoint_every == 0:
                on_checkpoint()
        self._keep_best()
        return True

    @property
    def _is_stale(self) -> bool:
        return 0 < self.schedule.early_stop <= self.history.stale

    @property
    def _evaluation_interval(self) -> int:
        return self.schedule.eval_every or self.steps_per_epoch

    def _evaluates_after(self, step: int) -> bool:
        return bool(self._held_out) and (step % self._evaluation_interval == 0 or step == self.num_steps)

    def _timed_step(self) -> float:
        started, tokens = time.monotonic(), self.history.num_tokens
        loss = self._step()
        seconds = time.monotonic() - started
        self.history.seconds += seconds
        self.history.train_loss.append((self.history.step, loss))
        self._pace.step_s.append(seconds)
        self._pace.step_tokens.append(self.history.num_tokens - tokens)
        return loss

    def evaluation_loss(self, examples: Sequence[Encoded]) -> float:
        """The objective's mean over these."""
        self.model.eval()
        total, sums = 0.0, dict[str, float]()
        count = sum(map(self.objective.weight, examples))
        with torch.inference_mode():
            for indices in sorted_batches(examples, self.schedule.batch_size * 2):
                part = self.objective.summed([examples[i] for i in indices])
                total += float(part.loss)
                _add(sums, part.values)
        self._values |= {f"eval_{name}": value / count for name, value in sums.items()}
        return total / count

    def _step(self) -> float:
        """One optimizer step over `accumulate` batches; the loss is the objective's mean over them."""
        epoch, within = divmod(self.history.step, self.steps_per_epoch)
        group = self._batches(epoch)[within * self.schedule.accumulate : (within + 1) * self.schedule.accumulate]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        count = sum(self.objective.weight(self._train[i]) for indices in group for i in indices)
        loss, sums = 0.0, dict[str, float]()
        for indices in group:
            found = self.objective.summed([self._train[i] for i in indices])
            part = found.loss / count
            torch.autograd.backward(part)
            loss += float(part.detach())
            self.history.num_tokens += found.num_tokens
            _add(sums, found.values)
        self._values |= {name: value / count for name, value in sums.items()}
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.schedule.max_grad_norm))
        self._check(loss, norm, [self._train[i].example.row for indices in group for i in indices])
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.learning_rate(self.history.step) * parameters["ratio"]
        self.optimizer.step()
        self.history.step += 1
        return loss

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._order[0] != epoch:
            lengths = [len(e) for e in self._train]
            batches = epoch_order(lengths, self.schedule.batch_size, seed=self.schedule.seed, epoch=epoch)
            self._order = (epoch, batches)
        return self._order[1]

    def _check(self, loss: float, norm: float, rows: list[int]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        shown = ", ".join(str(row) for row in sorted(rows)[:8])
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        raise Diverged(
            f"Training diverged at step {self.history.step + 1} ({what}) on rows {shown}. "
            "Lower `lr`, or look at these rows. No adapter was written."
        )

    def _evaluate(self, listen: Listener) -> None:
        listen(Progress("evaluate", self.history.step, self.num_steps))
        started = time.monotonic()
        loss = self.evaluation_loss(self._held_out)
        seconds = time.monotonic() - started
        self.history.seconds += seconds
        self._pace.evaluation_s.append(seconds)
        if not math.isfinite(loss):
            raise Diverged(
                f"The evaluation loss after step {self.history.step} is {loss}. Lower `lr`, or look at the rows of "
                "`eval_data`. No adapter was written."
            )
        self.history.eval_loss.append((self.history.step, loss))
        if loss < self.history.best_loss:
            self.history.best_loss, self.history.best_step, self.history.stale = loss, self.history.step, 0
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        else:
            self.history.stale += 1

    def _keep_best(self) -> None:
        if not self.history.eval_loss:
            self.history.best_step = self.history.step
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])

    def _tell(self, listen: Listener, loss: float) -> None:
        values: dict[str, float] = {"loss": loss, **self._values}
        if self.history.eval_loss:
            values["eval_loss"] = self.history.eval_loss[-1][1]
        remaining = self._remaining_s()
        if remaining is not None:
            values["remaining_s"] = remaining
        listen(self.progress("train", self.history.step, self.num_steps, values))
        if remaining is not None and self.estimate is None:
            self.estimate = (self.history.step, self.history.seconds + remaining)
            sooner = "; early stopping may end it sooner" if self.schedule.early_stop else ""
            listen(Progress("estimate", message=f"about {in_words(remaining)} to go, by the first steps{sooner}"))

    def _remaining_s(self) -> float | None:
        tokens_left = self.schedule.epochs * self._tokens_per_epoch - self.history.num_tokens
        return self._pace.remaining_s(max(0, tokens_left), self._evaluations_left(), self._held_out_tokens)

    def _evaluations_left(self) -> int:
        if not self._held_out or self.history.step >= self.num_steps:
            return 0
        every = self._evaluation_interval
        at_the_end = self.num_steps % every != 0
        return self.num_steps // every - self.history.step // every + at_the_end


def _num_tokens(examples: Sequence[Encoded]) -> int:
    return sum(example.num_tokens for example in examples)


def _add(sums: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def _groups(parameters: Mapping[str, nn.Parameter], schedule: Schedule) -> list[dict[str, Any]]:
    """The parameters by learning rate and decay: DoRA's lengths and rows of tokens, the base's at first, have none."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        ratio = schedule.lr_ratio if ".lora_B." in name or ".lora_embedding_B." in name else 1.0
        decay = schedule.weight_decay if ".lora_A." in name or ".lora_B." in name else 0.0
        groups.setdefault((ratio, decay), []).append(parameter)
    return [{"params": own, "ratio": ratio, "weight_decay": decay} for (ratio, decay), own in groups.items()]
