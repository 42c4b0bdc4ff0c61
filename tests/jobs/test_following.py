"""Who follows a job outlives the server that is started again, and not one that stays away."""

from typing import Any

import pytest

from manylora.client import jobs
from manylora.client.jobs import follow
from manylora.client.server import Unreachable


class Restarted:
    """A server whose job goes on by one event each time that it is reached; it is not reached where `away` says so."""

    def __init__(self, *away: bool) -> None:
        self._away = iter(away)
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, path: str, **request: Any) -> Any:
        if next(self._away, False):
            raise Unreachable("gone")
        if path.endswith("/events"):
            return {"data": self._events[::-1], "has_more": False}
        self._events.append({"id": f"ftevent-{len(self._events) + 1}"})
        return {"status": "succeeded" if len(self._events) == 4 else "running"}


@pytest.fixture(autouse=True)
def _without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_EVERY_S", 0.0)


def test_each_event_is_told_once_though_the_server_is_away_meanwhile() -> None:
    told: list[str] = []
    # away as the job is asked for, then between the job and its events
    server = Restarted(True, True, False, False, False, True)

    job = follow(server, "ftjob-1", lambda _, event: told.append(event["id"]))

    assert job["status"] == "succeeded"
    assert told == [f"ftevent-{number}" for number in range(1, 5)]


def test_a_server_that_stays_away_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PATIENCE_S", 0.0)
    with pytest.raises(Unreachable):
        follow(Restarted(*[True] * 1000), "ftjob-1", lambda *_: None)
