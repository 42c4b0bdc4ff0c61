"""A small real server that speaks OpenAI's stream format and counts everything it does."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

MAX_TOKENS = 1000  # its context: who asks for a million gets no more


@dataclass
class FakeServer:
    """What it serves, how it behaves, and what it counted."""

    adapters: tuple[str, ...] = ("a000", "a001", "a002", "a003")
    keys: dict[str, str] = field(default_factory=dict)  # key -> tenant; empty: open
    first_token_s: float = 0.0
    token_s: float = 0.0
    one_at_a_time: bool = False
    fail_every: int = 0  # each n-th request is answered 503
    break_every: int = 0  # each n-th stream ends in an error event
    cut_every: int = 0  # each n-th stream ends without [DONE]
    hold_until: int = 0  # answers wait until so many requests have come
    slow_tenants: dict[str, float] = field(default_factory=dict)
    undercount: int = 0  # completion tokens its /metrics forgets
    has_usage: bool = True
    overcharge: int = 0  # prompt tokens its /v1/usage makes up
    is_strict: bool = False  # refuses wrong bodies, and uploads of other tensors than `sound`
    sound: tuple[bytes, ...] = ()
    has_plain_answers: bool = False  # to requests that are no streams
    left_in_use: int = 0  # blocks and slots that its /v1/stats never gives back

    num_requests: int = 0
    num_ok: int = 0
    num_refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    models: Counter[str] = field(default_factory=Counter)
    tenants: Counter[str] = field(default_factory=Counter)
    system_messages: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, list[bytes]] = field(default_factory=dict)
    active: dict[str, list[int]] = field(default_factory=dict)  # every version made active, in order
    deleted: list[list[bytes]] = field(default_factory=list)
    gate: asyncio.Lock = field(default_factory=asyncio.Lock)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.list_models),
                Route("/v1/completions", self.infer, methods=["POST"]),
                Route("/v1/chat/completions", self.infer, methods=["POST"]),
                Route("/v1/adapters", self.upload, methods=["POST"]),
                Route("/v1/adapters/{name}", self.adapter, methods=["GET", "PATCH", "DELETE"]),
                Route("/v1/stats", self.stats),
                Route("/metrics", self.metrics),
                *([Route("/v1/usage", self.usage)] if self.has_usage else []),
            ]
        )

    async def list_models(self, request: Request) -> Response:
        models = [{"id": "tiny", "object": "model"}]
        return JSONResponse({"data": models + [{"id": name, "parent": "tiny"} for name in self.adapters]})

    async def infer(self, request: Request) -> Response:
        tenant = self._tenant(request)
        if tenant is None:
            return JSONResponse({"error": {"message": "wrong key"}}, 401)
        raw = await request.body()
        if self.is_strict and not self._is_right(raw):
            self.num_refused += 1
            return JSONResponse({"error": {"message": "wrong"}}, 400)
        body = orjson.loads(raw)
        self.num_requests += 1
        number = self.num_requests
        self.bodies.append(body)
        self.models[body["model"]] += 1
        self.tenants[tenant] += 1
        if self.fail_every and number % self.fail_every == 0:
            return JSONResponse({"error": {"message": "too busy", "type": "server_error"}}, 503)
        if self.has_plain_answers and not body.get("stream"):
            return JSONResponse({"choices": [{"text": " w"}], "manylora": {"adapter": {"version": 1}}})
        return StreamingResponse(self._stream(body, number, tenant), media_type="text/event-stream")

    def _is_right(self, raw: bytes) -> bool:
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return False
        known = {"model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options", "ignore_eos"}
        return (
            body.keys() <= known
            and body["model"] in {"tiny", *self.adapters, *self.versions}
            and body["max_tokens"] < 10_000
            and body["temperature"] <= 2
        )

    async def _stream(self, body: dict[str, Any], number: int, tenant: str) -> AsyncIterator[bytes]:
        async with self.gate if self.one_at_a_time else contextlib.nullcontext():
            while self.num_requests < self.hold_until:
                await asyncio.sleep(0.01)
            await asyncio.sleep(self.first_token_s + self.slow_tenants.get(tenant, 0.0))
            text = body.get("prompt") or " ".join(message["content"] for message in body["messages"])
            for message in body.get("messages", []):
                if message["role"] == "system":
                    self.system_messages[message["content"]] += 1
            if "messages" in body:
                yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            num_tokens = min(body["max_tokens"], MAX_TOKENS)
            for token in range(num_tokens):
                is_last = token == num_tokens - 1
                piece = {"delta": {"content": " w"}} if "messages" in body else {"text": " w"}
                finish = {"finish_reason": "length" if is_last else None}
                yield _event({"choices": [{"index": 0, **piece, **finish}]})
                await asyncio.sleep(self.token_s)
            if self.break_every and number % self.break_every == 0:
                yield _event({"error": {"message": "engine stopped"}})
                return
            if self.cut_every and number % self.cut_every == 0:
                return
            counts = {"prompt_tokens": len(text.split()), "completion_tokens": num_tokens}
            self.num_ok += 1
            self.prompt_tokens += counts["prompt_tokens"]
            self.completion_tokens += counts["completion_tokens"]
            yield _event({"choices": [], "usage": counts, "manylora": {"load_tier": "host", "queue_ms": 2.0}})
            yield b"data: [DONE]\n\n"

    async def upload(self, request: Request) -> Response:
        if self._tenant(request) is None:
            return JSONResponse({"error": {"message": "wrong key"}}, 401)
        async with request.form() as form:
            names, content = [], b""
            for part in form.getlist("files"):
                assert not isinstance(part, str)
                names.append(part.filename)
                content += await part.read()
            assert sorted(str(name) for name in names) == ["adapter_config.json", "adapter_model.safetensors"]
            if self.is_strict and content not in self.sound:
                return JSONResponse({"error": {"message": "damaged"}}, 422)
            versions = self.versions.setdefault(str(form["name"]), [])
            versions.append(content)
        return JSONResponse({"version": len(versions)}, 201)

    async def adapter(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.versions:
            return JSONResponse({"error": {"message": "no such adapter"}}, 404)
        if request.method == "DELETE":
            self.deleted.append(self.versions.pop(name))
            return Response(status_code=204)
        if request.method == "PATCH":
            self.active.setdefault(name, []).append((await request.json())["active_version"])
        return JSONResponse({"versions": [{"version": n + 1} for n in range(len(self.versions[name]))]})

    async def stats(self, request: Request) -> Response:
        used = {"kv_blocks_used": self.left_in_use, "slots_used": self.left_in_use}
        return JSONResponse({"running": 0, "waiting": 0, **used})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            "# TYPE manylora_requests_total counter\n"
            f'manylora_requests_total{{tenant="x",outcome="ok"}} {self.num_ok}\n'
            f'manylora_requests_total{{tenant="x",outcome="error"}} {self.num_requests - self.num_ok}\n'
            "# TYPE manylora_prompt_tokens_total counter\n"
            f'manylora_prompt_tokens_total{{tenant="x"}} {self.prompt_tokens}\n'
            "# TYPE manylora_completion_tokens_total counter\n"
            f'manylora_completion_tokens_total{{tenant="x"}} {max(0, self.completion_tokens - self.undercount)}\n'
        )

    async def usage(self, request: Request) -> Response:
        charged = self.prompt_tokens + (self.overcharge if self.num_ok else 0)
        total = {"prompt_tokens": charged, "completion_tokens": self.completion_tokens, "outcomes": {"ok": self.num_ok}}
        return JSONResponse({"object": "usage", "data": [], "total": total})

    def _tenant(self, request: Request) -> str | None:
        if not self.keys:
            return "open"
        return self.keys.get(request.headers.get("authorization", "").removeprefix("Bearer "))


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


@contextlib.contextmanager
def running(fake: FakeServer) -> Iterator[str]:
    """The URL of `fake`, served by uvicorn on a free port in a thread until the block ends."""
    config = uvicorn.Config(fake.app(), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    ready = threading.Event()

    async def serve() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        ready.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
