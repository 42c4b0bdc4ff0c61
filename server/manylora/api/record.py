"""What is left of one request for text when it has ended, the one record that metrics, ledger, log and traces read."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from manylora.engine.interface import AdapterRef, Progress, RequestTiming, Tier
from manylora.errors import ManyloraError
from manylora.identity import TIERS

__all__ = ["ClientGone", "Counts", "ErrorFacts", "Recorder", "RequestRecord", "outcome_of"]


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """What is kept of an error. The exception itself would keep its traceback's frames alive, the body among them."""

    code: str
    message: str

    @classmethod
    def of(cls, error: BaseException | None) -> "ErrorFacts | None":
        """None for anything that was not raised on purpose, since its text is for the log alone."""
        return cls(error.code, error.message) if isinstance(error, ManyloraError) else None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request for text, ended. `outcome` is `ok`, `cancelled`, `invalid`, `rejected` or `error`.

    `drafted_tokens` were guessed and run, and of these `accepted_tokens` are in the answer.
    `prompt_tokens` counts prompts that were computed, once for all `n` choices. Times are seconds, `finished_at`
    is a Unix time; `sound_s` is the length of what was written down. What a request never came to is None, 0 or empty.
    """

    request_id: str
    tenant: str
    adapter: AdapterRef | None
    outcome: str
    finished_at: float
    duration_s: float
    ttft_s: float | None = None
    timing: RequestTiming | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    sound_s: float = 0.0
    gaps_s: tuple[float, ...] = field(default=(), repr=False)
    progress: tuple[Progress, ...] = ()  # of each prompt that reached the engine
    error: ErrorFacts | None = None
    canary: str = ""  # the id of the one that decided on the adapter's version

    @property
    def adapter_name(self) -> str | None:
        return self.adapter.name if self.adapter else None

    @property
    def tried_version(self) -> int | None:
        """The version that answered where a canary decided on it."""
        return self.adapter.version if self.canary and self.adapter else None

    @property
    def queue_s(self) -> float | None:
        return self.timing.queue_ms / 1000 if self.timing else None

    @property
    def load_tier(self) -> Tier | None:
        """Where the adapter was when the request arrived."""
        return self.timing.load_tier if self.timing else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time between the tokens of a choice, None with fewer than two tokens."""
        return sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else None

    def log_fields(self) -> dict[str, Any]:
        """What the request's log line says of it."""
        fields: dict[str, Any] = {
            "tenant": self.tenant,
            "adapter": self.adapter.label if self.adapter else "base",
            **({"adapter_id": self.adapter.id} if self.adapter else {}),
            "outcome": self.outcome,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
        }
        if self.canary:
            fields["canary"] = self.canary
        if self.drafted_tokens:
            fields["drafted_tokens"] = self.drafted_tokens
            fields["accepted_tokens"] = self.accepted_tokens
        if self.sound_s:
            fields["sound_s"] = round(self.sound_s, 2)
        if self.ttft_s is not None:
            fields["ttft_ms"] = round(self.ttft_s * 1000, 1)
        if self.timing is not None:
            fields["queue_ms"] = round(self.timing.queue_ms, 1)
            fields["load_ms"] = round(self.timing.load_ms, 1)
            fields["load_tier"] = self.timing.load_tier
        if self.tpot_s is not None:
            fields["tpot_ms"] = round(self.tpot_s * 1000, 2)
        if self.error is not None:
            fields["code"] = self.error.code
            if self.outcome == "error":  # after the first event of a stream, nothing else says it
                fields["error"] = self.error.message
        return fields


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


Recorder = Callable[[RequestRecord], None]


def outcome_of(error: BaseException | None) -> str:
    """The `outcome` label for how a request ended."""
    if error is None:
        return "ok"
    if not isinstance(error, Exception) or isinstance(error, ClientGone):
        return "cancelled"
    if not isinstance(error, ManyloraError):
        return "error"
    if error.status in (429, 503):
        return "rejected"
    return "invalid" if error.status < 500 else "error"


@dataclass(slots=True)
class Counts:
    """What a request has used so far, kept by the event loop's thread. Times are of `time.perf_counter`."""

    arrived: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    sound_s: float = 0.0
    timings: list[RequestTiming] = field(default_factory=list)  # of each prompt, from its first delta on
    gaps: list[float] = field(default_factory=list)
    last_token: dict[int, float] = field(default_factory=dict)  # by choice

    def add_tokens(self, choice: int, num_tokens: int, now: float) -> None:
        """`num_tokens` of choice `choice` have just arrived; several share the time since the one before."""
        if not num_tokens:
            return
        self.completion_tokens += num_tokens
        last = self.last_token.get(choice)
        if last is not None:
            gap = (now - last) / num_tokens
            self.gaps.append(gap) if num_tokens == 1 else self.gaps.extend([gap] * num_tokens)
        elif self.first_token is None:
            self.first_token = now
        self.last_token[choice] = now

    def timing(self) -> RequestTiming | None:
        """Of several prompts, the slowest figures; None before the first delta."""
        if not self.timings:
            return None
        return RequestTiming(
            queue_ms=max(t.queue_ms for t in self.timings),
            load_ms=max(t.load_ms for t in self.timings),
            load_tier=max((t.load_tier for t in self.timings), key=TIERS.index),
            ttft_ms=max(t.ttft_ms for t in self.timings),
        )

    def frozen(
        self,
        error: BaseException | None,
        *,
        request_id: str,
        tenant: str,
        adapter: AdapterRef | None = None,
        canary: str = "",
        progress: tuple[Progress, ...] = (),
    ) -> RequestRecord:
        """The record of the request, which ends now, with `error` or well."""
        return RequestRecord(
            request_id=request_id,
            tenant=tenant,
            adapter=adapter,
            outcome=outcome_of(error),
            finished_at=time.time(),
            duration_s=time.perf_counter() - self.arrived,
            ttft_s=None if self.first_token is None else self.first_token - self.arrived,
            timing=self.timing(),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            sound_s=self.sound_s,
            gaps_s=tuple(self.gaps),
            progress=progress,
            error=ErrorFacts.of(error),
            canary=canary,
        )
