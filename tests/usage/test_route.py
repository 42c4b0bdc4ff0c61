"""`GET /v1/usage`: who sees what, what is refused, and that it says what the metrics say."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from manylora.errors import ManyloraError
from manylora.settings import Settings
from tests.catalog.rig import Rig, running

pytestmark = pytest.mark.anyio
KEYS = ("ops:admin", "acme:user", "acme:manager", "rival:user")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(Settings(data_dir=tmp_path / "data"), *KEYS) as rig:
        yield rig


async def ask(rig: Rig, who: str, **body: Any) -> httpx2.Response:
    return await rig.call(
        "POST", "/v1/completions", who, json={"model": "base-model", "prompt": "hi", "max_tokens": 3, **body}
    )


async def usage(rig: Rig, who: str = "ops:admin", **params: str) -> dict[str, Any]:
    answer = await rig.call("GET", "/v1/usage", who, params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def counters(rig: Rig) -> dict[str, float]:
    """Sums over tenants and adapters; requests also by outcome."""
    text = (await rig.call("GET", "/metrics", "ops:admin")).text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "manylora_requests_total":
                outcome = sample.labels["outcome"]
                sums[outcome] = sums.get(outcome, 0) + sample.value
            elif sample.name in ("manylora_prompt_tokens_total", "manylora_completion_tokens_total"):
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


async def mixed(rig: Rig) -> None:
    """Every kind of end: answers, streams, refusals, an engine that fails."""
    await rig.push("sql", who="acme:manager")
    await asyncio.gather(
        *(ask(rig, who, model=model) for who in KEYS for model in ("base-model", "sql")),
        *(ask(rig, "acme:user", stream=True, n=2) for _ in range(5)),
        ask(rig, "rival:user", prompt=["a", "b", "c"]),
        ask(rig, "rival:user", temperature=17),
    )
    rig.engine.error_at, rig.engine.error = 2, ManyloraError("the engine tripped")
    with capture_logs():
        assert (await ask(rig, "acme:user")).status_code == 500
        await ask(rig, "acme:user", stream=True)


async def test_totals_are_the_metrics(rig: Rig) -> None:
    await mixed(rig)
    total, counted = (await usage(rig))["total"], await counters(rig)
    assert total["prompt_tokens"] == counted.pop("manylora_prompt_tokens_total") > 0
    assert total["completion_tokens"] == counted.pop("manylora_completion_tokens_total") > 0
    assert total["outcomes"] == {name: count for name, count in counted.items() if count}
    assert set(total["outcomes"]) == {"ok", "invalid", "error"}
    assert total["requests"] == sum(counted.values())


async def test_a_tenant_sees_itself_and_an_admin_everybody(rig: Rig) -> None:
    await mixed(rig)
    everything = await usage(rig, group_by="tenant")
    assert {row["tenant"] for row in everything["data"]} == {"ops", "acme", "rival"}
    for who in ("acme:user", "acme:manager", "rival:user"):
        tenant = who.partition(":")[0]
        own = await usage(rig, who, group_by="tenant")
        expected = [row for row in everything["data"] if row["tenant"] == tenant]
        assert _without_time(own)[:-1] == _without_time({"data": expected, "total": {}})[:-1]
        assert own["total"]["requests"] == own["data"][0]["requests"]
    assert "acme" not in str(await usage(rig, "rival:user"))


async def test_usage_survives_the_server(rig: Rig, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "restarted")
    async with running(settings, *KEYS) as first:
        await mixed(first)
        before = await usage(first, group_by="tenant,adapter,day")
    async with running(settings) as second:
        second.keys.update(first.keys)
        after = await usage(second, group_by="tenant,adapter,day")
        assert _without_time(after) == _without_time(before)
        await ask(second, "acme:user")
        assert (await usage(second))["total"]["requests"] == before["total"]["requests"] + 1


def _without_time(answer: dict[str, Any]) -> Any:
    changing = {"stored_byte_hours"}
    rows = [*answer["data"], answer["total"]]
    return [{name: value for name, value in row.items() if name not in changing} for row in rows]


async def test_pages_are_the_whole_in_its_order_and_have_its_total(rig: Rig) -> None:
    await mixed(rig)
    params = {"group_by": "tenant,adapter,day"}
    whole = await usage(rig, **params)
    assert (len(whole["data"]) > 3, whole["has_more"]) == (True, False)
    rows: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = await usage(rig, limit="2", **params, **after)
        assert page["total"]["requests"] == whole["total"]["requests"]
        rows += page["data"]
        after = {"after": page["last_id"]}
        if not page["has_more"]:
            break
        assert len(page["data"]) == 2
    assert _without_time({"data": rows, "total": {}}) == _without_time({"data": whole["data"], "total": {}})
    last = await usage(rig, **params, **after)
    assert (last["data"], last["last_id"], last["has_more"]) == ([], None, False)


async def test_every_row_of_the_finest_grouping_has_its_names(rig: Rig) -> None:
    await rig.push("sql", who="acme:manager")
    await ask(rig, "acme:user", model="sql")
    answer = await usage(rig, "acme:user", group_by="day,adapter,tenant")
    assert answer["group_by"] == ["tenant", "adapter", "day"]
    (row,) = answer["data"]
    assert (row["tenant"], row["adapter"], row["adapter_tenant"]) == ("acme", "sql", "acme")
    assert row["stored_bytes"] > 0
    assert row["outcomes"] == {"ok": 1}


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=yesterday", "from"), ("to=2026-11-24T12:07:00Z", "to"), ("from=2026-11-24&to=2026-11-23", "to"),
        ("group_by=month", "group_by"), ("format=csv", "format"), ("from=2026-11-24&from=2026-11-25", "from"),
        ("tenant=rival", "tenant"), ("limit=0", "limit"), ("limit=10001", "limit"), ("after=x", "after"),
        ("group_by=day,hour", "group_by"), ("group_by=hour", "from"),
        ("after=WzEsMiwzLDRd", "after"), ("after=é", "after"), ("after=bnVsbA==", "after"),
    ],
)  # fmt: skip
async def test_bad_values_are_400_in_openais_form(rig: Rig, query: str, param: str) -> None:
    answer = await rig.call("GET", f"/v1/usage?{query}", "acme:user")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]


async def test_prices_turn_usage_into_money(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", price_prompt=1, price_completion=2, price_currency="CHF")
    async with running(settings, *KEYS) as rig:
        await ask(rig, "acme:user")
        answer = await usage(rig, "acme:user")
        assert (answer["prices"]["currency"], answer["prices"]["completion"]) == ("CHF", 2)
        used = answer["total"]
        assert used["cost"] == (used["prompt_tokens"] + 2 * used["completion_tokens"]) / 1000 > 0


async def test_without_a_key_there_is_no_usage(rig: Rig) -> None:
    assert (await rig.call("GET", "/v1/usage")).status_code == 401


async def test_periods_cut_what_is_shown(rig: Rig) -> None:
    await ask(rig, "acme:user")
    assert (await usage(rig, to="2020-01-01"))["data"] == []
    everything = await usage(rig, **{"from": "2020-01-01T00:00:00 05:30"})
    assert everything["total"]["requests"] == 1
    assert everything["from"] == "2019-12-31T18:30:00Z"
    assert everything["to"] is None


async def test_tokens_that_a_client_did_not_wait_for_are_charged(rig: Rig) -> None:
    rig.engine.step_s = 0.01

    async def leave_after_three_events() -> None:
        messages = [{"type": "http.request", "body": BODY, "more_body": False}]
        gone = asyncio.Event()
        num_events = 0

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal num_events
            num_events += message["type"] == "http.response.body"
            if num_events == 3:
                rig.engine.generations[-1].num_output_tokens += 4  # made by steps whose deltas nobody fetched
                gone.set()

        await rig.app(scope_of(rig, "acme:user"), receive, send)  # type: ignore[arg-type]

    await leave_after_three_events()
    total = (await usage(rig))["total"]
    counted = await counters(rig)
    assert total["outcomes"] == {"cancelled": 1}
    assert total["completion_tokens"] == rig.engine.generations[-1].num_output_tokens == 7
    assert total["completion_tokens"] == counted["manylora_completion_tokens_total"]


BODY = b'{"model": "base-model", "prompt": "hi", "max_tokens": 16, "stream": true}'


def scope_of(rig: Rig, who: str) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {rig.keys[who]}".encode())]
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
