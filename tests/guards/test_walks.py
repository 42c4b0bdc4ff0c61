"""The two walks of the architecture page, held against the modules that one request and one upload enter."""

import asyncio
import re
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import pytest

from manylora.serving.parts import open_parts
from manylora.settings import Settings
from tests.tiny_adapters import make_adapter

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
MAX_MAIN_LINE = 10
LOADER = "adapter-loader"
ENGINE_THREADS = ("engine", LOADER)
GROUND = {"errors", "faults", "files", "identity", "log", "metric_labels", "metrics", "threads"}
_is_asked_for: ContextVar[bool] = ContextVar("is_asked_for", default=False)


class Trace:
    """Which modules of ours are entered, in order, and which of them calls which, on all threads.

    What happens to run meanwhile does not count: only what is done on behalf of the request, and on the threads of the
    engine and of its loaders whatever is done once the request has been handed to the engine.
    """

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.calls: dict[tuple[str, str], str] = {}
        self.begun: set[str] = set()  # modules that a thread begins with
        self.handed_over: dict[str, set[str]] = {name: set() for name in ENGINE_THREADS}  # entered on these threads
        self.own: set[str] = set()  # entered on all others
        self.functions: Counter[tuple[str, str]] = Counter()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        name = module_of(frame) if event == "call" else None
        if name is None or not self._is_of_the_request():
            return
        if name not in self.entered:
            self.entered.append(name)
        thread = threading.current_thread().name
        next((found for begin, found in self.handed_over.items() if thread.startswith(begin)), self.own).add(name)
        self.functions[name, frame.f_code.co_name] += 1
        above = frame.f_back
        while above is not None and (caller := module_of(above)) is None:
            above = above.f_back
        if above is None:
            self.begun.add(name)
        elif caller != name:
            self.calls.setdefault((str(caller), name), f"{above.f_code.co_qualname} calls {frame.f_code.co_qualname}")

    def _is_of_the_request(self) -> bool:
        if _is_asked_for.get():
            return True
        is_engine = threading.current_thread().name.startswith(ENGINE_THREADS)
        return is_engine and "engine/async_engine" in self.entered


def module_of(frame: FrameType) -> str | None:
    """`api/run` for `manylora.api.run`, None where it is not ours."""
    name = str(frame.f_globals.get("__name__", ""))
    return name.removeprefix("manylora.").replace(".", "/") if name.startswith("manylora.") else None


class Tracer:
    """Notes calls while there is a trace. Threads are followed that start within `following`."""

    def __init__(self) -> None:
        self._trace: Trace | None = None

    @contextmanager
    def following(self) -> Iterator[None]:
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, value: Any) -> None:
        if self._trace is not None:
            self._trace(frame, event, value)

    @contextmanager
    def tracing(self) -> Iterator[Trace]:
        trace = self._trace = Trace()
        token = _is_asked_for.set(True)
        try:
            yield trace
        finally:
            _is_asked_for.reset(token)
            self._trace = None


@asynccontextmanager
async def serving(model: Path, data_dir: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """The application with all of its parts, without a socket."""
    settings = Settings(
        model=str(model),
        served_name="tiny",
        dtype="float32",
        kv_cache_memory="4MiB",
        adapter_memory="16MiB",
        host_tier_memory="16MiB",
        num_threads=1,
        data_dir=data_dir,
    )
    async with open_parts(settings) as parts:
        transport = httpx2.ASGITransport(app=parts.app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


@pytest.fixture(scope="module")
def traces(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """The trace of an upload, and of a streamed chat completion with the adapter."""
    folder = tmp_path_factory.mktemp("walks")
    make_adapter(tiny_llama_dir, folder / "adapter", rank=4, seed=1, strength=2.0)
    files = [("files", (path.name, path.read_bytes())) for path in sorted((folder / "adapter").glob("adapter_*"))]
    chat = {"model": "small", "stream": True, "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    tracer = Tracer()

    async def trace() -> dict[str, Trace]:
        async with serving(tiny_llama_dir, folder / "data") as client:
            with tracer.tracing() as upload:
                assert (await client.post("/v1/adapters", data={"name": "small"}, files=files)).status_code == 201
            with tracer.tracing() as request:
                answer = await client.post("/v1/chat/completions", json=chat)
            assert answer.text.endswith("data: [DONE]\n\n")
            return {"One request's way": request, "One adapter's way": upload}

    with tracer.following():
        return asyncio.run(trace())


def main_line(title: str) -> list[str]:
    """The modules that the section of the page names, an arrow between two."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    arrows = re.search(r"`[a-z_/]+`(?:\s+→\s+`[a-z_/]+`)+", section)
    assert arrows is not None, f"'{title}' names no main line"
    return re.findall(r"[a-z_/]+", arrows[0])


WALKS = pytest.mark.parametrize("title", ["One request's way", "One adapter's way"])


@WALKS
def test_the_main_line_is_short_and_entered_in_the_order_in_which_it_is_told(
    traces: dict[str, Trace], title: str
) -> None:
    line = main_line(title)

    assert len(line) <= MAX_MAIN_LINE
    assert traces[title].entered[0] == line[0]
    assert [name for name in traces[title].entered if name in line] == line


@WALKS
def test_the_main_line_hangs_together(traces: dict[str, Trace], title: str) -> None:
    """Each is called by another of it, or is what it hands to another thread."""
    trace, (first, *rest) = traces[title], main_line(title)
    reached = {callee for caller, callee in trace.calls if caller in (first, *rest)} | trace.begun

    assert [name for name in rest if name not in reached] == []


@WALKS
def test_whatever_else_is_entered_calls_nothing_of_the_main_line(traces: dict[str, Trace], title: str) -> None:
    line = main_line(title)
    back = [how for (caller, callee), how in traces[title].calls.items() if callee in line and caller not in line]

    assert len(traces[title].entered) > len(line)
    assert back == []


def test_what_an_upload_has_measured_it_hands_over_as_a_request_does(traces: dict[str, Trace]) -> None:
    """The rest of a request's main line steps for it, on the engine's thread alone, by what steps for everybody."""
    upload, request = traces["One adapter's way"], traces["One request's way"]
    line = main_line("One request's way")
    steps = set(line[line.index("engine/async_engine") + 1 :])
    memory = {name for name in upload.entered if name.startswith("lora/memory/")}

    assert len(steps) == 3
    assert steps <= upload.handed_over["engine"]
    assert not steps & upload.own
    assert upload.handed_over["engine"] - memory <= request.handed_over["engine"]
    assert upload.handed_over[LOADER] <= {*memory, *GROUND, "lora/format/spec", "engine/build"}
    texts = {"models/codec", "models/own_tokens"}
    assert {name for name in upload.own if name.startswith(("kernels/", "models/"))} <= texts


def test_an_upload_parses_each_of_its_files_once_and_the_first_request_none(traces: dict[str, Trace]) -> None:
    parsed = "lora/format/strict_json", "loads"  # the config, and the header of the tensors

    assert traces["One adapter's way"].functions[parsed] == 2
    assert [name for name in traces["One request's way"].entered if name.startswith("lora/format/")] == []
