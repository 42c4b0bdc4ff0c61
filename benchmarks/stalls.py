"""How long others wait beside the worst that one caller may send.

    python -m benchmarks.stalls [--output benchmarks/results/stalls.json] [-- flags of manylora serve]

Eight streams run and `/health` is asked every few milliseconds. Each kind of worst input is sent once by a process of
its own, and the longest pause of either meanwhile is set against the longest without: the goal is that none is more
than 100 ms longer. Beside any prompt that is computed a token of a stream takes a full step's time, so for inputs that
are computed "without" is beside an ordinary prompt, the first row.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.servers import Server, end_on_sigterm, free_port

NUM_STREAMS = 8
QUIET_S = 8.0
LEAVE_AFTER_S = 5.0  # what goes on being computed is of no interest here
AFTER_S = 0.5
GOAL_MS = 100.0
MIB = 2**20
JSON_TYPE = "application/json"


@dataclass
class Case:
    """One input. `body` is made when its turn has come."""

    name: str
    path: str
    body: Callable[[], bytes]
    content_type: str = JSON_TYPE
    is_computed: bool = False


@dataclass
class Pauses:
    """The longest pauses so far, in seconds."""

    stream_s: float = 0.0
    health_s: float = 0.0


@dataclass
class Row:
    """What was seen beside one input. `extra_ms` is the longest pause beyond the one without it."""

    name: str
    status: str
    took_s: float
    stream_ms: float
    health_ms: float
    extra_ms: float = field(default=0.0)


def completion(**fields: Any) -> Callable[[], bytes]:
    return lambda: json.dumps({"model": MODEL, "max_tokens": 1, **fields}).encode()


MODEL = "base"
WORDS = "The quick brown fox, 123 times, jumps over the lazy dog. "
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def text(num_characters: int) -> str:
    return (WORDS * (num_characters // len(WORDS) + 1))[:num_characters]


def history(num_messages: int, num_characters: int) -> Callable[[], bytes]:
    def make() -> bytes:
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": text(num_characters)} for n in range(num_messages)]
        return json.dumps({"model": MODEL, "max_tokens": 1, "messages": messages}).encode()

    return make


def filled(start: bytes, item: bytes, end: bytes, num_bytes: int = 16 * MIB - 64) -> Callable[[], bytes]:
    return lambda: start + item * ((num_bytes - len(start) - len(end)) // len(item)) + end


def multipart(num_bytes: int) -> bytes:
    """A form with a tensor file that is none."""
    parts = [("name", None, b"stalls"), ("files", "adapter_config.json", b"{}")]
    parts.append(("files", "adapter_model.safetensors", os.urandom(num_bytes)))
    lines = []
    for field_name, file_name, content in parts:
        named = f'; filename="{file_name}"' if file_name else ""
        head = f'--limit\r\nContent-Disposition: form-data; name="{field_name}"{named}\r\n\r\n'
        lines.append(head.encode() + content + b"\r\n")
    return b"".join(lines) + b"--limit--\r\n"


def cases(context: int) -> list[Case]:
    """The worst of each kind; `context` is the model's, in tokens."""
    start = b'{"model": "base", "messages": ['
    ids = [1000 + n % 5000 for n in range(context - 8)]
    few = min(context // 2, 4096)
    return [
        Case("an ordinary prompt of half the context", COMPLETIONS, completion(prompt=ids[: context // 2]),
             is_computed=True),
        Case("text of 15 MB", COMPLETIONS, completion(prompt=text(15_000_000))),
        Case("text too long by its tokens alone", COMPLETIONS, completion(prompt=text(context * 16))),
        Case("256 prompts of 8,190 characters", COMPLETIONS, completion(prompt=[text(8190)] * 256),
             is_computed=True),
        Case("256 prompts of 2,300 ids", COMPLETIONS, completion(prompt=[ids[:2300]] * 256),
             is_computed=True),
        Case("chat of 2,048 messages", CHAT, history(2048, 8)),
        Case("chat of 2,048 messages, 16 MB", CHAT, history(2048, 8000)),
        Case("chat of 200,000 messages", CHAT, history(200_000, 1)),
        Case("chat of one message of 15 MB", CHAT, history(1, 15_000_000)),
        Case("JSON of 8 million numbers", CHAT, filled(start, b"1,", b"1]}")),
        Case("JSON of a million numbers", CHAT, filled(start, b"12345,", b"1]}", 6 * MIB - 1024)),
        Case("JSON of 5 million objects", CHAT, filled(start, b"{},", b"{}]}")),
        Case("JSON of 32,000 objects", CHAT, filled(start, b"{},", b"{}]}", 96_000)),
        Case("JSON of 130,000 keys", CHAT, lambda: json.dumps({f"k{n}": 1 for n in range(130_000)}).encode()),
        Case("JSON nested 5 million deep", CHAT, filled(start, b"[", b"")),
        Case("JSON with one string of escapes", CHAT, filled(start + b'"', b"\\n", b'"]}')),
        Case("logit_bias of 4,096 for 64 choices", COMPLETIONS, completion(
            prompt="Hi", n=64, max_tokens=8, logit_bias={str(n): 0.5 for n in range(4096)}),
            is_computed=True),
        Case("32 stop strings of 1,024 characters for 64 choices", COMPLETIONS, completion(
            prompt="Hi", n=64, max_tokens=8, ignore_eos=True, stop=[f"{n:02}" * 512 for n in range(32)]),
            is_computed=True),
        Case("1,024 stop tokens", COMPLETIONS, completion(
            prompt="Hi", max_tokens=8, ignore_eos=True, stop_token_ids=list(range(1000, 2024))),
            is_computed=True),
        Case("n = 128", COMPLETIONS, completion(prompt="Hi", n=128, max_tokens=8, ignore_eos=True),
             is_computed=True),
        Case("echo of half the context with 20 log-probabilities", COMPLETIONS, completion(
            prompt=ids[:few], max_tokens=0, echo=True, logprobs=20), is_computed=True),
        Case("echo of 128 choices", COMPLETIONS, completion(prompt=ids[:1000], n=128, max_tokens=1, echo=True),
             is_computed=True),
        Case("chat with 20 log-probabilities for 32 choices", CHAT, lambda: json.dumps({
            "model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "n": 32, "max_tokens": 16,
            "logprobs": True, "top_logprobs": 20, "ignore_eos": True}).encode(), is_computed=True),
        Case("schema with an enum of 5,000", COMPLETIONS, completion(
            prompt="Hi", max_tokens=8, guided_json={"enum": [f"number {n} of many" for n in range(5000)]}),
            is_computed=True),
        Case("schema of 5,000 references in a row", COMPLETIONS, completion(prompt="Hi", guided_json={
            "$ref": "#/$defs/n0", "$defs": {f"n{n}": {"$ref": f"#/$defs/n{(n + 1) % 5000}"} for n in range(5000)}})),
        Case("schema that nests without end", COMPLETIONS, completion(prompt="Hi", max_tokens=64, guided_json={
            "$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}),
            is_computed=True),
        Case("pattern (a?){500}a{500}", COMPLETIONS, completion(prompt="Hi", guided_regex="(a?){500}a{500}")),
        Case("upload of 64 MiB that is no adapter", "/v1/adapters", lambda: multipart(64 * MIB),
             "multipart/form-data; boundary=limit"),
        Case("import with 60,000 unknown fields", "/v1/adapters", lambda: json.dumps(
            {f"k{n}": 1 for n in range(60_000)}).encode()),
    ]  # fmt: skip


class Watch:
    """Streams and a prober that go on for as long as the block; `pauses` may be set back at any time."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session
        self.pauses = Pauses()

    async def __aenter__(self) -> "Watch":
        self._tasks = [asyncio.create_task(self._stream(number)) for number in range(NUM_STREAMS)]
        self._tasks.append(asyncio.create_task(self._probe()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _stream(self, number: int) -> None:
        body = {"model": MODEL, "prompt": f"Story {number}:", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        while True:
            async with self._session.post(self._url + COMPLETIONS, json=body) as answer:
                answer.raise_for_status()
                last = None
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        now = time.perf_counter()
                        if last is not None:
                            self.pauses.stream_s = max(self.pauses.stream_s, now - last)
                        last = now

    async def _probe(self) -> None:
        while True:
            began = time.perf_counter()
            async with self._session.get(self._url + "/health") as answer:
                await answer.read()
            self.pauses.health_s = max(self.pauses.health_s, time.perf_counter() - began)
            await asyncio.sleep(0.005)

    async def alone(self) -> None:
        """Waits until nothing but the streams is computed."""
        while True:
            await asyncio.sleep(1)
            async with self._session.get(f"{self._url}/v1/stats") as answer:
                stats = await answer.json()
            if stats["running"] + stats["waiting"] <= NUM_STREAMS:
                return

    async def longest(self, seconds: float) -> Pauses:
        """The longest pauses of the next seconds."""
        self.pauses = Pauses()
        await asyncio.sleep(seconds)
        return self.pauses


async def send(url: str, case: Case, file: Path) -> tuple[str, float]:
    """Status and seconds of one request, its body in `file`, from a process of its own, which leaves after a while."""
    command = ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", "--max-time", str(LEAVE_AFTER_S)]
    command += ["-H", f"content-type: {case.content_type}", "-H", "expect:", "--data-binary", f"@{file}"]
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(*command, url + case.path, stdout=subprocess.PIPE)
    said, _ = await process.communicate()
    return "left" if process.returncode == 28 else said.decode(), time.perf_counter() - began


async def measure(url: str, only: str) -> tuple[Pauses, list[Row]]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        async with session.get(f"{url}/v1/models") as answer:
            context = (await answer.json())["data"][0]["max_model_len"]
        async with Watch(url, session) as watch:
            await asyncio.sleep(2)
            quiet = await watch.longest(QUIET_S)
            usual, *rest = cases(context)
            busy = Pauses()
            rows = [await beside(watch, url, usual, quiet, busy)]
            for case in rest:
                if only in case.name:
                    rows.append(await beside(watch, url, case, busy if case.is_computed else quiet))  # noqa: PERF401
            return quiet, rows


async def beside(watch: Watch, url: str, case: Case, without: Pauses, keep: Pauses | None = None) -> Row:
    """The row of one case; its pauses go into `keep` too."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "body"
        # Before the watch begins: making it holds the loop that watches.
        await asyncio.to_thread(lambda: file.write_bytes(case.body()))
        await watch.alone()
        watch.pauses = Pauses()
        status, took_s = await send(url, case, file)
        await asyncio.sleep(AFTER_S)
        seen = watch.pauses
    if keep is not None:
        keep.stream_s, keep.health_s = seen.stream_s, seen.health_s
    extra_s = max(seen.stream_s - without.stream_s, seen.health_s - without.health_s)
    row = Row(case.name, status, *(round(v, 3) for v in (took_s, seen.stream_s * 1e3, seen.health_s * 1e3)))
    row.extra_ms = round(extra_s * 1e3, 1)
    print(
        f"{row.name:52} {row.status:>6} {took_s:7.2f} s {row.stream_ms:9.1f} {row.health_ms:9.1f} {row.extra_ms:9.1f}"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the figures go as JSON")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("flags", nargs="*", help="more flags of manylora serve, after --")
    arguments = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [sys.executable, "-m", "manylora", "serve", "--port", str(port), "--data-dir", f"{folder}/data"]
        command += ["--served-name", MODEL, "--kv-cache-memory", "1GiB", "--log-level", "warning", *arguments.flags]
        server = Server("manylora", command, f"http://127.0.0.1:{port}", Path(folder) / "log", "/ready")
        server.start(300)
        try:
            print(
                f"{'beside 8 streams':52} {'status':>6} {'took':>9} {'stream ms':>9} {'health ms':>9} {'extra ms':>9}"
            )
            quiet, rows = asyncio.run(measure(server.url, arguments.only))
        finally:
            server.stop()
    print(f"without: stream {quiet.stream_s * 1e3:.1f} ms, /health {quiet.health_s * 1e3:.1f} ms")
    late = [row.name for row in rows if row.extra_ms > GOAL_MS]
    print(f"more than {GOAL_MS:.0f} ms longer: {', '.join(late) or 'none'}")
    if arguments.output:
        figures = {
            "num_cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0],  # beyond the number of CPUs, others had them as well
            "quiet": asdict(quiet),
            "rows": [asdict(row) for row in rows],
            "flags": arguments.flags,
        }
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
