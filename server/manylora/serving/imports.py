"""Importing much at once: the libraries of models and web servers are a million objects, none of which ever goes."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Nobody looks for garbage in here, nor ever after in what there is at the end.

    Each look goes through all that was imported before it: a fifth of the CPU time of a small server's start.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
