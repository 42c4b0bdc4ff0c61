"""The one way to a running server: a connection with the key, requests, and failures that are ManyloraErrors.

Who works for hours without a person (a training that publishes, an evaluation of many requests) asks a busy server
again; a command with a person in front of it tells the person.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import httpx

from manylora.errors import InvalidRequest, ManyloraError, quoted

__all__ = ["BrokenOff", "Caller", "Refused", "Server", "Unreachable", "connect"]

_TIMEOUT: Final = httpx.Timeout(10.0, read=600.0, write=600.0)  # an upload is answered once it was validated
_REVISION_HEADER: Final = "x-manylora-revision"
_ATTEMPTS: Final = 20
_LONGEST_WAIT_S: Final = 30.0  # a longer Retry-After is a quota, not a busy moment


class Caller(Protocol):
    """Whoever has requests answered: a `Server`, or what ends a command where the answer is no success."""

    def call(self, method: str, path: str, **request: Any) -> Any:
        """The JSON of a good answer, None for an empty one."""


class Unreachable(ManyloraError):
    """No server answers there, or it does not any more."""


class BrokenOff(ManyloraError):
    """The server ended a stream with an error, or without an end."""


class Refused(ManyloraError):
    """The server's answer was no success.

    `answered` is its HTTP status, `error` the object that it sent under that name (None where something else answers
    there), `retry_after` its header of that name, `advice` what a command's caller can do about it, behind a space.
    """

    def __init__(self, response: httpx.Response) -> None:
        self.answered = response.status_code
        self.retry_after: str | None = response.headers.get("retry-after")
        self.error = _error_of(response)
        self.advice = " Commands take the key from MANYLORA_KEY." if self.answered == httpx.codes.UNAUTHORIZED else ""
        said = response.text[:200] if self.error is None else self.error["message"]
        problems = [] if self.error is None else self.error.get("problems", [])
        if problems:  # of which the message has the first one
            said = "The adapter was refused:"
        lines = "".join(f"\n  {problem.get('where')}: {problem.get('message')}" for problem in problems)
        super().__init__(f"{response.request.url.path}: {self.answered} {said}{self.advice}{lines}")


def _error_of(response: httpx.Response) -> dict[str, Any] | None:
    try:
        error = response.json()["error"]
        return error if isinstance(error["message"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


class Server:
    """Requests to one server. Threads may share it."""

    def __init__(self, client: httpx.Client, *, is_patient: bool = False) -> None:
        """`is_patient`: a busy server (429, 503) is asked again after the time that it names."""
        self._client = client
        self._attempts = _ATTEMPTS if is_patient else 1

    def call(self, method: str, path: str, **request: Any) -> Any:
        """The JSON of a good answer, None for an empty one. Raises Unreachable or Refused."""
        for attempt in range(1, self._attempts + 1):
            try:
                response = self._client.request(method, path, **request)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise Unreachable(f"The server at {self._client.base_url} cannot be reached: {error}.") from error
            if response.is_success:
                self._remember(response)
                return _json_of(response)
            wait_s = _wait_s(response)
            if wait_s is None or attempt == self._attempts:
                raise Refused(response)
            time.sleep(wait_s)
        raise AssertionError

    def _remember(self, response: httpx.Response) -> None:
        """What was changed is asked for from then on: whichever of several servers answers next knows of it."""
        revision = response.headers.get(_REVISION_HEADER)
        if revision is not None:
            self._client.headers[_REVISION_HEADER] = revision

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream that a body asks for, up to its `[DONE]`.

        Raises Unreachable, Refused, and BrokenOff for a stream that ends before. Who stops reading ends the answer.
        """
        try:
            with self._client.stream("POST", path, json=body) as response:
                if not response.is_success:
                    response.read()
                    raise Refused(response)
                yield from _events_of(response)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(f"The server at {self._client.base_url} cannot be reached: {error}.") from error


@contextmanager
def connect(address: str, key: str = "", *, is_patient: bool = False) -> Iterator[Server]:
    """The server at a URL, closed at the end; a patient one has to be ready.

    Raises InvalidRequest for what is no URL, and for a patient one Unreachable or Refused.
    """
    if not address.startswith(("http://", "https://")):
        raise InvalidRequest(
            f"`server` must begin with http:// or https://; it is '{quoted(address)}'.", param="server"
        )
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        client = httpx.Client(base_url=address.rstrip("/"), headers=headers, timeout=_TIMEOUT)
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidRequest(f"`server` is no URL: {error}.", param="server") from error
    with client:
        if is_patient:
            Server(client).call("GET", "/ready")
        yield Server(client, is_patient=is_patient)


def _events_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if not data:
            continue  # a comment that keeps the connection open
        event = json.loads(data)
        if "error" in event:
            raise BrokenOff(str(event["error"]["message"]))
        yield event
    raise BrokenOff("The server broke off in the middle of an answer.")


def _wait_s(response: httpx.Response) -> float | None:
    if response.status_code not in (429, 503):
        return None
    try:
        seconds = float(response.headers.get("retry-after", "1"))
    except ValueError:
        return None
    return seconds if seconds <= _LONGEST_WAIT_S else None


def _json_of(response: httpx.Response) -> Any:
    try:
        return response.json() if response.content else None
    except ValueError:
        raise Refused(response) from None
