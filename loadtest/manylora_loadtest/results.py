"""What is known of every request and every live change of a run. All times are seconds from the run's start."""

from dataclasses import dataclass

__all__ = ["LEFT", "OK", "REFUSED", "ChangeResult", "RequestResult"]

OK = "ok"
LEFT = "left"  # the client closed the connection, as the scenario wanted
REFUSED = "refused"  # the server said no, as the scenario wanted


@dataclass(slots=True)
class RequestResult:
    """One request, from the moment it was due.

    Latencies count from `due_s`, the scheduled arrival, not from `sent_s`: a client or a server that falls behind
    shows up in them instead of thinning out the load (coordinated omission).
    """

    index: int
    stage: int  # -1: warm-up
    tenant: str
    adapter: str | None
    is_chat: bool
    asked_prompt_tokens: int
    asked_output_tokens: int
    due_s: float
    sent_s: float = 0.0
    first_s: float | None = None  # first token
    last_s: float | None = None  # last token
    end_s: float = 0.0  # end of the response, or of waiting for it
    status: int = 0
    # ok | left | refused | not_refused | http_<status> | stream_error | cut_off | timeout | connection | bad_answer
    outcome: str = ""
    error: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    num_events: int = 0
    max_gap_s: float = 0.0
    version: int | None = None  # of the adapter that answered, where the server says it
    load_tier: str | None = None
    queue_s: float | None = None
    load_s: float | None = None

    @property
    def is_ok(self) -> bool:
        return self.outcome == OK

    @property
    def is_whole(self) -> bool:
        """Whether the request was to be answered to the end; others are in no figure but the totals."""
        return self.outcome not in (LEFT, REFUSED)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from the scheduled arrival."""
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an answer of one token."""
        if self.first_s is None or self.last_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """From the scheduled arrival to the end of the answer."""
        return self.end_s - self.due_s

    @property
    def late_s(self) -> float:
        """How long after its scheduled arrival the request was sent."""
        return self.sent_s - self.due_s


@dataclass(slots=True)
class ChangeResult:
    """One upload, promotion, use or deletion during the run. `wanted`: the status that is success, 0 for any 2xx."""

    kind: str
    adapter: str
    start_s: float
    end_s: float = 0.0
    status: int = 0
    version: int | None = None
    error: str = ""
    wanted: int = 0

    @property
    def is_ok(self) -> bool:
        is_good = self.status == self.wanted if self.wanted else 200 <= self.status < 300
        return is_good and not self.error
