"""The process that compares a new version with what its name means, on the server, and promotes it if it is better.

It is told of the evaluation by one line of JSON on standard input, since a key is in it, and answers with one line.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from manylora.client.adapters import active_version
from manylora.client.server import Unreachable, connect
from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.evaluate.command import Promotion, run_evaluation
from manylora.lifecycle.evaluate.config import EvaluateRequest

__all__ = ["main"]

_NICENESS: Final = 19


def main() -> None:
    os.nice(_NICENESS)
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answer:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
        answer.write(json.dumps(_judged(json.loads(sys.stdin.readline()))) + "\n")


def _judged(told: dict[str, Any]) -> dict[str, Any]:
    """`promoted` and `said`; or a `fault`, which will pass without us where it `is_passing`."""
    candidate: str = told["adapters"][0]
    try:
        promotion = _compared(candidate, told)
    except InvalidRequest as error:
        promotion = Promotion(False, f"{candidate} was not promoted, as it cannot be compared: {error.message}")
    except ManyloraError as error:
        return {"fault": error.message, "is_passing": isinstance(error, Unreachable)}
    except Exception as error:  # noqa: BLE001 - its kind says enough: its words may quote somebody's data
        return {"fault": type(error).__name__, "is_passing": False}
    return {"promoted": promotion.is_done, "said": promotion.said}


def _compared(candidate: str, told: dict[str, Any]) -> Promotion:
    with connect(told["server"], told["key"], is_patient=True) as server:
        active = active_version(server, candidate.partition("@")[0])
    if active == candidate:  # by whoever judged it before and was killed
        return Promotion(True, f"{candidate} is the active version.")
    told |= {"adapters": (candidate,), "metrics": (told["promote_if_better"],), "data": Path(told["data"])}
    _, promotion = run_evaluation(EvaluateRequest(**told, with_base=active is None))
    assert promotion is not None
    return promotion


if __name__ == "__main__":
    main()
