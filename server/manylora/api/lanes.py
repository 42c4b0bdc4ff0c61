"""Work in proportion to what a caller sent, done beside the event loop, a few pieces at a time.

Work of Python's own takes turns with the event loop and the engine for the interpreter's lock, so there is one lane for
all of it. What runs without that lock takes a CPU from the engine: one long text at a time, short ones beside it.
Templates of strangers run in other processes, as long as these are let; there tenants take turns, as they do where
files of sound are decoded.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

from manylora.chat.strangers import NUM_RENDERERS
from manylora.errors import QueueFull

__all__ = [
    "INLINE_CHARACTERS",
    "LONG_TEXT",
    "MEDIA",
    "PYTHON",
    "SHORT_TEXT",
    "TEMPLATES",
    "Turns",
    "beside_loop",
    "text_lane",
]

MAX_TEMPLATES_WAITING: Final = 64
MAX_MEDIA_WAITING: Final = 64
# Up to here the work takes a millisecond, and a thread's turn is not worth waiting for.
INLINE_CHARACTERS: Final = 4096
# Up to here it is done soon, so it need not stand behind the long ones.
_SHORT_CHARACTERS: Final = 2**18

T = TypeVar("T")

PYTHON: Final = ThreadPoolExecutor(1, "parser")
SHORT_TEXT: Final = ThreadPoolExecutor(2, "tokenizer")
LONG_TEXT: Final = ThreadPoolExecutor(1, "tokenizer-long")


class Turns:
    """A lane in which each tenant has one piece of work at a time, so that none waits for more than one of each other.

    On the event loop's thread.
    """

    def __init__(self, lane: ThreadPoolExecutor, most_waiting: int, what: str) -> None:
        self._lane = lane
        self._most_waiting = most_waiting
        self._what = what  # waits, in words
        self._turns: dict[str, asyncio.Lock] = {}
        self._waiting: Counter[str] = Counter()

    async def run(self, tenant: str, work: Callable[..., T], *args: Any, **named: Any) -> T:
        """The work's result, once it is the tenant's turn. Raises QueueFull where too much of the tenant's waits."""
        if self._waiting[tenant] >= self._most_waiting:
            raise QueueFull(f"{self._most_waiting} {self._what}. Come back soon.")
        self._waiting[tenant] += 1
        turn = self._turns.setdefault(tenant, asyncio.Lock())
        try:
            async with turn:
                return await beside_loop(self._lane, work, *args, **named)
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant], self._turns[tenant]


TEMPLATES: Final = Turns(
    ThreadPoolExecutor(NUM_RENDERERS, "templates"), MAX_TEMPLATES_WAITING, "chats of yours wait for their templates"
)
MEDIA: Final = Turns(ThreadPoolExecutor(1, "media"), MAX_MEDIA_WAITING, "files of yours wait to be decoded")


def text_lane(num_characters: int) -> ThreadPoolExecutor:
    """Where texts of so many characters are encoded that are not encoded at once."""
    return SHORT_TEXT if num_characters <= _SHORT_CHARACTERS else LONG_TEXT


async def beside_loop(lane: ThreadPoolExecutor, work: Callable[..., T], *args: Any, **named: Any) -> T:
    """The work's result, from a thread of the lane, once those before it are done."""
    return await asyncio.get_running_loop().run_in_executor(lane, partial(work, *args, **named))
