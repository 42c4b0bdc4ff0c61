"""What a request leaves behind when it has ended: facts, and nothing that points into it."""

import asyncio
import dataclasses
import gc
import json
import weakref
from typing import Any

import httpx2
import psutil
import pytest

from manylora.api.record import Counts, RequestRecord
from manylora.errors import QueueFull

from .conftest import Rig

PLAIN = (str, int, float, bool, type(None))


def test_a_record_keeps_facts_of_an_error_and_not_the_error() -> None:
    class Body:
        """Stands for what the frames of a refused request hold."""

    def refuse() -> weakref.ref[Body]:
        body = Body()
        try:
            raise QueueFull("full")  # noqa: TRY301 - the traceback is what is tested
        except QueueFull as error:
            kept.append(Counts().frozen(error, request_id="r", tenant="acme"))
        return weakref.ref(body)

    kept: list[RequestRecord] = []
    body = refuse()
    gc.collect()

    assert body() is None
    assert kept[0].error is not None
    assert (kept[0].error.code, kept[0].error.message) == ("queue_full", "full")


@pytest.mark.parametrize("error", [QueueFull("full"), ValueError("x"), None], ids=repr)
def test_every_field_of_a_finished_request_is_plain(error: Exception | None) -> None:
    """A guard for fields to come: what is kept for the last 2,048 requests holds no object of a request."""

    def odd(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [found for each in (*value, *value.values()) for found in odd(each)]
        if isinstance(value, list | tuple):
            return [found for each in value for found in odd(each)]
        return [] if isinstance(value, PLAIN) else [value]

    assert odd(dataclasses.asdict(Counts().frozen(error, request_id="r", tenant="acme"))) == []


def refused_bodies() -> list[bytes]:
    """Bodies of 100 kB that are refused at different stations on the way to the engine."""
    pad = "x" * 100_000
    many = [{"role": "user", "content": "hi"}] * 200
    bodies = [
        {"model": "base-model", "prompt": pad},
        {"model": "base-model", "prompt": "hi", "nonsense": pad},
        {"model": pad, "prompt": "hi"},
        {"model": "base-model", "prompt": [1] * 40_000 + ["a"]},
        {"model": "base-model", "prompt": "hi", "metadata": {pad: "a"}},
        {"model": "base-model", "prompt": "hi", "logit_bias": {str(i): "a" for i in range(9000)}},
        {"model": "base-model", "messages": [*many, {"role": "user", "content": 5, "name": pad[:92_000]}]},
        {"model": "base-model", "messages": [1] * 40_000},
    ]
    return [json.dumps(body).encode() for body in bodies] + [b"{" + pad.encode(), b"[" * 100_000]


@pytest.mark.slow
def test_ten_thousand_refused_bodies_leave_no_memory_behind(rig: Rig) -> None:
    rig = Rig(rig.settings.model_copy(update={"max_body": 2**20}))
    rig.gate.is_used_up = True  # what is well formed is refused as late as it can be
    bodies = refused_bodies()

    async def send(count: int) -> int:
        """Returns the process's memory after it. One event loop for all: one for each takes longer than the answer."""
        headers = {"content-type": "application/json"}
        transport = httpx2.ASGITransport(app=rig.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            for number in range(count):
                body = bodies[number % len(bodies)]
                route = "chat/completions" if b"messages" in body[:200] else "completions"
                answer = await client.post(f"/v1/{route}", content=body)
                assert 400 <= answer.status_code < 500, answer.text
                assert len(answer.content) < 2000
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    before = asyncio.run(send(1000))
    assert asyncio.run(send(10_000)) - before < 50 * 2**20
