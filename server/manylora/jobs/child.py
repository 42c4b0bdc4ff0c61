"""The process that trains one job, beside serving and with the least claim on the machine.

It is told what to do by files in a folder of its own, speaks with its worker by pipes, and knows neither database nor
store: standard output are its messages, a JSON object on each line; a line on standard input asks it to stop, and the
end of standard input is the end of its worker, without which nothing may be written.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TextIO

from manylora.errors import InvalidRequest, ManyloraError, NotEnoughMemory
from manylora.jobs.order import ORDER_FILE, Order
from manylora.lifecycle.output import checkpoint_path
from manylora.lifecycle.progress import Progress
from manylora.lifecycle.train.training import Diverged

__all__ = ["MAX_SAMPLE_CHARACTERS", "main"]

_NICENESS: Final = 19
MAX_SAMPLE_CHARACTERS: Final = 1000  # of either text
# Stages whose messages hold numbers alone; those of others quote rows, which no event does unasked.
_TOLD: Final = ("data", "estimate", "warning")
_MOST_LIKELY_KILLED: Final = "1000"  # where memory is short, it is this process that the system ends


def main() -> None:
    """`FOLDER`: train what its order says. `--base MODEL`: say which base that is."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as messages:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no message
        if sys.argv[1] == "--base":
            _tell(messages, **_base(sys.argv[2] or None))
            return
        os.nice(_NICENESS)
        with suppress(OSError):  # systems without it
            Path("/proc/self/oom_score_adj").write_text(_MOST_LIKELY_KILLED)
        stop = threading.Event()
        threading.Thread(target=_obey, args=(stop,), daemon=True).start()
        _tell(messages, **_done(Path(sys.argv[1]), lambda event: _report(messages, event), stop.is_set))


def _base(model: str | None) -> dict[str, Any]:
    """The base's signature, and whether a training could begin: what is missing is found before the first job."""
    from manylora.catalog.base_signature import signature_of
    from manylora.lifecycle.extras import need
    from manylora.models.offered import modules_of

    try:
        need("peft", "matplotlib")
        return {"kind": "base", "base": signature_of(modules_of(model)).value}
    except ManyloraError as error:
        return {"kind": "failed", "code": error.code, "message": error.message, "is_final": True}


def _obey(stop: threading.Event) -> None:
    for _ in sys.stdin:
        stop.set()
    os._exit(1)


def _done(folder: Path, listen: Callable[[Progress], None], should_stop: Callable[[], bool]) -> dict[str, Any]:
    """The last message: what came out, that it stopped, or why it failed."""
    from manylora.lifecycle.train.train import train

    told = json.loads((folder / ORDER_FILE).read_text(encoding="utf-8"))
    order = Order.of(told.pop("order"))
    config = order.config(folder, **told)
    try:
        has_begun = checkpoint_path(config.out).exists()
        result = train(config, resume=has_begun, overwrite=True, listen=listen, should_stop=should_stop)
    except (InvalidRequest, Diverged, NotEnoughMemory) as error:
        return {"kind": "failed", "code": error.code, "message": error.message, "param": error.param, "is_final": True}
    except Exception as error:  # noqa: BLE001 - whatever it is, the worker is to know what it was, and not what it quotes
        return {"kind": "failed", "code": "server_error", "message": type(error).__name__, "is_final": False}
    if not result.finished:
        return {"kind": "stopped", "steps": result.report["steps"]}
    report = result.report
    names = ("steps", "tokens", "seconds", "best_step", "best_eval_loss")
    last = report["train_loss"][-1][1] if report["train_loss"] else None
    return {"kind": "done", "train_loss": last, **{name: report[name] for name in names}}


def _report(messages: TextIO, event: Progress) -> None:
    if event.stage == "checkpoint":
        _tell(messages, kind="checkpoint")
    elif event.stage == "train":
        spent = {"tokens": event.tokens, "seconds": event.seconds}
        _tell(messages, kind="step", step=event.done, total=event.total, values=event.values, **spent)
    elif event.stage == "plan":
        _tell(messages, kind="plan", tokens=int(event.values["tokens"]))
    elif event.sample is not None:  # asked for, and the tenant's own
        texts = {name: event.sample[name][:MAX_SAMPLE_CHARACTERS] for name in ("wanted", "answered")}
        _tell(messages, kind="sample", sample={**event.sample, **texts})
    elif event.report is not None:
        _tell(messages, kind="report", report=event.report)
    elif event.message and event.stage in _TOLD:
        _tell(messages, kind="message", is_warning=event.stage == "warning", message=event.message)


def _tell(messages: TextIO, **message: Any) -> None:
    messages.write(json.dumps(message) + "\n")
    messages.flush()


if __name__ == "__main__":
    main()
