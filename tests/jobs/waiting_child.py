"""The process that trains, which waits where it is told: once it has told of a checkpoint, or after two steps."""

import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manylora.jobs import child
from manylora.lifecycle.progress import Progress

tell, done = child._tell, child._done


def tell_and_wait(messages: Any, **message: Any) -> None:
    tell(messages, **message)
    if message["kind"] == "checkpoint":
        threading.Event().wait()


def done_once_stopped(
    folder: Path, listen: Callable[[Progress], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    steps = itertools.count()

    def waits() -> bool:
        while next(steps) >= 2 and not should_stop():
            time.sleep(0.05)
        return should_stop()

    return done(folder, listen, waits)


if __name__ == "__main__":
    Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
    if os.environ["WAIT"] == "after a checkpoint":
        child._tell = tell_and_wait
    else:
        child._done = done_once_stopped
    child.main()
