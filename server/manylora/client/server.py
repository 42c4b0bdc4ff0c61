"""The way to a running server: an answering client, and requests whose failures are ManyloraErrors."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from manylora.errors import ManyloraError

_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_ATTEMPTS = 20
_LONGEST_WAIT_S = 30.0  # a longer Retry-After is a quota, not a busy moment


@contextmanager
def connect(server: str, key: str) -> Iterator[httpx.Client]:
    """An answering server's client, closed at the end. Raises ManyloraError when none answers."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        client = httpx.Client(base_url=server.rstrip("/"), headers=headers, timeout=_TIMEOUT)
    except (httpx.InvalidURL, ValueError) as error:
        raise ManyloraError(f"--server {server} is no URL: {error}.") from error
    with client:
        try:
            ready = client.get("/ready").is_success
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ManyloraError(f"No server answers at {server}: {error}") from error
        if not ready:
            raise ManyloraError(f"The server at {server} is not ready.")
        yield client


def call(client: httpx.Client, method: str, path: str, **request: Any) -> dict[str, Any]:
    """The JSON of a good answer. A busy server (429, 503) is asked again after the time that it names.

    Raises ManyloraError with the server's own words otherwise, or when the connection breaks.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            response = client.request(method, path, **request)
        except httpx.HTTPError as error:
            raise ManyloraError(f"The server at {client.base_url} does not answer any more: {error}") from error
        wait = _wait_s(response)
        if wait is None or attempt == _ATTEMPTS:
            return _checked(response)
        time.sleep(wait)
    raise AssertionError


def _wait_s(response: httpx.Response) -> float | None:
    if response.status_code not in (429, 503):
        return None
    try:
        seconds = float(response.headers.get("retry-after", "1"))
    except ValueError:
        return None
    return seconds if seconds <= _LONGEST_WAIT_S else None


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.is_success:
        content: dict[str, Any] = response.json() if response.content else {}
        return content
    try:
        error = response.json()["error"]
        message = str(error["message"])
        problems = "".join(f"\n  {p['where']}: {p['message']}" for p in error.get("problems", ()))
    except (ValueError, KeyError, TypeError, AttributeError):
        message, problems = response.text[:200], ""
    raise ManyloraError(f"{response.request.url.path}: {response.status_code} {message}{problems}")
