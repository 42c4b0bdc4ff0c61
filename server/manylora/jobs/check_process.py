"""A process in which uploaded data is read for the first time: rows of a stranger, whose parsing is bounded."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from manylora.children import Bounds, serve
from manylora.errors import InvalidRequest
from manylora.lifecycle.data.data import examine

__all__ = ["MAX_CHECK_BYTES", "MAX_CHECK_S", "MAX_CHECK_WAIT_S", "main"]

MAX_CHECK_S: Final = 120  # of a CPU
MAX_CHECK_BYTES: Final = 1_073_741_824
MAX_CHECK_WAIT_S: Final = 1800  # while other processes have the CPUs
_BOUNDS: Final = Bounds(MAX_CHECK_S, MAX_CHECK_BYTES, 8 * 2**20, MAX_CHECK_WAIT_S)
_NICENESS: Final = 10  # the engine comes first


def examined(asked: dict[str, Any]) -> dict[str, Any]:
    """The `facts` of a file, or its `fault`, which calls it by the `name` that it was sent under."""
    path = Path(asked["path"])
    try:
        return {"facts": asdict(examine(path))}
    except InvalidRequest as error:
        return {"fault": error.message.replace(path.name, asked["name"], 1)}


def main() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    serve(examined, _BOUNDS)


if __name__ == "__main__":
    main()
