"""Threads with room for the library's recursion, which follows a grammar down as deep as it goes."""

import os
import threading
from collections.abc import Callable
from typing import Final

__all__ = ["start_thread"]

_STACK_BYTES: Final = 64 * 2**20  # of address space; what is not used takes no memory
_NICENESS: Final = 10
_lock = threading.Lock()


def start_thread(work: Callable[[], None], name: str, *, is_nice: bool = False) -> threading.Thread:
    """A daemon thread that does `work`; `is_nice`: when the engine's threads have nothing to do."""

    def run() -> None:
        if is_nice and hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    with _lock:
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return thread
