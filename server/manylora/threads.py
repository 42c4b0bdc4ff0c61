"""What a rule about threads is asserted with: who holds a lock, and on which thread this runs."""

import asyncio
import threading

__all__ = ["Home", "holds", "on_event_loop", "runs_on"]


def holds(condition: threading.Condition) -> bool:
    """Whether the calling thread holds the condition's lock."""
    try:
        condition.notify(0)  # wakes nobody, and refuses whoever does not hold it
    except RuntimeError:
        return False
    return True


def runs_on(name: str) -> bool:
    """Whether the calling thread is called `name`, or is one of a pool with that prefix."""
    return threading.current_thread().name.startswith(name)


def on_event_loop() -> bool:
    """Whether an event loop runs on the calling thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Home:
    """The one thread on which something is used: the first on which it was."""

    def __init__(self) -> None:
        self._thread_id = 0  # which no thread has

    def is_here(self) -> bool:
        """Whether the calling thread is that one. The first call makes it so."""
        if not self._thread_id:
            self._thread_id = threading.get_ident()
        return self._thread_id == threading.get_ident()
