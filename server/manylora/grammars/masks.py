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
from dataclasses import dataclass, field, replace
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


@dataclass(slots=True, eq=False)
class _Way:
    """How far a sequence has come in its grammar. One thread goes along it: who gives up that thread leaves it to it.

    `taken`: all tokens so far, as a matcher that is made anew must be told them. `expected`: with `one_by_one`, what
    must come.
    """

    compiled: Compiled
    one_by_one: bool
    ends_only_when_complete: bool
    matcher: llguidance.LLMatcher | None
    taken: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)

    def there(self) -> llguidance.LLMatcher:
        """The matcher, made anew where it is gone: one that shares nothing with others. Raises _Fault."""
        if self.matcher is None:
            matcher = self.compiled.renewed()
            if self.taken and not matcher.consume_tokens(self.taken):
                raise _Fault(matcher.get_error())
            self.matcher = matcher
        return self.matcher

    def anew(self) -> "_Way":
        """One as far, which shares nothing with it."""
        return replace(self, matcher=None, taken=[*self.taken], expected=[*self.expected])


class Constraint:
    """One sequence that is held to a grammar.

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
        "error",
        "forced",
        "is_complete",
        "is_looking",
        "is_settled",
        "looks",
        "seconds",
        "way",
    )

    def __init__(
        self, maker: "MaskMaker", compiled: Compiled, *, one_by_one: bool = False, ends_only_when_complete: bool = False
    ) -> None:
        self._maker = maker
        self.way = _Way(compiled, one_by_one, ends_only_when_complete, compiled.matcher())
        self.forced: tuple[int, ...] = ()
        self.allowed: Mask | None = None
        self.ahead: tuple[Mask, ...] = ()
        self.is_looking = False
        self.looks = True  # no draft of its took too long to look at
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
        is_free = self.is_settled and not self.is_decided and not self.is_looking
        return is_free and self.looks and self.seconds < _MAX_LOOK_S

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
        if isinstance(piece, _Look):  # of what may never come: the sequence goes on without drafts
            constraint.way = constraint.way.anew()
            constraint.is_looking = constraint.looks = False
            self._replace_thread()
            return
        constraint.way.compiled.is_given_up = True
        constraint.error = InvalidGrammar(
            f"The grammar is too complex to be followed: what may come after {len(constraint.way.taken)} tokens was "
            f"not known within {MAX_MASK_S:g} s. Send a simpler one."
        )
        constraint.is_settled = True
        self._replace_thread()

    # on the thread

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            constraint, way, piece = taken
            began = time.thread_time()
            found = self._found(way, piece)
            seconds = time.thread_time() - began
            with self._lock:
                if self._thread is not threading.current_thread():
                    return  # it was given up meanwhile, and the sequence told so
                self._at = None
                self._publish(constraint, found, piece, seconds)

    def _take(self) -> tuple[Constraint, _Way, _Piece] | None:
        """The next piece of work of a sequence that has not failed; None at the end."""
        with self._lock:
            while True:
                while not self._work and not self._is_closed:
                    self._has_work.wait()
                if self._is_closed or self._thread is not threading.current_thread():
                    return None
                _, _, constraint, piece = heapq.heappop(self._work)
                if constraint.error is None:
                    self._at = (constraint, piece, time.thread_time())
                    return constraint, constraint.way, piece
                constraint.is_looking = False

    def _publish(self, constraint: Constraint, found: "_Found", piece: _Piece, seconds: float) -> None:
        if isinstance(piece, _Look):
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
            constraint.seconds = seconds
        self._is_known.notify_all()

    def _found(self, way: _Way, piece: _Piece) -> "_Found":
        if isinstance(piece, _Follow):
            return _twice(way, lambda: _follow(way, piece.token_ids))
        if isinstance(piece, _Look):
            return _looked(way, self._eos_ids, piece.draft)
        return _twice(way, lambda: _mask(way, self._eos_ids))


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


def _twice(way: _Way, work: Callable[[], _Found]) -> _Found:
    """Do it, if need be once more with a matcher that others have not brought to its limits."""
    num_taken, expected = len(way.taken), way.expected
    try:
        try:
            return work()
        except _Fault:
            del way.taken[num_taken:]  # what the first try took is taken again
            way.expected, way.matcher = expected, None
            return work()
    except _Fault as fault:
        return _Found(error=fault_for_caller(str(fault)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is of this sequence alone
        get_logger(__name__).exception("grammar_not_followed")
        return _Found(error=SequenceFailed(f"The grammar of this request could not be followed: {error}"))


def _looked(way: _Way, eos_ids: tuple[int, ...], draft: tuple[int, ...]) -> _Found:
    """See `_look`. Whatever goes wrong on a way that the sequence may never take is no fault of the sequence."""
    try:
        return _look(way, eos_ids, draft)
    except _Fault:
        way.matcher = None
    except Exception:  # noqa: BLE001 - the sequence goes on without its draft
        get_logger(__name__).exception("draft_not_followed")
        way.matcher = None
    return _Found()


def _consume(matcher: llguidance.LLMatcher, token_ids: list[int]) -> None:
    if token_ids and not matcher.consume_tokens(token_ids):
        raise _Fault(matcher.get_error())
    if matcher.is_error():
        raise _Fault(matcher.get_error())


def _follow(way: _Way, token_ids: tuple[int, ...]) -> _Found:
    """Take tokens, what must come among them, and what must come after them."""
    matcher, at = way.there(), 0
    while True:
        told = list(token_ids[at : at + 1])
        _consume(matcher, told)
        way.taken += told
        way.expected, at = way.expected[len(told) :], at + len(told)
        if matcher.is_stopped():
            return _Found(is_complete=True)
        forced = way.expected or matcher.compute_ff_tokens()
        if way.one_by_one:
            way.expected, forced = forced, []
        _consume(matcher, forced)
        way.taken += forced
        num_told = min(len(forced), len(token_ids) - at)  # a draft has what must come too
        at += num_told
        if at == len(token_ids):
            return _Found(forced=tuple(forced[num_told:]), is_complete=bool(forced) and matcher.is_stopped())


def _mask(way: _Way, eos_ids: tuple[int, ...]) -> _Found:
    """What may come next."""
    words = _may_come(way, way.expected, eos_ids)
    return _Found(allowed=words, is_complete=not way.expected and way.ends_only_when_complete and not words.any())


def _look(way: _Way, eos_ids: tuple[int, ...], draft: tuple[int, ...]) -> _Found:
    """What may come behind each token of a draft, as if the sequence had taken it, up to where it does not.

    What must come is taken together there, so the draft has to have all of it: where it has not, or the answer ends,
    what comes next is not the model's to choose, and the draft is followed no further.
    """
    matcher, expected = way.there(), way.expected
    found: list[Mask] = []
    at = num_taken = 0
    until = time.thread_time() + _MAX_LOOK_S
    try:
        while at < len(draft) and time.thread_time() < until:
            is_expected = draft[at] == expected[0] if expected else draft[at] < way.compiled.num_tokens
            if not is_expected or matcher.validate_tokens([draft[at]]) != 1:
                break
            _consume(matcher, [draft[at]])
            at, num_taken, expected = at + 1, num_taken + 1, expected[1:]
            if matcher.is_stopped():
                break
            forced = expected or matcher.compute_ff_tokens()
            if way.one_by_one:
                expected, forced = forced, []
            if tuple(forced) != draft[at : at + len(forced)]:
                break
            _consume(matcher, forced)
            at, num_taken = at + len(forced), num_taken + len(forced)
            if matcher.is_stopped():
                break
            words = _may_come(way, expected, eos_ids)
            if not words.any():
                break
            found += [*(_only(way, token_id) for token_id in forced), words]
    finally:
        if num_taken and not matcher.rollback(num_taken):
            raise _Fault(matcher.get_error())
    return _Found(ahead=tuple(found))


def _may_come(way: _Way, expected: SequenceOf[int], eos_ids: tuple[int, ...]) -> Mask:
    """What may come where the matcher is; `expected` must, if there is any."""
    if expected:
        return _only(way, expected[0])
    began = time.thread_time()
    words = np.zeros(way.compiled.num_words, np.uint32)
    matcher = way.there()
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    if matcher.is_error():
        raise _Fault(matcher.get_error())
    seconds = time.thread_time() - began
    if seconds > _SLOW_S:
        way.compiled.num_bytes += int(seconds * _BYTES_PER_SLOW_S)
    if way.ends_only_when_complete:
        for token_id in eos_ids:
            words[token_id // 32] &= ~np.uint32(1 << token_id % 32)
    return words


def _only(way: _Way, token_id: int) -> Mask:
    """The mask that allows one token."""
    words = np.zeros(way.compiled.num_words, np.uint32)
    words[token_id // 32] = np.uint32(1 << token_id % 32)
    return words
