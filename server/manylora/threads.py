"""What a rule about threads is asserted with, who holds a lock and on which thread this runs; and threads that run."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

__all__ = ["Home", "holds", "on_event_loop", "runs_on", "started_pool"]


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


def started_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """A pool all of whose threads run already, named after `name`.

    A pool starts them when it is given work, and a thread runs where its starter may: whoever is bound to a CPU would
    bind them, too. None is done before all have been started.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    all_started = threading.Barrier(num_threads + 1)
    for _ in range(num_threads):
        pool.submit(all_started.wait)
    all_started.wait()  # or a pool closed at once would cancel one's turn, and leave the others here for ever
    return pool
