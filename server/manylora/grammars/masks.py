"""Which tokens may come next in answers that are held to a grammar, found out on a thread beside the model.

A sequence's `Constraint` is told each token that it took, and knows some time later what may follow. The thread does
first what is soon done, so that a grammar that takes long holds up its own sequences alone; one that takes too long is
given up together with the thread. Of a sequence with a draft it looks ahead as well: what may come behind each of the
draft's tokens.
"""

import heapq
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import count
from typing import Final, TypeAlias

import llguidance
import numpy as np
import numpy.typing as npt

from manylora.errors import InvalidGrammar, ManyloraError, SequenceFailed
from manylora.grammars.compiler import Compiled, fault_for_caller
from manylora.grammars.threads import start_thread
from manylora.log import get_logger

__all__ = ["Constraint", "MaskMaker"]

Mask: TypeAlias = npt.NDArray[np.uint32]  # a bit for each token

MAX_MASK_S: Final = 2.0  # of a CPU
_SLOW_S: Final = 1e-3  # beyond it a mask has found out about states of the lexer that were not known
_BYTES_PER_SLOW_S: Final = 150e6  # what such states take, measured
_FIRST: Final = -1.0  # comes before any mask
_MAX_LOOK_S: Final = 0.005  # of a CPU, along one draft: the step that runs it takes about as long


class Constraint:
    """One sequence's way through its grammar.

    The engine's thread reads it and tells it of tokens; between `advance` and `is_settled` it is the mask maker's.
    `forced` are the tokens that must come next, if there are any: they count as taken already, so they are not to be
    told. `allowed` has a bit for each token that may come after them, None until it is known. `is_complete`: nothing
    may follow any more, and the answer is whole. `error`: why the grammar can be followed no further. `ahead`: the same
    as `allowed` behind each token of the draft that was last looked at, as far as was found out, while `is_looking` not
    known yet.

    With `one_by_one`, tokens that must come are not told as forced: they come one after the other, each the only one
    that is allowed, so that its probability can be seen. `ends_only_when_complete`: an answer that could end here or
    go on goes on.
    """

    __slots__ = (
        "_maker",
        "ahead",
        "allowed",
        "compiled",
        "ends_only_when_complete",
        "error",
        "expected",
        "forced",
        "is_complete",
        "is_looking",
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
        self.allowed: Mask | None = None
        self.ahead: tuple[Mask, ...] = ()
        self.is_looking = False
        self.is_complete = False
        self.is_settled = False
        self.error: ManyloraError | None = None
        self.seconds = 0.0  # that its last mask took
        maker.follow(self, ())

    @property
    def is_decided(self) -> bool:
        """What happens next is known, and the model is not asked."""
        return self.is_settled and bool(self.forced or self.is_complete or self.error is not None)

    @property
    def is_ready(self) -> bool:
        """All is known that a sample needs."""
        return self.is_decided or (self.is_settled and self.allowed is not None and not self.is_looking)

    @property
    def may_look(self) -> bool:
        """Whether a draft can be looked at: what comes now is up to the model, and no other draft is looked at."""
        return self.is_settled and not self.is_decided and not self.is_looking and self.seconds < _MAX_LOOK_S

    def look(self, draft: tuple[int, ...]) -> None:
        """Have `ahead` found out along the draft. Where it is not ready in time, it runs in a later step."""
        self.ahead = ()
        self.is_looking = True
        self._maker.look(self, draft)

    def advance(self, token_ids: SequenceOf[int]) -> None:
        """The sequence took tokens that were allowed, of a draft or not. What may follow is not known for a while."""
        self.is_settled = False
        self.allowed = None
        self.ahead = ()
        self._maker.follow(self, tuple(token_ids))

    def take_forced(self) -> tuple[int, ...]:
        """The sequence takes what must come."""
        forced, self.forced = self.forced, ()
        return forced


@dataclass(frozen=True, slots=True)
class _Follow:
    """Take these tokens, none at the beginning, and what must come after them."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Look:
    """Find out what may come behind each of these tokens, and take none."""

    draft: tuple[int, ...]


_Piece: TypeAlias = _Follow | _Look | None  # None: find out what may come now


class MaskMaker:
    """Follows grammars on a thread of its own, which starts with the first."""

    def __init__(self, eos_ids: Iterable[int] = ()) -> None:
        self._eos_ids = tuple(eos_ids)
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._is_known = threading.Condition(self._lock)
        self._work: list[tuple[float, int, Constraint, _Piece]] = []
        self._order = count()
        self._thread: threading.Thread | None = None
        # what the thread is at, and its CPU time when it began
        self._at: tuple[Constraint, _Piece, float] | None = None
        self._is_closed = False

    def start(
        self, compiled: Compiled, *, one_by_one: bool = False, ends_only_when_complete: bool = False
    ) -> Constraint:
        """A sequence's way through a grammar, at its beginning; see `Constraint`."""
        constraint = Constraint(self, compiled, one_by_one=one_by_one, ends_only_when_complete=ends_only_when_complete)
        self.follow(constraint, ())
        return constraint

    def follow(self, constraint: Constraint, token_ids: tuple[int, ...]) -> None:
        """Find out what may come after tokens, or at the beginning."""
        with self._lock:
            self._push(_FIRST, constraint, _Follow(token_ids))
            if self._thread is None:
                self._replace_thread()

    def look(self, constraint: Constraint, draft: tuple[int, ...]) -> None:
        """Find out what may come behind each token of a draft."""
        with self._lock:
            self._push(constraint.seconds * (len(draft) + 1), constraint, _Look(draft))

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
            if self._at is not None and self._used_s() - self._at[2] > MAX_MASK_S:
                self._give_up(*self._at[:2])

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._has_work.notify_all()

    def _used_s(self) -> float:
        """CPU time of the thread so far: time in which it is not let run is not the grammar's."""
        assert self._thread is not None
        assert self._thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def _push(self, cost_s: float, constraint: Constraint, piece: _Piece) -> None:
        heapq.heappush(self._work, (cost_s, next(self._order), constraint, piece))
        self._has_work.notify()

    def _replace_thread(self) -> None:
        """The one before, if there is one, ends with what it is at."""
        self._at = None
        self._thread = start_thread(self._serve, "grammar-masks")

    def _give_up(self, constraint: Constraint, piece: _Piece) -> None:
        if isinstance(piece, _Look):  # of what may never come: the sequence goes on without its draft
            constraint.error = _renew(constraint)
            constraint.is_looking = False
            self._replace_thread()
            return
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
            constraint, piece = taken
            found = self._found(constraint, piece)
            with self._lock:
                if self._thread is not threading.current_thread():
                    return  # it was given up meanwhile, and the sequence told so
                self._at = None
                self._publish(constraint, found, piece)

    def _take(self) -> tuple[Constraint, _Piece] | None:
        """The next piece of work; None at the end."""
        with self._lock:
            while not self._work and not self._is_closed:
                self._has_work.wait()
            if self._is_closed or self._thread is not threading.current_thread():
                return None
            _, _, constraint, piece = heapq.heappop(self._work)
            self._at = (constraint, piece, time.thread_time())
            return constraint, piece

    def _publish(self, constraint: Constraint, found: "_Found", piece: _Piece) -> None:
        if isinstance(piece, _Look):
            constraint.error = found.error
            constraint.ahead = found.ahead
            constraint.is_looking = False
        elif isinstance(piece, _Follow):
            constraint.error = found.error
            constraint.is_complete = found.is_complete
            constraint.forced = found.forced
            constraint.is_settled = True
            if found.error is None and not found.is_complete:
                self._push(constraint.seconds, constraint, None)
        else:
            constraint.error = found.error
            constraint.is_complete = found.is_complete
            constraint.allowed = found.allowed
        self._is_known.notify_all()

    def _found(self, constraint: Constraint, piece: _Piece) -> "_Found":
        if isinstance(piece, _Follow):
            return _twice(constraint, lambda: _follow(constraint, piece.token_ids))
        began = time.thread_time()
        if isinstance(piece, _Look):
            return _looked(constraint, self._eos_ids, piece.draft)
        found = _twice(constraint, lambda: _mask(constraint, self._eos_ids))
        constraint.seconds = time.thread_time() - began
        return found


@dataclass(frozen=True, slots=True)
class _Found:
    """What a piece of work found out; see `Constraint`."""

    forced: tuple[int, ...] = ()
    allowed: Mask | None = None
    ahead: tuple[Mask, ...] = ()
    is_complete: bool = False
    error: ManyloraError | None = None


class _Fault(Exception):
    """What the library says of a grammar that it follows no further."""


def _twice(constraint: Constraint, work: Callable[[], _Found]) -> _Found:
    """Do it, if need be once more with a matcher that others have not brought to its limits."""
    num_taken, expected = len(constraint.taken), constraint.expected
    try:
        try:
            return work()
        except _Fault:
            del constraint.taken[num_taken:]  # what the first try took is taken again
            constraint.expected = expected
            error = _renew(constraint)
            return work() if error is None else _Found(error=error)
    except _Fault as fault:
        return _Found(error=fault_for_caller(str(fault)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is of this sequence alone
        get_logger(__name__).exception("grammar_not_followed")
        return _Found(error=SequenceFailed(f"The grammar of this request could not be followed: {error}"))


def _looked(constraint: Constraint, eos_ids: tuple[int, ...], draft: tuple[int, ...]) -> _Found:
    """See `_look`. Whatever goes wrong on a way that the sequence may never take is no fault of the sequence."""
    try:
        try:
            return _look(constraint, eos_ids, draft)
        except _Fault:
            return _Found(error=_renew(constraint))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is of this sequence alone
        get_logger(__name__).exception("grammar_not_followed")
        return _Found(error=SequenceFailed(f"The grammar of this request could not be followed: {error}"))


def _renew(constraint: Constraint) -> ManyloraError | None:
    """Give it a matcher that shares nothing with others, where the one before was; why it cannot be there."""
    constraint.matcher = constraint.compiled.renewed()
    if constraint.taken and not constraint.matcher.consume_tokens(constraint.taken):
        return fault_for_caller(constraint.matcher.get_error())
    return None


def _consume(matcher: llguidance.LLMatcher, token_ids: list[int]) -> None:
    if token_ids and not matcher.consume_tokens(token_ids):
        raise _Fault(matcher.get_error())
    if matcher.is_error():
        raise _Fault(matcher.get_error())


def _follow(constraint: Constraint, token_ids: tuple[int, ...]) -> _Found:
    """Take tokens, what must come among them, and what must come after them."""
    matcher, at = constraint.matcher, 0
    while True:
        told = list(token_ids[at : at + 1])
        _consume(matcher, told)
        constraint.taken += told
        constraint.expected, at = constraint.expected[len(told) :], at + len(told)
        if matcher.is_stopped():
            return _Found(is_complete=True)
        forced = constraint.expected or matcher.compute_ff_tokens()
        if constraint.one_by_one:
            constraint.expected, forced = forced, []
        _consume(matcher, forced)
        constraint.taken += forced
        num_told = min(len(forced), len(token_ids) - at)  # a draft has what must come too
        at += num_told
        if at == len(token_ids):
            return _Found(forced=tuple(forced[num_told:]), is_complete=bool(forced) and matcher.is_stopped())


def _mask(constraint: Constraint, eos_ids: tuple[int, ...]) -> _Found:
    """What may come next."""
    words = _may_come(constraint, constraint.expected, eos_ids)
    return _Found(
        allowed=words, is_complete=not constraint.expected and constraint.ends_only_when_complete and not words.any()
    )


def _look(constraint: Constraint, eos_ids: tuple[int, ...], draft: tuple[int, ...]) -> _Found:
    """What may come behind each token of a draft, as if the sequence had taken it, up to where it does not.

    What must come is taken together there, so the draft has to have all of it: where it has not, or the answer ends,
    what comes next is not the model's to choose, and the draft is followed no further.
    """
    matcher, expected = constraint.matcher, constraint.expected
    found: list[Mask] = []
    at = num_taken = 0
    until = time.thread_time() + _MAX_LOOK_S
    try:
        while at < len(draft) and time.thread_time() < until:
            is_expected = draft[at] == expected[0] if expected else draft[at] < constraint.compiled.num_tokens
            if not is_expected or matcher.validate_tokens([draft[at]]) != 1:
                break
            _consume(matcher, [draft[at]])
            at, num_taken, expected = at + 1, num_taken + 1, expected[1:]
            if matcher.is_stopped():
                break
            forced = expected or matcher.compute_ff_tokens()
            if constraint.one_by_one:
                expected, forced = forced, []
            if tuple(forced) != draft[at : at + len(forced)]:
                break
            _consume(matcher, forced)
            at, num_taken = at + len(forced), num_taken + len(forced)
            if matcher.is_stopped():
                break
            words = _may_come(constraint, expected, eos_ids)
            if not words.any():
                break
            found += [*(_only(constraint, token_id) for token_id in forced), words]
    finally:
        if num_taken and not matcher.rollback(num_taken):
            raise _Fault(matcher.get_error())
    return _Found(ahead=tuple(found))


def _may_come(constraint: Constraint, expected: SequenceOf[int], eos_ids: tuple[int, ...]) -> Mask:
    """What may come where the matcher is; `expected` must, if there is any."""
    if expected:
        return _only(constraint, expected[0])
    began = time.thread_time()
    words = np.zeros(constraint.compiled.num_words, np.uint32)
    constraint.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    if constraint.matcher.is_error():
        raise _Fault(constraint.matcher.get_error())
    seconds = time.thread_time() - began
    if seconds > _SLOW_S:
        constraint.compiled.num_bytes += int(seconds * _BYTES_PER_SLOW_S)
    if constraint.ends_only_when_complete:
        for token_id in eos_ids:
            words[token_id // 32] &= ~np.uint32(1 << token_id % 32)
    return words


def _only(constraint: Constraint, token_id: int) -> Mask:
    """The mask that allows one token."""
    words = np.zeros(constraint.compiled.num_words, np.uint32)
    words[token_id // 32] = np.uint32(1 << token_id % 32)
    return words
