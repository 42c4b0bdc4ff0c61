"""Work in proportion to what a caller sent, done beside the event loop, a few pieces at a time.

Work of Python's own takes turns with the event loop and the engine for the interpreter's lock, so there is one lane for
all of it. What runs without that lock takes a CPU from the engine: one long text at a time, short ones beside it.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

__all__ = ["LONG_TEXT", "PYTHON", "SHORT_TEXT", "beside_loop"]

T = TypeVar("T")

PYTHON: Final = ThreadPoolExecutor(1, "parser")
SHORT_TEXT: Final = ThreadPoolExecutor(2, "tokenizer")
LONG_TEXT: Final = ThreadPoolExecutor(1, "tokenizer-long")


async def beside_loop(lane: ThreadPoolExecutor, work: Callable[..., T], *args: Any, **named: Any) -> T:
    """The work's result, from a thread of the lane, once those before it are done."""
    return await asyncio.get_running_loop().run_in_executor(lane, partial(work, *args, **named))
