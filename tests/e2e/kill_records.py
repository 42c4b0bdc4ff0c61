"""What a server has acknowledged before it is killed, held against what is found after: adapters, bills, sums."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NUM_TOKENS = 6  # of each answer


@dataclass(frozen=True)
class State:
    """An adapter as the API shows it: digests by version, the active one, the description. No versions: not there."""

    versions: Mapping[int, str] = field(default_factory=dict)
    active: int | None = None
    description: str = ""

    def without(self, number: int) -> "State":
        rest = {n: digest for n, digest in self.versions.items() if n != number}
        return State(rest, self.active, self.description)


@dataclass
class Adapter:
    """One name of one tenant: what was acknowledged, and how to tell that the change under way was done as well."""

    name: str
    state: State = field(default_factory=State)
    highest: int = 0  # of all version numbers that were ever acknowledged
    pending: str = ""
    is_applied: Callable[[State], bool] = lambda _: False

    def settle(self, found: State) -> str:
        """Hold what a restart found against what was promised; says what became of the change under way."""
        pending, self.pending = self.pending, ""
        if found == self.state:
            return f"{pending}: not done" if pending else ""
        assert pending, f"{self.name}: {self.state} was acknowledged, found was {found}"
        assert self.is_applied(found), f"{self.name}: {self.state}, then '{pending}' was cut off, found was {found}"
        self.note(found)
        return f"{pending}: done"

    def note(self, state: State) -> None:
        self.state = state
        self.highest = max([self.highest, *state.versions])


@dataclass
class Bill:
    """What a tenant has got to the end, and what was under way when the server died."""

    ok: int = 0
    invalid: int = 0
    asked: int = 0  # since the last kill, not ended
    refusals: int = 0  # the same of requests that are to be refused
    probes: int = 0  # of uploads that were acknowledged
    probing: int = 0  # of uploads that were sent since the last kill and are not

    def settle(self, found: Mapping[str, Any], prompt_tokens: int, probe_tokens: int) -> None:
        """Hold a row of the usage against it, and take over what was counted and never heard of."""
        outcomes = found["outcomes"]
        ok, invalid = outcomes.get("ok", 0), outcomes.get("invalid", 0)
        assert self.ok <= ok <= self.ok + self.asked, (self, found)
        assert self.invalid <= invalid <= self.invalid + self.refusals, (self, found)
        assert not outcomes.keys() - {"ok", "invalid"}, found
        probes, rest = divmod(found["prompt_tokens"] - ok * prompt_tokens, probe_tokens)
        assert not rest, (self, found)
        assert self.probes <= probes <= self.probes + self.probing, (self, found)
        assert found["completion_tokens"] == ok * NUM_TOKENS, (self, found)
        self.ok, self.invalid, self.asked, self.refusals = ok, invalid, 0, 0
        self.probes, self.probing = probes, 0


@dataclass
class Kill:
    """One line of the results."""

    number: int
    after_s: float  # of work
    killed_while_starting_after_s: float | None = None  # a second kill, before the next server answered
    changes: int = 0
    answers: int = 0
    refusals: int = 0
    left: int = 0
    under_way: list[str] = field(default_factory=list)  # changes, and what became of them
    answers_under_way: int = 0
    answers_counted_unheard: int = 0
    restart_s: float = 0.0
    versions_checked: int = 0


def sums_of(kills: Sequence[Kill]) -> dict[str, Any]:
    """What all of it came to."""
    counts = ("changes", "answers", "refusals", "left", "answers_under_way", "answers_counted_unheard")
    under_way = Counter(outcome for kill in kills for outcome in kill.under_way)
    return {
        "kills": len(kills),
        "killed_again_while_starting": sum(kill.killed_while_starting_after_s is not None for kill in kills),
        **{name: sum(getattr(kill, name) for kill in kills) for name in (*counts, "versions_checked")},
        "changes_under_way": dict(sorted(under_way.items())),
    }
