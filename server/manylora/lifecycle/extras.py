"""Packages that only some commands need: asked for before the work, and pictures that cost nobody the work."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from manylora.errors import InvalidRequest
from manylora.lifecycle.progress import Listener, Progress
from manylora.packages import install_command, package_of

__all__ = ["check_there", "decoration", "need"]


def need(*modules: str) -> None:
    """Import what the command will use. Raises InvalidRequest naming all that is missing, before anything is done."""
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(module)
    _refuse(missing)


def check_there(*modules: str) -> None:
    """`need` for what another process will import. Raises InvalidRequest; imports nothing."""
    _refuse([module for module in modules if importlib.util.find_spec(module) is None])


def _refuse(missing: Sequence[str]) -> None:
    if missing:
        raise InvalidRequest(
            f"This needs {' and '.join(map(package_of, missing))}, which cannot be imported here. Install it with: "
            f"{install_command(*missing)}"
        )


@contextmanager
def decoration(what: str, listen: Listener) -> Iterator[None]:
    """Around what is drawn once the result is written: a failure is a warning, and the result stays whole."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a drawing library raises anything
        said = " ".join(str(error).split())[:200] or type(error).__name__
        listen(Progress("warning", message=f"{what} could not be drawn: {said}. The result is whole without it."))
