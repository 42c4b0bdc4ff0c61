"""What a model's own code raises while it is looked at is a refusal to serve it, in one line that names the part."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from torch import nn

from manylora.errors import ManyloraError, ModelUnusable

__all__ = ["part_of", "refusing"]

MAX_QUOTED: Final = 200  # characters of a foreign message


@contextmanager
def refusing(model: nn.Module, doing: str) -> Iterator[None]:
    """Raises ModelUnusable for any exception but ours. `doing` ends the sentence "X cannot be served: while …"."""
    try:
        yield
    except ManyloraError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")[:MAX_QUOTED]
        part = part_of(model, error)
        where = f", in {part}" if part else ""
        raise ModelUnusable(
            f"{type(model).__name__} cannot be served: while {doing}{where}, its code raised "
            f"{type(error).__name__}: {first}"
        ) from error


def part_of(model: nn.Module, error: BaseException) -> str:
    """The innermost module of `model` whose code was running, as "path (class)"; empty where there is none."""
    paths = {id(module): path for path, module in model.named_modules() if path}
    found = ""
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            found = f"{paths[id(owner)]} ({type(owner).__name__})"
        trace = trace.tb_next
    return found
