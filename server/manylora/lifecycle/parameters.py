"""How the lifecycle speaks of its parameters, whoever asked: the command line, an HTTP API, a program.

A parameter is declared once, as a field of a dataclass: its type, its default, and in `Annotated` a line on what it is.
Messages name a parameter in backticks, by its field: "`rank` must be positive, not 0.". `renamed` puts in what it is
called where it was asked for, as a flag or as a field of a request. This module imports no torch.
"""

import re
from collections.abc import Mapping
from typing import Final, Literal

from manylora.errors import InvalidRequest

__all__ = ["DeviceName", "DtypeName", "Init", "InvalidParameter", "Method", "Render", "TrainTask", "renamed"]

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
Init = Literal["zero", "pissa"]
Method = Literal["supervised", "dpo"]
Render = Literal["auto", "chat", "plain"]
TrainTask = Literal["generate", "classify", "token", "question", "embed", "asr", "image"]

_NAMED: Final = re.compile(r"`([a-z][a-z_]*)`")


class InvalidParameter(InvalidRequest):
    """A parameter that cannot be, or not with the others. `param` is the first one that the message names."""

    def __init__(self, message: str) -> None:
        named = _NAMED.search(message)
        super().__init__(message, param=named and named[1])


def renamed(message: str, names: Mapping[str, str]) -> str:
    """The message with parameters called as `names` has them; what else stands in backticks stays as it is."""
    return _NAMED.sub(lambda name: names.get(name[1], name[0]), message)
