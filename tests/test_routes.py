"""Every route of the application: on the page, in the document, counted, traced, and closed to those it is not for.

The list of routes is the application's own, so that a new one is held to all of this, or fails here. What a table below
names is what cannot be read from the application: who may use a route, and which routes ask the model nothing. That
examples run and the document is sound is tests/api/test_openapi.py's, each API's own words tests/api's; classifiers,
rerankers and speech are charged in tests/encoders and tests/speech, with models that have heads and hear.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families

from manylora.api.examples import BODIES, PARAMETERS
from manylora.api.middleware import POLLED_PATHS
from manylora.metrics import OTHER_LABEL
from manylora.serving.app import inference_routes
from manylora.settings import Settings
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from manylora.tenants.limits import TenantStore

from .catalog.rig import Rig, running
from .otlp import ReceivedSpan, receiving

pytestmark = pytest.mark.anyio
API_PAGE = Path(__file__).parents[1] / "docs" / "api.md"
TENANTS: Final = ("acme:user", "acme:manager", "ops:admin")

PAGES = {
    "GET /",
    "GET /dashboard",
    "GET /dashboard/",
    "GET /dashboard/assets/{asked_digest}/{name}",
    "GET /docs",
    "GET /docs/",
}
WITHOUT_KEY = {"GET /health", "GET /ready", "GET /ping", "GET /version", "GET /api/version"}
FOR_MANAGERS = {
    "POST /v1/adapters", "PATCH /v1/adapters/{name}", "DELETE /v1/adapters/{name}",
    "POST /v1/adapters/{name}/rollback", "PUT /v1/adapters/{name}/canary", "DELETE /v1/adapters/{name}/canary",
    "DELETE /v1/adapters/{name}/versions/{n}", "GET /v1/adapters/{name}/versions/{n}/download",
    "DELETE /v1/models/{model_id}",
    "POST /v1/files", "GET /v1/files", "GET /v1/files/{file_id}", "GET /v1/files/{file_id}/content",
    "DELETE /v1/files/{file_id}",
    "POST /v1/fine_tuning/jobs", "GET /v1/fine_tuning/jobs", "GET /v1/fine_tuning/jobs/{job_id}",
    "GET /v1/fine_tuning/jobs/{job_id}/events", "GET /v1/fine_tuning/jobs/{job_id}/checkpoints",
    "POST /v1/fine_tuning/jobs/{job_id}/cancel", "POST /v1/fine_tuning/jobs/{job_id}/pause",
    "POST /v1/fine_tuning/jobs/{job_id}/resume",
}  # fmt: skip
FOR_ADMINS = {
    "GET /metrics", "GET /metrics/router", "GET /v1/logs/{request_id}", "GET /v1/audit",
    "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter",
    "GET /v1/keys", "POST /v1/keys", "GET /v1/keys/{key_id}", "DELETE /v1/keys/{key_id}",
    "GET /v1/tenants", "GET /v1/tenants/{tenant}", "PATCH /v1/tenants/{tenant}",
}  # fmt: skip
# Of the routes beside the model, those that run nothing on it, so that nobody is charged.
FREE = {
    "GET /v1/models", "GET /v1/models/{model_id}", "POST /v1/messages/count_tokens", "GET /info", "GET /ping",
    "POST /tokenize", "POST /detokenize", "GET /tokenizer_info",
    "GET /api/tags", "POST /api/show", "GET /api/version",
}  # fmt: skip
# What the model of this test cannot answer: it has no heads and hears nothing. Refused, and counted as that.
OF_OTHER_MODELS = {
    "POST /v1/classify", "POST /classify", "POST /v1/question-answering",
    "POST /v1/audio/transcriptions", "POST /v1/audio/translations",
}  # fmt: skip


def routes_of(app: FastAPI, *, pages: bool = False) -> Iterator[str]:
    """`METHOD /path` of each route of the API, or of the pages for people."""
    for included in app.routes:
        router = getattr(included, "original_router", None)
        for route in [included] if router is None else router.routes:
            if isinstance(route, APIRoute) and route.include_in_schema != pages:
                yield from (f"{method} {route.path_format}" for method in route.methods or ())


@dataclass
class Seen:
    """What was seen of one server whose routes were all asked by nobody, a user, a manager and an admin.

    `statuses` by route and asker. Each route beside the model was asked twice more, by a tenant of its own that may
    send one request a minute: `charged` has both answers' statuses.
    """

    routes: set[str] = field(default_factory=set)
    pages: set[str] = field(default_factory=set)
    in_document: set[str] = field(default_factory=set)
    statuses: dict[tuple[str, str | None], int] = field(default_factory=dict)
    charged: dict[str, list[int]] = field(default_factory=dict)
    usage: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    spans: list[ReceivedSpan] = field(default_factory=list)

    @property
    def beside_model(self) -> set[str]:
        return {route.replace(":path", "") for route in map(" ".join, inference_routes())}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    found = Seen()
    settings = Settings(data_dir=tmp_path_factory.mktemp("routes"), tracing=True)
    with receiving() as receiver, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        patch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "20000")
        async with running(settings, *TENANTS) as rig:
            found.routes, found.pages = set(routes_of(rig.app)), set(routes_of(rig.app, pages=True))
            document = (await rig.call("GET", "/openapi.json")).json()["paths"]
            found.in_document = {f"{method.upper()} {path}" for path, each in document.items() for method in each}
            await _ask_all(rig, found)
            await _charge_all(rig, found)
            report = (await rig.call("GET", "/v1/usage?group_by=tenant", "ops:admin")).json()
            found.usage = {row["tenant"]: row for row in report["data"]}
            found.counts = _counted((await rig.call("GET", "/metrics", "ops:admin")).text)
        found.spans = receiver.spans  # all are sent when the server ends
    return found


async def _ask_all(rig: Rig, found: Seen) -> None:
    """Without a body, so that nothing is changed by those who may."""
    for route in sorted(found.routes):
        method, _, path = route.partition(" ")
        for who in (None, *TENANTS):
            answer = await rig.call(method, path.format(**PARAMETERS), who)
            found.statuses[route, who] = answer.status_code


async def _charge_all(rig: Rig, found: Seen) -> None:
    for route in sorted(found.beside_model):
        tenant, database = _tenant_of(route), rig.catalog.database
        _, rig.keys[tenant] = KeyStore(database).create(tenant, Role.USER)
        TenantStore(database).change(tenant, requests_per_minute=1)
        await rig.gate.refresh()
        method, _, path = route.partition(" ")
        values = {**PARAMETERS, "model_id": "base-model"}
        body = None if route not in BODIES else _for_base(BODIES[route])
        found.charged[route] = [
            (await rig.call(method, path.format(**values), tenant, json=body)).status_code for _ in range(2)
        ]


def _tenant_of(route: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", route.lower()).strip("-")


def _for_base(body: Any) -> Any:
    """An example's body that names no adapter."""
    if not isinstance(body, dict):
        return body
    named = {name: _for_base(value) for name, value in body.items() if name != "adapter_id"}
    return named | ({"model": "base-model"} if "model" in named else {})


def _counted(text: str) -> dict[str, Counter[str]]:
    """Answers by route and status, of what `/metrics` says."""
    found: dict[str, Counter[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "manylora_http_requests_total":
                route = f"{sample.labels['method']} {sample.labels['route']}"
                found.setdefault(route, Counter())[sample.labels["status"]] += int(sample.value)
    return found


def documented_routes() -> set[str]:
    """`METHOD /path` with `{}` for what stands in a path."""
    text = API_PAGE.read_text(encoding="utf-8")
    spoken = re.findall(r"`(GET|POST|PUT|PATCH|DELETE) (/[^`? ]*)", text)
    found = {f"{method} {shape(path)}" for method, path in spoken}
    # A row may write `DELETE /x`, `…/versions/{n}` for two routes.
    for method, path, more in re.findall(r"`(\w+) (/[^`]*)`, `…(/[^`]*)`", text):
        found.add(f"{method} {shape(path + more)}")
    return found


def shape(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "{}", path).rstrip("/")


async def test_every_route_is_in_the_document_and_on_the_page_and_nothing_else(seen: Seen) -> None:
    assert len(seen.routes) > 70
    assert seen.in_document == seen.routes
    assert seen.pages == PAGES
    served = {shape(route) for route in seen.routes}
    assert served - documented_routes() == set(), "not on docs/api.md"
    pages = {shape(route) for route in PAGES} | {"GET /openapi.json"}
    assert documented_routes() - served - pages == set(), "on docs/api.md only"


async def test_every_route_asks_for_a_key_of_the_role_that_it_is_for(seen: Seen) -> None:
    for route in seen.routes:
        nobody, user, manager, admin = (seen.statuses[route, who] for who in (None, *TENANTS))
        assert (nobody == 401) == (route not in WITHOUT_KEY), route
        assert (user == 403) == (route in FOR_MANAGERS | FOR_ADMINS), route
        assert (manager == 403) == (route in FOR_ADMINS), route
        assert admin not in (401, 403, 500), route


async def test_every_answer_is_counted_under_its_route(seen: Seen) -> None:
    for route in seen.routes - {"GET /metrics", "GET /v1/usage"}:
        expected = Counter(str(seen.statuses[route, who]) for who in (None, *TENANTS))
        expected.update(str(status) for status in seen.charged.get(route, ()))
        assert seen.counts[route] == expected, route
    unknown = {route for route in seen.counts if OTHER_LABEL in route}
    assert set(seen.counts) == seen.routes | unknown


async def test_every_request_is_a_span_but_those_of_machines_that_ask_every_few_seconds(seen: Seen) -> None:
    asked = Counter(
        f"{span.attributes['http.request.method']} {span.attributes['http.route']}"
        for span in seen.spans
        if span.kind == "SPAN_KIND_SERVER" and "http.route" in span.attributes
    )
    traced = {route for route in seen.routes if route.partition(" ")[2] not in POLLED_PATHS}
    assert set(asked) == traced | {"GET /openapi.json"}
    for route in traced - {"GET /v1/usage"}:
        assert asked[route] == 4 + len(seen.charged.get(route, ())), route


async def test_what_runs_on_the_model_has_its_stations_in_the_trace(seen: Seen) -> None:
    children = Counter((span.parent_id, span.name) for span in seen.spans)
    served = {
        f"{span.attributes['http.request.method']} {span.attributes['http.route']}": span
        for span in seen.spans
        if span.attributes.get("manylora.outcome") == "ok"
    }
    assert set(served) == seen.beside_model - FREE - OF_OTHER_MODELS
    for route, span in served.items():
        assert span.attributes["gen_ai.usage.input_tokens"] > 0, route
        assert span.attributes["manylora.tenant"] == _tenant_of(route)
        assert all(children[span.span_id, name] for name in ("queue", "prefill", "decode")), route


async def test_what_runs_on_the_model_is_charged_and_nothing_else(seen: Seen) -> None:
    assert seen.beside_model <= seen.routes
    for route in seen.beside_model:
        row = seen.usage.get(_tenant_of(route))
        if route in FREE:
            assert seen.charged[route] == [200, 200], route
            assert row is None, route
            continue
        assert row is not None, route
        assert row["requests"] == 2, route
        if route in OF_OTHER_MODELS:
            assert (seen.charged[route], row["outcomes"]["invalid"]) == ([400, 400], 2), route
        else:
            assert seen.charged[route] == [200, 429], route
            assert (row["outcomes"]["ok"], row["outcomes"]["rejected"]) == (1, 1), route
            assert row["prompt_tokens"] > 0, route
