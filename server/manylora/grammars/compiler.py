"""Grammars made ready beside the engine: each is tried in a process that can be spared, then made, kept and shared.

A tenant that sends many at once waits behind itself (`lora.memory.line`). What is kept is known by its text, so that a
grammar that many requests have in common is made once, and has a budget of bytes.
"""

import json
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import llguidance

from manylora.children import Helper
from manylora.errors import InvalidGrammar, InvalidRequest, ManyloraError, QueueFull
from manylora.grammars.grammar import MAX_GRAMMAR_BYTES, Grammar
from manylora.grammars.language import mask_words, new_matcher
from manylora.grammars.threads import start_thread
from manylora.grammars.trial import MAX_COMPILE_BYTES, MAX_COMPILE_S
from manylora.grammars.vocabulary import Spelling, Vocabulary
from manylora.log import get_logger
from manylora.lora.memory.line import LoadLine

__all__ = ["Compiled", "GrammarCompiler", "GrammarEvents", "fault_for_caller"]

NUM_COMPILERS: Final = 2
MAX_GRAMMARS_WAITING: Final = 64
_LEAST_BYTES: Final = 2**16
_TRIAL: Final = "manylora.grammars.trial"
_MAX_REFUSED: Final = 256  # grammars whose refusal is remembered
# In what the library says where one of `language.LIMITS` is reached.
_LIMIT_WORDS: Final = (
    "too many",
    "limit",
    "fuel",
    "too large",
    "too big",
    "too complex",
    "too deeply",
    "exceed",
    "Current row has",
)
# Keys of a schema that the library names when it cannot follow what they say.
_NAMED_KEYS: Final = ("oneOf", "patternProperties", "patternProperty", "minProperties", "multipleOf", "$ref")
_MOST_SAID: Final = 300  # characters of what the library says of a fault
# Of a grammar with schemas in it, where the one at fault stands; and the lines of the grammar that are repeated below.
_PLACE: Final = re.compile(r"at \d+\(\d+\): failed to compile JSON schema: ")
_REPEATED: Final = re.compile(r"^ *\d+ \| .*", re.MULTILINE | re.DOTALL)


class GrammarEvents:
    """Hears of grammars. Called on any thread."""

    def on_request(self, kind: str, is_known: bool) -> None:
        """A request is to be held to a grammar of this kind, which was made before or is not."""

    def on_compile(self, seconds: float, result: str) -> None:
        """`result`: `ok` or `refused`."""


class Compiled:
    """A grammar that was made ready. Implements `grammar.CompiledGrammar`; any thread.

    Its matchers share what their lexer has found out so far, and what it could not take any more. `num_bytes` is what
    it keeps in memory, as far as is known.
    """

    def __init__(self, grammar: Grammar, text: str, tokenizer: llguidance.LLTokenizer, num_bytes: int) -> None:
        self.grammar = grammar
        self.num_bytes = max(num_bytes, _LEAST_BYTES) + len(text)
        self.is_given_up = False  # following it took too long, so nobody is to try again
        self._text = text
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._first = new_matcher(tokenizer, text)

    @property
    def fault(self) -> str:
        return str(self._first.get_error())

    @property
    def num_tokens(self) -> int:
        """Of its vocabulary: an adapter's own tokens, which no grammar knows, have higher ids."""
        return int(self._tokenizer.vocab_size)

    @property
    def num_words(self) -> int:
        """Of 32 bits, in a mask."""
        return mask_words(self._tokenizer)

    def matcher(self) -> llguidance.LLMatcher:
        """One at the beginning of an answer."""
        with self._lock:
            return self._first.deep_copy()

    def renewed(self) -> llguidance.LLMatcher:
        """One that shares nothing with those before, which others may have brought to their limits."""
        fresh = new_matcher(self._tokenizer, self._text)
        with self._lock:
            self._first = fresh
            return fresh.deep_copy()


@dataclass(slots=True)
class _Job:
    """A grammar that somebody waits for, at whose expense, and who is told."""

    grammar: Grammar
    future: "Future[Compiled]"
    tenants: set[str] = field(default_factory=set)
    is_running: bool = False


class GrammarCompiler:
    """Makes grammars ready, a few at a time, and keeps `budget_bytes` of them. Its threads start with the first.

    `encode` gives the ids of text without special tokens around it; any thread.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        encode: Callable[[str], list[int]],
        budget_bytes: int,
        events: GrammarEvents | None = None,
    ) -> None:
        self._encode = encode
        self._budget_bytes = budget_bytes
        self._events = events or GrammarEvents()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._line: LoadLine[bytes] = LoadLine(NUM_COMPILERS)
        self._waiting: Counter[str] = Counter()  # by tenant
        self._jobs: dict[bytes, _Job] = {}
        self._kept: OrderedDict[bytes, Compiled] = OrderedDict()  # least recently used first
        self._refused: OrderedDict[bytes, tuple[str, tuple[str, ...]]] = OrderedDict()
        self._trials = [Helper(_TRIAL, lambda: vocabulary().to_json()) for _ in range(NUM_COMPILERS)]
        self._threads: list[threading.Thread] = []
        self._built: llguidance.LLTokenizer | None = None
        self._building = threading.Lock()
        self._is_closed = False

    def compile(self, grammar: Grammar, tenant: str) -> "Future[Compiled]":
        """The grammar, once it is ready. Raises InvalidGrammar or QueueFull, or the future does.

        Besides InvalidGrammar, the future raises Unavailable where grammars cannot be made at all.
        """
        if grammar.num_bytes > MAX_GRAMMAR_BYTES:
            raise InvalidGrammar(f"The grammar takes {grammar.num_bytes} bytes; at most {MAX_GRAMMAR_BYTES} are taken.")
        key = grammar.key
        with self._lock:
            known = self._known(key)
            self._events.on_request(grammar.kind, known is not None)
            if known is not None:
                return known
            job = self._jobs.get(key)
            if job is None or tenant not in job.tenants:
                if self._waiting[tenant] >= MAX_GRAMMARS_WAITING:
                    raise QueueFull(f"{MAX_GRAMMARS_WAITING} grammars of yours are being made ready. Come back soon.")
                job = job or self._jobs.setdefault(key, _Job(grammar, _not_to_be_cancelled()))
                job.tenants.add(tenant)
                self._waiting[tenant] += 1
                if not job.is_running:
                    self._line.add(key, [tenant])
                    self._start_threads()
                    self._work.notify()
            return job.future

    def _known(self, key: bytes) -> "Future[Compiled] | None":
        """What was found out before, as a future that is done."""
        done: Future[Compiled] = Future()
        if key in self._kept:
            self._kept.move_to_end(key)
            if self._kept[key].is_given_up:
                done.set_exception(InvalidGrammar("The grammar is too complex to be followed. Send a simpler one."))
                return done
            done.set_result(self._kept[key])
            return done
        if key in self._refused:
            self._refused.move_to_end(key)
            message, keys = self._refused[key]
            done.set_exception(InvalidGrammar(message, keys=keys))
            return done
        return None

    @property
    def kept_bytes(self) -> int:
        with self._lock:
            return sum(each.num_bytes for each in self._kept.values())

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._work.notify_all()
        for trial in self._trials:
            trial.close()
        for thread in self._threads:
            thread.join()

    # on its threads

    def _start_threads(self) -> None:
        if not self._threads:
            self._threads = [
                start_thread(partial(self._serve, trial), "grammar-compiler", is_nice=True) for trial in self._trials
            ]

    def _serve(self, trial: Helper) -> None:
        try:
            while (taken := self._take()) is not None:
                key, tenant = taken
                self._finish(key, tenant, self._made(trial, self._jobs[key].grammar))
        finally:
            trial.end()

    def _take(self) -> tuple[bytes, str] | None:
        """The next grammar to make; None at the end."""
        with self._lock:
            while not self._is_closed:
                taken = self._line.next()
                if taken is not None:
                    self._jobs[taken[0]].is_running = True
                    return taken
                self._work.wait()
        return None

    def _made(self, trial: Helper, grammar: Grammar) -> "Compiled | Exception":
        began = time.perf_counter()
        made: Compiled | Exception
        try:
            made = self._make(trial, grammar)
        except ManyloraError as error:
            made = error
        except Exception as error:  # noqa: BLE001 - whoever waits for it is told
            get_logger(__name__).exception("grammar_not_made")
            made = error
        self._events.on_compile(time.perf_counter() - began, "ok" if isinstance(made, Compiled) else "refused")
        return made

    def _tokenizer(self, trial: Helper) -> llguidance.LLTokenizer:
        """The base's, built when it is first needed. Raises InvalidRequest where it cannot be."""
        with self._building:
            if self._built is None:
                found = trial.ask({})
                if "refused" in found:
                    raise InvalidRequest(found["refused"])
                self._built = Spelling.from_json(found).build(self._encode)
            return self._built

    def _make(self, trial: Helper, grammar: Grammar) -> Compiled:
        tokenizer = self._tokenizer(trial)
        found = trial.ask({"kind": grammar.kind, "source": grammar.source})
        if "text" not in found:
            raise _refusal(found)
        compiled = Compiled(grammar, found["text"], tokenizer, found["num_bytes"])
        if compiled.fault:
            raise _refusal({"fault": compiled.fault})
        return compiled

    def _finish(self, key: bytes, tenant: str, made: "Compiled | Exception") -> None:
        with self._lock:
            self._line.done(tenant)
            job = self._jobs.pop(key)
            for each in job.tenants:
                self._waiting[each] -= 1
                if not self._waiting[each]:
                    del self._waiting[each]
            if isinstance(made, Compiled):
                self._keep(key, made)
            elif isinstance(made, InvalidGrammar):
                self._refused[key] = (made.message, made.keys)
                while len(self._refused) > _MAX_REFUSED:
                    self._refused.popitem(last=False)
            self._work.notify()
        if isinstance(made, Compiled):
            job.future.set_result(made)
        else:
            job.future.set_exception(made)

    def _keep(self, key: bytes, made: Compiled) -> None:
        self._kept[key] = made
        total = sum(each.num_bytes for each in self._kept.values())
        while total > self._budget_bytes and self._kept:
            _, oldest = self._kept.popitem(last=False)
            total -= oldest.num_bytes


def _not_to_be_cancelled() -> "Future[Compiled]":
    """Others may wait for it, too."""
    future: Future[Compiled] = Future()
    future.set_running_or_notify_cancel()
    return future


def _refusal(found: dict[str, Any]) -> InvalidGrammar:
    """What the caller is told of a grammar that did not pass its trial."""
    ended = found.get("ended")
    if ended is not None:
        most = f"{MAX_COMPILE_S} s of a CPU" if ended == "time" else f"{MAX_COMPILE_BYTES // 2**20} MiB of memory"
        return InvalidGrammar(
            f"The grammar is too large or too deep: making it ready takes more than {most}. Send a simpler one."
        )
    return fault_for_caller(found["fault"])


def fault_for_caller(fault: str) -> InvalidGrammar:
    """What the library says of a grammar, in words for who wrote it; `keys` are the schema's that it names."""
    fault = _REPEATED.sub("", _PLACE.sub("", fault, count=1), count=1).strip()
    lines = fault.splitlines() or [fault]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error:")), lines[0])[:_MOST_SAID]
    if fault.startswith("Unimplemented keys"):
        keys = tuple(json.loads(fault.partition(":")[2]))
        names = ", ".join(f"'{key}'" for key in keys)
        return InvalidGrammar(f"An answer cannot be held to {names} of a schema. Leave it out.", keys=keys)
    if fault.startswith("Unknown format"):
        return InvalidGrammar(f"{said}. Leave it out, or describe it by a 'pattern'.", keys=("format",))
    if fault.startswith("Unsatisfiable schema"):
        return InvalidGrammar(f"No answer satisfies the schema: {said.partition(': ')[2]}.")
    if fault.startswith("NoExtension"):
        return InvalidGrammar("No answer satisfies the grammar.")
    if fault.startswith("panic") or any(word in fault for word in _LIMIT_WORDS):
        return InvalidGrammar(f"The grammar is too complex to be followed ({said}). Send a simpler one.")
    keys = tuple(key for key in _NAMED_KEYS if key in said)
    return InvalidGrammar(f"The grammar cannot be followed: {said}.", keys=keys)
