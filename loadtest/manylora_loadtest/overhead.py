"""What the load test itself costs: the same client against a server that does nothing but pace its events.

Every answer's events leave one by one, so that each wakes the client up, as tokens of a real server do.
"""

import asyncio
import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection

import orjson

from manylora_loadtest.arrivals import Arrival
from manylora_loadtest.lengths import Length
from manylora_loadtest.runner import run_scenario
from manylora_loadtest.scenario import RequestMix, Scenario

__all__ = ["Overhead", "OverheadRow", "measure_overhead"]

_EVENTS = (1, 64)
_PACE_S = 0.01  # between two events of an answer
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass(frozen=True, slots=True)
class OverheadRow:
    """One measurement: answers of `events` tokens, one event each."""

    events: int
    requests_per_s: float
    cpu_share: float
    cpu_s_per_request: float


@dataclass(frozen=True, slots=True)
class Overhead:
    """A request costs about `cpu_s_per_request + events × cpu_s_per_event` of the client's CPU time."""

    rows: tuple[OverheadRow, ...]

    @property
    def cpu_s_per_event(self) -> float:
        first, last = self.rows[0], self.rows[-1]
        return (last.cpu_s_per_request - first.cpu_s_per_request) / (last.events - first.events)

    @property
    def cpu_s_per_request(self) -> float:
        return self.rows[0].cpu_s_per_request - self.rows[0].events * self.cpu_s_per_event


async def measure_overhead(concurrency: int, num_requests: int) -> Overhead:
    """Closed-loop runs at `concurrency` with short and long answers; the server has a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        port = await asyncio.to_thread(ours.recv)
        rows = [await _measure(f"http://127.0.0.1:{port}", concurrency, num_requests, n) for n in _EVENTS]
    finally:
        process.terminate()
        await asyncio.to_thread(process.join)
    return Overhead(tuple(rows))


async def _measure(url: str, concurrency: int, num_requests: int, events: int) -> OverheadRow:
    scenario = Scenario(
        name="overhead",
        base="nothing",
        warmup_requests=concurrency,
        arrival=Arrival(process="closed", concurrency=(concurrency,), requests=num_requests),
        requests=RequestMix(output_tokens=Length(value=events)),
    )
    run = await run_scenario(scenario, url)
    assert all(result.is_ok for result in run.results), "the measuring server failed"
    return OverheadRow(
        events=events,
        requests_per_s=num_requests / run.client.wall_s,
        cpu_share=run.client.cpu_share,
        cpu_s_per_request=run.client.cpu_s / num_requests,
    )


def _serve(connection: Connection) -> None:
    """Runs in the other process until it is ended."""

    async def serve() -> None:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0)
        connection.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers every request on a connection; each token is an event, a chunk and a write of its own."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            body = await reader.readexactly(length)
            if not length:
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                continue
            writer.write(_HEAD)
            for event in _events(orjson.loads(body)["max_tokens"]):
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                await writer.drain()
                await asyncio.sleep(_PACE_S)
            writer.write(b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def _events(num_tokens: int) -> list[bytes]:
    stem = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "nothing"}
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}
    middle = _event({**stem, "choices": [choice]})
    last = _event({**stem, "choices": [{**choice, "finish_reason": "length"}]})
    usage = {"prompt_tokens": 1, "completion_tokens": num_tokens, "total_tokens": num_tokens + 1}
    return [middle] * (num_tokens - 1) + [last, _event({**stem, "choices": [], "usage": usage}), b"data: [DONE]\n\n"]


def _event(value: dict[str, object]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
