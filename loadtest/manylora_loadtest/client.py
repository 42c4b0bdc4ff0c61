"""Sends one request and times its stream. aiohttp, because its parser costs the shared cores least."""

import asyncio
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final

import aiohttp

from manylora_loadtest.plan import PlannedRequest
from manylora_loadtest.results import LEFT, REFUSED, RequestResult
from manylora_loadtest.stream import StreamReader, authorization, error_message, short

__all__ = ["Client"]

# uvicorn closes idle connections after 5 s; one that is reused at that moment would look like a server's fault.
_KEEPALIVE_S: Final = 2.0
_REFUSALS: Final = (400, 404, 413, 422)


class Client:
    """A pool of connections without a limit: an open-loop client must never queue. Use as `async with`."""

    def __init__(self, url: str, *, clock: Callable[[], float], timeout_s: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._clock = clock
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Client":
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, auto_decompress=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """For requests other than those of the load."""
        assert self._session is not None, "the client is used outside its `async with`"
        return self._session

    async def send(self, request: PlannedRequest, result: RequestResult, key: str | None) -> None:
        """Sends `request` now and fills in `result`; failures become its outcome, never an exception."""
        headers = {"content-type": "application/json", "accept": "text/event-stream"} | authorization(key)
        result.sent_s = self._clock()
        try:
            async with asyncio.timeout(request.leave_after_s) as patience:
                await self._ask(request, result, headers)
        except TimeoutError:
            if patience.expired():
                result.outcome = LEFT
            else:
                result.outcome, result.error = "timeout", f"no complete answer after {self._timeout.total:g} s"
        except aiohttp.ClientPayloadError as error:
            result.outcome, result.error = "cut_off", short(repr(error))
        except (aiohttp.ClientError, OSError) as error:
            result.outcome, result.error = "connection", short(repr(error))
        except asyncio.CancelledError:
            result.outcome = result.outcome or "cancelled"
            raise
        finally:
            result.end_s = self._clock()

    async def _ask(self, request: PlannedRequest, result: RequestResult, headers: Mapping[str, str]) -> None:
        async with self.session.post(self.url + request.path, data=request.payload, headers=headers) as response:
            result.status = response.status
            if request.is_wrong:
                is_refused = response.status in _REFUSALS
                result.outcome = REFUSED if is_refused else "not_refused"
                body = await response.read()
                result.error = "" if is_refused else f"{response.status}: {error_message(body)}"
            elif response.status == 200:
                await self._read(response, StreamReader(result))
            else:
                result.outcome = f"http_{response.status}"
                result.error = error_message(await response.read())

    async def _read(self, response: aiohttp.ClientResponse, reader: "StreamReader") -> None:
        while data := await response.content.readany():
            reader.feed(data, self._clock())
        reader.end()
