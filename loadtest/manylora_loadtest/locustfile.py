"""Scenarios of this load test as a locustfile, for people who use Locust.

    LOADTEST_SCENARIO=smoke locust -f loadtest/manylora_loadtest/locustfile.py --host http://127.0.0.1:8000 --users 8

Adapters, lengths, chat share, tenants and keys come from the scenario; Locust's users and their pace replace its
arrivals. Time to first token and time per output token appear as entries of their own beside the whole request.
Locust waits for an answer before a user's next request, so unlike `python -m manylora_loadtest` it measures a
closed loop.
"""

import os
import time
from collections.abc import Iterator
from functools import cache

from locust import HttpUser, between, task

from manylora_loadtest.arrivals import Arrival
from manylora_loadtest.plan import PlannedRequest, Stage, make_plan
from manylora_loadtest.results import RequestResult
from manylora_loadtest.scenario import Scenario, find_scenario, load_scenario
from manylora_loadtest.stream import StreamReader, authorization

_PLANNED = 4096  # requests drawn ahead; then from the start again


class Tenant(HttpUser):  # type: ignore[misc]  # locust is an optional extra
    """Sends the scenario's requests one after the other."""

    wait_time = between(0, 1)

    def on_start(self) -> None:
        self._requests = _endless(_stage(tuple(self._discover())))

    @task  # type: ignore[untyped-decorator]
    def infer(self) -> None:
        request = next(self._requests)
        result = RequestResult(
            request.index, 0, request.tenant, request.adapter, request.is_chat,
            request.prompt_tokens, request.output_tokens, time.perf_counter(),
        )  # fmt: skip
        headers = {"content-type": "application/json"} | authorization(_secret(request.tenant))
        name = request.adapter or "base"
        with self.client.post(
            request.path, data=request.payload, headers=headers, stream=True, name=name, catch_response=True
        ) as response:
            if response.status_code != 200:
                response.failure(f"{response.status_code}: {response.text[:200]}")
                return
            reader = StreamReader(result)
            for line in response.iter_lines(chunk_size=1):
                reader.feed(line + b"\n", time.perf_counter())
            reader.end()
            # Locust's own time ends with the headers of a streamed answer.
            response.request_meta["response_time"] = (time.perf_counter() - result.due_s) * 1000
            if not result.is_ok:
                response.failure(f"{result.outcome}: {result.error}")
        for kind, seconds in (("TTFT", result.ttft_s), ("TPOT", result.tpot_s)):
            if result.is_ok and seconds is not None:
                self.environment.events.request.fire(
                    request_type=kind, name=name, response_time=seconds * 1000, response_length=0,
                    exception=None, context={},
                )  # fmt: skip

    def _discover(self) -> Iterator[tuple[str, str, bool]]:
        """Tenant, model and whether it is an adapter, for every model that each tenant is shown."""
        for tenant in _scenario().tenants:
            models = self.client.get("/v1/models", headers=authorization(_secret(tenant.name))).json()["data"]
            yield from ((tenant.name, model["id"], model.get("parent") is not None) for model in models)


@cache
def _scenario() -> Scenario:
    return load_scenario(find_scenario(os.environ.get("LOADTEST_SCENARIO", "smoke")))


@cache
def _secret(tenant: str) -> str | None:
    return _scenario().tenant(tenant).secret(os.environ.get("MANYLORA_API_KEY"))


@cache
def _stage(models: tuple[tuple[str, str, bool], ...]) -> Stage:
    """Planned once and shared by all users."""
    scenario = _scenario()
    base = scenario.base or next(name for _, name, is_adapter in models if not is_adapter)
    adapters = {}
    for tenant in scenario.tenants:
        mix = tenant.adapters or scenario.adapters
        found = sorted(name for owner, name, is_adapter in models if is_adapter and owner == tenant.name)
        adapters[tenant.name] = found[: mix.count] if mix.discover else list(mix.listed)
    arrival = Arrival(process="closed", concurrency=(1,), requests=_PLANNED)
    planned = scenario.model_copy(update={"arrival": arrival, "trace": None, "warmup_requests": 0})
    return make_plan(planned, base, adapters).stages[0]


@cache
def _endless(stage: Stage) -> Iterator[PlannedRequest]:
    """One iterator for all users, so that together they keep the scenario's mix."""

    def requests() -> Iterator[PlannedRequest]:
        while True:
            yield from stage.requests

    return requests()
