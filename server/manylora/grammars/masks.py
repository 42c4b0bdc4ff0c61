"""Which tokens may come next in answers that are held to a grammar, found out on a thread beside the model.

A sequence's `Constraint` is told each token that it took, and knows some time later what may follow. The thread does
first what is soon done, so that a grammar that takes long holds up its own sequences alone; one that takes too long is
given up together with the thread.
"""

import heapq
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Final

import llguidance
import numpy as np
import numpy.typing as npt

from manylora.errors import InvalidGrammar, ManyloraError, SequenceFailed
from manylora.grammars.compiler import Compiled, fault_for_caller
from manylora.grammars.threads import start_thread
from manylora.log import get_logger

__all__ = ["Constraint", "MaskMaker"]

MAX_MASK_S: Final = 2.0  # of a CPU
_SLOW_S: Final = 1e-3  # beyond it a mask has found out about states of the lexer that were not known
_BYTES_PER_SLOW_S: Final = 150e6  # what such states take, measured
_FIRST: Final = -1.0  # comes before any mask


class Constraint:
    """One sequence's way through its grammar.

    The engine's thread reads it and tells it of tokens; between `advance` and `is_settled` it is the mask maker's.
    `forced` are the tokens that must come next, if there are any: they count as taken already, so they are not to be
    told. `allowed` has a bit for each token that may come after them, None until it is known. `is_complete`: nothing
    may follow any more, and the answer is whole. `error`: why the grammar can be followed no further.

    With `one_by_one`, tokens that must come are not told as forced: they come one after the other, each the only one
    that is allowed, so that its probability can be seen. `ends_only_when_complete`: an answer that could end here or
    go on goes on.
    """

    __slots__ = (
        "_maker",
        "allowed",
        "compiled",
        "ends_only_when_complete",
        "error",
        "expected",
        "forced",
        "is_complete",
        "is_settled",
        "matcher",
        "one_by_one",
        "seconds",
        "taken",
    )

    def __init__(
        self, maker: "MaskMaker", compiled: Compiled, *, one_by_one: bool = False, ends_only_when_complete: bool = False
    ) -> None:
        self._maker = maker
        self.compiled = compiled
        self.one_by_one = one_by_one
        self.ends_only_when_complete = ends_only_when_complete
        self.matcher: llguidance.LLMatcher = compiled.matcher()
        self.taken: list[int] = []  # all tokens so far, as a matcher that is made anew must be told them
        self.expected: list[int] = []  # with `one_by_one`: what must come
        self.forced: tuple[int, ...] = ()
        self.allowed: npt.NDArray[np.uint32] | None = None
        self.is_complete = False
        self.is_settled = False
        self.error: ManyloraError | None = None
        self.seconds = 0.0  # that its last mask took
        maker.follow(self, None)

    @property
    def is_decided(self) -> bool:
        """What happens next is known, and the model is not asked."""
        return self.is_settled and bool(self.forced or self.is_complete or self.error is not None)

    @property
    def is_ready(self) -> bool:
        """All is known that a sample needs."""
        return self.is_decided or (self.is_settled and self.allowed is not None)

    def advance(self, token_id: int) -> None:
        """The sequence took a token that was allowed. What may follow is not known for a while."""
        self.is_settled = False
        self.allowed = None
        self._maker.follow(self, token_id)

    def take_forced(self) -> tuple[int, ...]:
        """The sequence takes what must come."""
        forced, self.forced = self.forced, ()
        return forced


class MaskMaker:
    """Follows grammars on a thread of its own, which starts with the first."""

    def __init__(self, eos_ids: Iterable[int] = ()) -> None:
        self._eos_ids = tuple(eos_ids)
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._is_known = threading.Condition(self._lock)
        self._work: list[tuple[float, int, Constraint, int | None]] = []
        self._order = count()
        self._thread: threading.Thread | None = None
        self._at: tuple[Constraint, float] | None = None  # what the thread is at, and its CPU time when it began
        self._is_closed = False

    def start(
        self, compiled: Compiled, *, one_by_one: bool = False, ends_only_when_complete: bool = False
    ) -> Constraint:
        """A sequence's way through a grammar, at its beginning; see `Constraint`."""
        constraint = Constraint(self, compiled, one_by_one=one_by_one, ends_only_when_complete=ends_only_when_complete)
        self.follow(constraint, None)
        return constraint

    def follow(self, constraint: Constraint, token_id: int | None) -> None:
        """Find out what may come after a token, or at the beginning."""
        with self._lock:
            self._push(_FIRST, constraint, token_id)
            if self._thread is None:
                self._replace_thread()

    def wait_settled(self, constraints: Iterable[Constraint], patience_s: float) -> None:
        """Return once all know what is forced, or when patience ends."""
        waiting = list(constraints)
        with self._lock:
            self._is_known.wait_for(lambda: all(each.is_settled for each in waiting), patience_s)

    def wait_ready(self, constraints: Iterable[Constraint], patience_s: float) -> None:
        """Return once all know what a sample needs, or when patience ends. One that takes too long is given up."""
        waiting = list(constraints)
        with self._lock:
            if self._is_known.wait_for(lambda: all(each.is_ready for each in waiting), patience_s):
                return
            if self._at is not None and self._used_s() - self._at[1] > MAX_MASK_S:
                self._give_up(self._at[0])

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._has_work.notify_all()

    def _used_s(self) -> float:
        """CPU time of the thread so far: time in which it is not let run is not the grammar's."""
        assert self._thread is not None
        assert self._thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def _push(self, cost_s: float, constraint: Constraint, token_id: int | None) -> None:
        heapq.heappush(self._work, (cost_s, next(self._order), constraint, token_id))
        self._has_work.notify()

    def _replace_thread(self) -> None:
        """The one before, if there is one, ends with what it is at."""
        self._at = None
        self._thread = start_thread(self._serve, "grammar-masks")

    def _give_up(self, constraint: Constraint) -> None:
        constraint.compiled.is_given_up = True
        constraint.error = InvalidGrammar(
            f"The grammar is too complex to be followed: what may come after {len(constraint.taken)} tokens was not "
            f"known within {MAX_MASK_S:g} s. Send a simpler one."
        )
        constraint.is_settled = True
        self._replace_thread()

    # on the thread

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            is_follow, constraint, token_id = taken
            found = self._found(constraint, token_id) if is_follow else self._masked(constraint)
            with self._lock:
                if self._thread is not threading.current_thread():
                    return  # it was given up meanwhile, and the sequence told so
                self._at = None
                self._publish(constraint, found, is_follow)

    def _take(self) -> tuple[bool, Constraint, int | None] | None:
        """The next piece of work; None at the end."""
        with self._lock:
            while not self._work and not self._is_closed:
                self._has_work.wait()
            if self._is_closed or self._thread is not threading.current_thread():
                return None
            cost_s, _, constraint, token_id = heapq.heappop(self._work)
            self._at = (constraint, time.thread_time())
            return cost_s == _FIRST, constraint, token_id

    def _publish(self, constraint: Constraint, found: "_Found", is_follow: bool) -> None:
        constraint.error = found.error
        constraint.is_complete = found.is_complete
        if is_follow:
            constraint.forced = found.forced
            constraint.is_settled = True
            if found.error is None and not found.is_complete:
                self._push(constraint.seconds, constraint, None)
        else:
            constraint.allowed = found.allowed
        self._is_known.notify_all()

    def _found(self, constraint: Constraint, token_id: int | None) -> "_Found":
        return _twice(constraint, lambda: _follow(constraint, token_id))

    def _masked(self, constraint: Constraint) -> "_Found":
        began = time.thread_time()
        found = _twice(constraint, lambda: _mask(constraint, self._eos_ids))
        constraint.seconds = time.thread_time() - began
        if constraint.seconds > _SLOW_S:
            constraint.compiled.num_bytes += int(constraint.seconds * _BYTES_PER_SLOW_S)
        return found


@dataclass(frozen=True, slots=True)
class _Found:
    """What a piece of work found out; see `Constraint`."""

    forced: tuple[int, ...] = ()
    allowed: npt.NDArray[np.uint32] | None = None
    is_complete: bool = False
    error: ManyloraError | None = None


class _Fault(Exception):
    """What the library says of a grammar that it follows no further."""


def _twice(constraint: Constraint, work: Callable[[], _Found]) -> _Found:
    """Do it, if need be once more with a matcher that others have not brought to its limits."""
    try:
        try:
            return work()
        except _Fault:
            constraint.matcher = constraint.compiled.renewed()
            if constraint.taken and not constraint.matcher.consume_tokens(constraint.taken):
                raise _Fault(constraint.matcher.get_error()) from None
            return work()
    except _Fault as fault:
        return _Found(error=fault_for_caller(str(fault)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is of this sequence alone
        get_logger(__name__).exception("grammar_not_followed")
        return _Found(error=SequenceFailed(f"The grammar of this request could not be followed: {error}"))


def _follow(constraint: Constraint, token_id: int | None) -> _Found:
    """Take a token, and what must come after it."""
    matcher = constraint.matcher
    if token_id is not None:
        if not matcher.consume_token(token_id):
            raise _Fault(matcher.get_error())
        constraint.taken.append(token_id)
        constraint.expected = constraint.expected[1:]
    if matcher.is_error():
        raise _Fault(matcher.get_error())
    if matcher.is_stopped():
        return _Found(is_complete=True)
    forced = constraint.expected or matcher.compute_ff_tokens()
    if constraint.one_by_one:
        constraint.expected = forced
        return _Found()
    if forced and not matcher.consume_tokens(forced):
        raise _Fault(matcher.get_error())
    constraint.taken += forced
    return _Found(forced=tuple(forced), is_complete=bool(forced) and matcher.is_stopped())


def _mask(constraint: Constraint, eos_ids: tuple[int, ...]) -> _Found:
    """What may come next."""
    words = np.zeros(constraint.compiled.num_words, np.uint32)
    if constraint.expected:
        _set(words, constraint.expected[:1], True)
        return _Found(allowed=words)
    constraint.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    if constraint.matcher.is_error():
        raise _Fault(constraint.matcher.get_error())
    if constraint.ends_only_when_complete:
        _set(words, eos_ids, False)
        return _Found(allowed=words, is_complete=not words.any())
    return _Found(allowed=words)


def _set(words: npt.NDArray[np.uint32], token_ids: Iterable[int], is_allowed: bool) -> None:
    for token_id in token_ids:
        bit = np.uint32(1 << token_id % 32)
        words[token_id // 32] = words[token_id // 32] | bit if is_allowed else words[token_id // 32] & ~bit
