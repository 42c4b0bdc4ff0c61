"""A version is tried on a share of an adapter's requests: who gets it, what is counted, and how it ends."""

import asyncio
import math
import time
from collections import Counter
from itertools import count
from typing import Any

import pytest

from manylora.catalog import canaries
from manylora.catalog.canaries import worse
from manylora.database.tables import CanaryRow
from manylora.engine.interface import AdapterRef, Mix
from manylora.errors import ManyloraError
from manylora.settings import Settings
from tests.api.fakes import FakeGeneration

from .rig import CatalogEngine, Rig, running, sound_files

pytestmark = pytest.mark.anyio
ACME, USER, RIVAL, OPS = "acme:manager", "acme:user", "rival:manager", "ops:admin"
NUM_REQUESTS = 2_000


class OneFails(CatalogEngine):
    """An engine on which one version of every adapter fails."""

    failing = 0

    def generate(self, *args: Any, adapter: AdapterRef | Mix | None = None, **kwargs: Any) -> FakeGeneration:
        if isinstance(adapter, AdapterRef) and adapter.version == self.failing:
            raise ManyloraError("the engine tripped")
        return super().generate(*args, adapter=adapter, **kwargs)


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that are the same in each run, so that the same users are drawn."""
    numbers = count(1)
    monkeypatch.setattr(canaries, "new_id", lambda kind: f"{kind}_{next(numbers)}")


async def _two_versions(rig: Rig, name: str = "x", who: str | None = None) -> None:
    for seed in (1.0, 2.0):
        assert (await rig.push(name, sound_files(seed), who)).status_code == 201


async def _begin(rig: Rig, share: float, who: str | None = None, version: int = 2, **more: Any) -> dict[str, Any]:
    body = {"version": version, "share": share, **more}
    answer = await rig.call("PUT", "/v1/adapters/x/canary", who, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def _canary(rig: Rig, who: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = (await rig.call("GET", "/v1/adapters/x/canary", who)).json()
    return found


async def _ask(rig: Rig, user: str | None = None, who: str | None = None, model: str = "x") -> str:
    """The version that answers, or the error's code."""
    body = {"model": model, "prompt": "hi", "max_tokens": 2} | ({} if user is None else {"user": user})
    answer = await rig.call("POST", "/v1/completions", who, json=body)
    if answer.status_code != 200:
        return str(answer.json()["error"]["code"])
    return str(answer.headers["x-manylora-adapter"])


async def test_of_two_thousand_requests_a_tenth_has_the_new_version_and_all_are_counted(
    settings: Settings, numbered: None
) -> None:
    async with running(settings) as rig:
        await _two_versions(rig)
        await _begin(rig, 0.1)
        heard: dict[str, str] = {}
        for start in range(0, NUM_REQUESTS, 100):  # which share transactions of the ledger, as requests do
            users = [f"u{n}" for n in range(start, start + 100)]
            heard |= dict(zip(users, await asyncio.gather(*(_ask(rig, user) for user in users)), strict=True))

        told = Counter(heard.values())
        deviation = math.sqrt(NUM_REQUESTS * 0.1 * 0.9)
        assert abs(told["x@2"] - NUM_REQUESTS * 0.1) < 3 * deviation
        assert told["x@1"] + told["x@2"] == NUM_REQUESTS
        found = await _canary(rig)
        assert {f"x@{arm['version']}": arm["requests"] for arm in found["versions"]} == told
        for arm in found["versions"]:
            assert arm["outcomes"] == {"ok": arm["requests"]}
            assert (arm["prompt_tokens"], arm["completion_tokens"]) == (3 * arm["requests"], 2 * arm["requests"])
            assert arm["mean_ttft_s"] > 0
        metrics = (await rig.call("GET", "/metrics")).text
        for number in (1, 2):
            labels = f'adapter="x",outcome="ok",tenant="public",version="{number}"'
            assert f"manylora_canary_requests_total{{{labels}}} {told[f'x@{number}']}.0" in metrics
        usage = (await rig.call("GET", "/v1/usage")).json()["total"]
        assert usage["outcomes"] == {"ok": NUM_REQUESTS}

        some = [f"u{n}" for n in range(0, NUM_REQUESTS, 100)]
        assert [await _ask(rig, user) for user in some] == [heard[user] for user in some]
        await _begin(rig, 0.5)
        tried = [user for user, label in heard.items() if label == "x@2"][:20]
        assert {await _ask(rig, user) for user in tried} == {"x@2"}, "a larger share takes nobody's version away"
        assert (await _canary(rig))["id"] == found["id"]
    async with running(settings) as rig:
        assert {await _ask(rig, user) for user in tried} == {"x@2"}, "and no start of the server does"
        total = sum(arm["requests"] for arm in (await _canary(rig))["versions"])
        assert total == NUM_REQUESTS + len(some) + 2 * len(tried)


async def test_a_key_without_users_has_one_version_and_a_named_version_is_what_it_names(
    settings: Settings, numbered: None
) -> None:
    async with running(settings, ACME, USER, RIVAL) as rig:
        await _two_versions(rig, who=ACME)
        await _begin(rig, 1.0, ACME)
        assert {await _ask(rig, None, who) for who in (ACME, USER)} == {"x@2"}
        assert await _ask(rig, None, USER, model="x@1") == "x@1"
        assert await _ask(rig, None, USER, model="acme/x") == "x@2"
        weighed = {"adapters": [{"name": "x", "weight": 1}], "model": "base-model", "prompt": "hi", "max_tokens": 2}
        mixed = await rig.call("POST", "/v1/completions", USER, json=weighed)
        assert mixed.headers["x-manylora-adapter"] == "x@1", "in a mix the active version runs"
        assert [arm["requests"] for arm in (await _canary(rig, ACME))["versions"]] == [3, 0]
        await _begin(rig, 0.4, ACME)
        drawn = {who: {await _ask(rig, None, who) for _ in range(5)} for who in (ACME, USER)}
        assert all(len(labels) == 1 for labels in drawn.values())


async def test_one_that_fails_ends_by_itself_and_who_asked_has_the_active_version_again(
    settings: Settings, numbered: None
) -> None:
    engine = OneFails()
    async with running(settings, engine=engine) as rig:
        await _two_versions(rig)
        await _begin(rig, 0.3)
        heard = [await _ask(rig, f"u{n}") for n in range(60)]
        await rig.catalog.canaries.look()
        assert (await _canary(rig))["ended"] is None, "nothing has failed"

        engine.failing = 2
        asked = 0
        while (found := await _canary(rig))["ended"] is None:
            assert asked < 200
            heard.append(await _ask(rig, f"v{asked}"))
            asked += 1
            await rig.catalog.canaries.look()

        assert found["reason"] == "worse"
        assert found["p_value"] < 1e-4
        assert found["versions"][0]["outcomes"]["error"] == heard.count("internal_error")
        assert (await rig.call("GET", "/v1/adapters/x")).json()["canary"] is None
        assert {await _ask(rig, f"v{n}") for n in range(asked)} == {"x@1"}
        change = (await rig.call("GET", "/v1/adapters/x/history")).json()["data"][0]
        assert (change["action"], change["version"], change["by"]["role"]) == ("canary_end", 2, "server")
        assert "requests failed" in change["note"]


async def test_failures_of_the_active_version_are_no_reason_to_end(settings: Settings, numbered: None) -> None:
    engine = OneFails()
    engine.failing = 1
    async with running(settings, engine=engine) as rig:
        await _two_versions(rig)
        await _begin(rig, 0.3)
        for n in range(40):
            await _ask(rig, f"u{n}")
        await rig.catalog.canaries.look()
        found = await _canary(rig)
        assert (found["ended"], found["p_value"]) == (None, 1.0)


@pytest.mark.parametrize(
    ("method", "path", "body", "reason"),
    [
        ("PATCH", "/v1/adapters/x", {"active_version": 2}, "promoted"),
        ("PATCH", "/v1/adapters/x", {"active_version": 3}, "replaced"),
        ("DELETE", "/v1/adapters/x/versions/2", None, "deleted"),
        ("PUT", "/v1/adapters/x/canary", {"version": 3, "share": 0.5}, "replaced"),
        ("DELETE", "/v1/adapters/x/canary", None, "stopped"),
    ],
)
async def test_it_ends_with_what_takes_its_reason_away(
    settings: Settings, method: str, path: str, body: Any, reason: str
) -> None:
    async with running(settings) as rig:
        await _two_versions(rig)
        await rig.push("x", sound_files(3.0))
        await _begin(rig, 1.0)
        first = await _canary(rig)
        done = await rig.call(method, path, json=body)
        assert done.status_code in (200, 204), done.text
        rig.catalog.check_integrity()
        with rig.catalog.database.read() as session:
            ended = session.get(CanaryRow, first["id"])
            assert ended is not None
            assert (ended.reason, ended.ended is not None) == (reason, True)
        shown = (await rig.call("GET", "/v1/adapters/x")).json()
        if method == "PUT":
            assert shown["canary"] == {"version": 3, "share": 0.5}
        else:
            assert shown["canary"] is None
            assert await _ask(rig) == f"x@{shown['active_version']}"
            assert (await rig.call("DELETE", "/v1/adapters/x/canary")).status_code == 404


async def test_a_time_that_is_over_ends_it_on_every_server_at_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings) as rig:
        await _two_versions(rig)
        await _begin(rig, 1.0, until=int(time.time()) + 3600)
        assert await _ask(rig) == "x@2"
        late = time.time() + 3601
        monkeypatch.setattr("manylora.catalog.directory.time.time", lambda: late)
        assert await _ask(rig) == "x@1", "before anybody has looked"
        monkeypatch.setattr(canaries, "now_us", lambda: int(late * 1e6))
        await rig.catalog.canaries.look()
        assert (await _canary(rig))["reason"] == "time"


async def test_what_cannot_be_tried_is_refused_and_strangers_find_nothing(settings: Settings) -> None:
    async with running(settings, ACME, USER, RIVAL, OPS) as rig:
        await _two_versions(rig, who=ACME)
        path = "/v1/adapters/x/canary"
        for who, body, status in (
            (ACME, {"version": 1, "share": 0.1}, 409),
            (ACME, {"version": 9, "share": 0.1}, 404),
            (ACME, {"version": 2, "share": 0}, 400),
            (ACME, {"version": 2, "share": 1.5}, 400),
            (ACME, {"version": 2, "share": 0.1, "until": 5}, 400),
            (USER, {"version": 2, "share": 0.1}, 403),
            (RIVAL, {"version": 2, "share": 0.1}, 404),
        ):
            assert (await rig.call("PUT", path, who, json=body)).status_code == status, body
        assert (await rig.call("GET", path, ACME)).status_code == 404, "there was none"
        await _begin(rig, 0.1, ACME)
        assert (await rig.call("GET", path, RIVAL)).status_code == 404
        assert (await rig.call("DELETE", path, RIVAL)).status_code == 404
        assert (await rig.call("GET", path, OPS, params={"tenant": "acme"})).status_code == 200
        await rig.push("y", activate="false", who=ACME)
        refused = await rig.call("PUT", "/v1/adapters/y/canary", ACME, json={"version": 1, "share": 0.1})
        assert refused.status_code == 409, "nothing is active that it could run beside"


async def test_everybodys_adapter_shows_its_canary_to_its_own_and_to_admins(settings: Settings) -> None:
    shared = "public:manager"
    async with running(settings, shared, ACME, OPS) as rig:
        await _two_versions(rig, who=shared)
        await _begin(rig, 0.5, shared)
        for who, canary in ((shared, {"version": 2, "share": 0.5}), (OPS, {"version": 2, "share": 0.5}), (ACME, None)):
            [listed] = (await rig.call("GET", "/v1/adapters", who)).json()["data"]
            assert listed["canary"] == (await rig.call("GET", "/v1/adapters/x", who)).json()["canary"] == canary
        assert (await rig.call("GET", "/v1/adapters/x/canary", ACME)).status_code == 403


@pytest.mark.parametrize(
    ("failed", "total", "other_failed", "other_total"),
    [(3, 3, 0, 97), (1, 10, 1, 90), (5, 50, 2, 450), (40, 200, 10, 1800), (0, 9, 3, 9), (7, 7, 0, 0), (2, 5, 8, 20)],
)
async def test_the_chance_is_that_of_the_tables_that_are_at_least_as_bad(
    failed: int, total: int, other_failed: int, other_total: int
) -> None:
    everything, all_failed = total + other_total, failed + other_failed
    as_bad = sum(
        math.comb(total, k) * math.comb(other_total, all_failed - k)
        for k in range(failed, min(total, all_failed) + 1)
        if all_failed - k <= other_total
    )
    exact = as_bad / math.comb(everything, all_failed)
    found = worse(failed, total, other_failed, other_total)
    if failed * other_total > other_failed * total:
        assert found == pytest.approx(exact, rel=1e-9)
    else:
        assert found == 1.0, "it is no worse"


async def test_the_chance_of_very_many_requests_is_found_at_once() -> None:
    assert worse(10**6, 10**8, 10**5, 10**8) == pytest.approx(0.0, abs=1e-12)
    assert 0.01 < worse(10_150, 10**7, 100_000, 10**8) < 0.2
