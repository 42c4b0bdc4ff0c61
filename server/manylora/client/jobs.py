"""A server's fine-tuning jobs for a program: rows go up, a job is asked for, and is followed to its end."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, Final

from manylora.client.server import Caller, Unreachable

__all__ = ["JOBS", "PAGE", "create_job", "events_behind", "follow", "upload_rows"]

JOBS: Final = "/v1/fine_tuning/jobs"
PAGE: Final = 1000
_ENDED: Final = ("succeeded", "failed", "cancelled")
_EVERY_S: Final = 1.0
_PATIENCE_S: Final = 120.0  # a server that is killed and started again is back by then


def upload_rows(server: Caller, name: str, file: IO[bytes]) -> str:
    """The id of a file of rows, all of which the server has checked; its name says what kind of file it is."""
    made = server.call("POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": (name, file)})
    return str(made["id"])


def create_job(
    server: Caller,
    *,
    model: str,
    training_file: str,
    validation_file: str | None,
    seed: int | None,
    method: str,
    hyperparameters: Mapping[str, Any],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """The job, as the server describes it. What is None, also within the mappings, is the server's default."""
    body = {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "seed": seed,
        "method": {"type": method, method: {"hyperparameters": _given(hyperparameters)}},
        "manylora": _given(more),
    }
    job: dict[str, Any] = server.call("POST", JOBS, json=_given(body))
    return job


def events_behind(server: Caller, job_id: str, number: int) -> list[dict[str, Any]]:
    """The events behind the one of that number, oldest first; behind 0, all that are kept."""
    return list(reversed(list(_newest(server, job_id, number))))


def follow(server: Caller, job_id: str, tell: Callable[[dict[str, Any], dict[str, Any]], None]) -> dict[str, Any]:
    """Call `tell` with the job and each of its events until it has ended; the job then.

    A server that cannot be reached for a while is asked again: jobs outlive it. Raises Unreachable after two minutes.
    """
    seen, reached = 0, time.monotonic()
    while True:
        try:
            job: dict[str, Any] = server.call("GET", f"{JOBS}/{job_id}")  # before its events: the last is not missed
            events = events_behind(server, job_id, seen)
        except Unreachable:
            if time.monotonic() - reached > _PATIENCE_S:
                raise
            time.sleep(_EVERY_S)
            continue
        reached = time.monotonic()
        for event in events:
            tell(job, event)
            seen = _number(event)
        if job["status"] in _ENDED:
            return job
        time.sleep(_EVERY_S)


def _newest(server: Caller, job_id: str, until: int) -> Iterator[dict[str, Any]]:
    params: dict[str, Any] = {"limit": PAGE}
    while True:
        page = server.call("GET", f"{JOBS}/{job_id}/events", params=params)
        for event in page["data"]:
            if _number(event) <= until:
                return
            yield event
        if not page["has_more"]:
            return
        params["after"] = page["last_id"]


def _number(event: Mapping[str, Any]) -> int:
    return int(event["id"].rpartition("-")[2])


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
