"""Keys and roles at the routes, quotas around a request."""

import pytest
from fastapi import APIRouter
from starlette.testclient import TestClient

from manylora.api.auth import Admin, Manager
from manylora.errors import ManyloraError, QueueFull
from manylora.metrics import Metrics
from manylora.serving.app import create_app
from manylora.tenants.interface import Principal, Role

from .conftest import Rig


@pytest.fixture
def locked(rig: Rig) -> Rig:
    rig.gate.keys |= {role.value: Principal("acme", role, key_id=role.value) for role in Role}
    return rig


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


PROTECTED = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/alpha"),
    ("GET", "/v1/stats"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
@pytest.mark.parametrize("headers", [{}, auth("wrong"), auth("")], ids=["none", "wrong", "empty"])
def test_without_a_good_key_nothing_is_answered(locked: Rig, method: str, path: str, headers: dict[str, str]) -> None:
    answer = locked.client.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping", "/version", "/api/version"])
def test_probes_need_no_key(locked: Rig, path: str) -> None:
    assert locked.client.get(path).status_code == 200


def test_every_route_but_the_probes_and_docs_needs_a_key(locked: Rig) -> None:
    open_routes = {"/health", "/ready", "/ping", "/version", "/api/version"}
    for path, methods in locked.app.openapi()["paths"].items():
        for method in methods:
            status = locked.client.request(method, path.replace("{model_id}", "alpha")).status_code
            assert (status == 401) == (path not in open_routes), path


def test_the_body_of_a_caller_without_key_is_not_even_parsed(locked: Rig) -> None:
    assert locked.client.post("/v1/completions", content=b"{").status_code == 401


@pytest.mark.parametrize(("key", "status"), [("user", 403), ("manager", 403), ("admin", 200)])
def test_metrics_are_for_admins(locked: Rig, key: str, status: int) -> None:
    answer = locked.client.get("/metrics", headers=auth(key))
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize(
    ("key", "may_manage", "may_administrate"), [("user", 403, 403), ("manager", 200, 403), ("admin", 200, 200)]
)
def test_each_role_includes_the_one_before(locked: Rig, key: str, may_manage: int, may_administrate: int) -> None:
    router = APIRouter()

    @router.get("/managed")
    async def managed(caller: Manager) -> str:
        return caller.tenant

    @router.get("/administrated")
    async def administrated(caller: Admin) -> str:
        return caller.tenant

    locked.app.include_router(router)
    assert locked.client.get("/managed", headers=auth(key)).status_code == may_manage
    assert locked.client.get("/administrated", headers=auth(key)).status_code == may_administrate


def test_a_server_that_may_not_run_open_refuses_when_no_key_is_left(rig: Rig) -> None:
    app = create_app(rig.settings, rig.engine, rig.directory, rig.gate, Metrics(), may_run_open=False)
    answer = TestClient(app).post("/v1/completions", json={"model": "base-model", "prompt": "hi"})
    assert answer.status_code == 401
    assert "manylora keys create" in answer.json()["error"]["message"]


def test_tenant_and_weight_go_to_the_engine(rig: Rig) -> None:
    rig.gate.keys["k"] = Principal("acme", Role.USER, weight=2.5)
    rig.client.headers |= auth("k")
    rig.complete(model="beta")
    generation = rig.engine.generations[0]
    assert (generation.tenant, generation.adapter) == ("acme", rig.directory.refs[2])


def test_a_request_is_charged_its_estimate_and_settled_by_its_use(rig: Rig) -> None:
    rig.complete(prompt=["a", "bb"], n=2, max_tokens=10, stop=" quick")
    (lease,) = rig.gate.leases
    assert lease.admitted == (2 + 3, 2 * 2 * 10)
    assert lease.settled == (2 + 3, 2 * 2 * 3)


def test_a_used_up_quota_is_429_and_says_when_to_return(rig: Rig) -> None:
    rig.gate.is_used_up = True
    answer = rig.complete()
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "quota_exceeded"
    assert answer.headers["retry-after"] == "13"
    assert not rig.engine.generations


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [QueueFull("full", retry_after_s=0.2), ManyloraError("broken")])
def test_what_the_engine_refuses_is_settled_with_nothing(rig: Rig, stream: bool, error: ManyloraError) -> None:
    rig.engine.refuse = error
    assert rig.complete(stream=stream).status_code == error.status
    assert rig.gate.leases[0].settled == (0, 0)


def test_a_full_queue_takes_back_the_prompts_already_queued(rig: Rig) -> None:
    rig.engine.max_open = 2
    answer = rig.complete(prompt=["a", "b", "c"])
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "queue_full"
    assert answer.headers["retry-after"] == "2"
    assert len(rig.engine.generations) == 2
    assert not rig.engine.open
    assert rig.gate.leases[0].settled == (0, 0)


def test_a_draining_server_answers_503_and_says_when_to_return(rig: Rig) -> None:
    rig.engine.is_draining = True
    answer = rig.complete()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert int(answer.headers["retry-after"]) >= 1
