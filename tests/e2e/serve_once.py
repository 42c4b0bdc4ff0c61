"""The server as a process for the tests: settings as JSON in the first argument, one JSON line when it answers.

SIGUSR1 breaks the model: every step from then on fails, as it would on a device that is gone.
"""

import json
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from manylora.engine.model_runner import ModelRunner
from manylora.errors import EngineDead, StartupError
from manylora.serving.process import Announcement, serve
from manylora.settings import load_settings


def run(settings: Mapping[str, Any], announce: Callable[[Announcement], None]) -> int:
    """Serve until a signal; returns the exit status."""

    def fail(*_args: object) -> None:
        raise RuntimeError("the device is gone")

    signal.signal(signal.SIGUSR1, lambda *_: setattr(ModelRunner, "forward", fail))
    try:
        serve(load_settings(**settings), announce)
    except StartupError as error:
        sys.stderr.write(f"{error.code}: {error.message}\n")
        return 2
    except EngineDead as error:
        sys.stderr.write(f"{error.code}: {error.message}\n")
        return 1
    return 0


def main() -> int:
    def announce(announcement: Announcement) -> None:
        sys.stdout.write(json.dumps(asdict(announcement)) + "\n")
        sys.stdout.flush()

    return run(json.loads(sys.argv[1]), announce)


if __name__ == "__main__":
    sys.exit(main())
