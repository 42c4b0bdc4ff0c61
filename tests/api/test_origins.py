"""Which pages may ask: none of other sites while the server has no keys, those of `allowed_origins` in any case."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.api.origins import OwnHosts
from manylora.settings import Settings
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .test_answers import events

APP = "https://app.example.com"
CHAT = {"model": "base-model", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


def every_route(rig: Rig) -> list[tuple[str, str]]:
    paths = rig.app.openapi()["paths"]
    found = [(m.upper(), p.replace("{model_id}", "alpha")) for p, methods in paths.items() for m in methods]
    return [*found, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nope"), ("POST", "/nope")]


# hosts


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_a_name_that_was_made_to_lead_here_gets_nothing_of_an_open_server(rig: Rig, host: str) -> None:
    for method, path in every_route(rig):
        answer = rig.client.request(method, path, headers={"host": host})
        if path in ("/health", "/ready", "/ping"):
            assert answer.status_code == 200
        else:
            assert answer.status_code == 403, path
            assert "is not known to be a name of it" in answer.text
            assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.1.2.3", "[::1]:8000", "localhost."]
)
def test_this_machines_own_names_are_served(rig: Rig, host: str) -> None:
    assert rig.client.get("/v1/models", headers={"host": host}).status_code == 200


def test_allowed_hosts_are_served(tmp_path: Path) -> None:
    rig = Rig(Settings(data_dir=tmp_path, allowed_hosts=("LLM.example.com",)))
    assert rig.client.get("/v1/models", headers={"host": "llm.example.com:8080"}).status_code == 200
    assert rig.client.get("/v1/models", headers={"host": "other.example.com"}).status_code == 403


def test_with_keys_the_host_is_the_proxys_affair(rig: Rig) -> None:
    rig.gate.keys["k"] = Principal("acme", Role.USER)
    answer = rig.client.get("/v1/models", headers={"host": "any.example", "authorization": "Bearer k"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("host", "here", "reachable"),
    [
        ("localhost", True, True),
        ("192.168.1.5:8000", False, True),
        ("[fe80::1]", False, True),
        ("server:8000", False, True),
        ("evil.example", False, False),
        ("", False, False),
        ("[::1]", True, True),
        ("[::1]evil.com", False, False),
        ("[::1]:80evil.com", False, False),
        ("[::1", False, False),
        ("[localhost]", False, True),
        ("localhost:evil.com", False, False),
        ("127.0.0.1:80:80", False, False),
        ("::1", False, False),
    ],
)
def test_a_reachable_server_has_more_names(host: str, here: bool, reachable: bool) -> None:
    assert (host in OwnHosts((), is_reachable=False)) == here
    assert (host in OwnHosts((), is_reachable=True)) == reachable


# pages of other sites


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:3000", "http://localhost"])
def test_a_page_of_another_site_gets_nothing_of_an_open_server(rig: Rig, origin: str) -> None:
    for method, path in every_route(rig):
        answer = rig.client.request(method, path, headers={"origin": origin})
        assert answer.status_code == (200 if path in ("/health", "/ready", "/ping") else 403), path
        assert "access-control-allow-origin" not in answer.headers


FORMS: list[dict[str, Any]] = [
    {"data": {"name": "x"}},
    {"files": {"archive": ("a.zip", b"PK")}},
    {"content": b'{"name": "x"}', "headers": {"content-type": "text/plain"}},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "mark", [{"origin": "null"}, {"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}]
)
def test_no_form_of_another_site_writes(rig: Rig, form: dict[str, Any], mark: dict[str, str]) -> None:
    headers = {**form.get("headers", {}), **mark}
    answer = rig.client.post("/v1/adapters", **{**form, "headers": headers})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")


def test_what_curl_sends_is_no_page(rig: Rig) -> None:
    assert rig.client.post("/v1/adapters", **FORMS[1]).status_code == 404  # no such route here, but not refused


def test_the_servers_own_pages_may_write(rig: Rig) -> None:
    own = {"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
    assert rig.client.post("/v1/chat/completions", json=CHAT, headers=own).status_code == 200
    assert rig.client.post("/v1/adapters", files={"archive": b"PK"}, headers=own).status_code == 404


def test_a_link_on_another_site_may_lead_here(rig: Rig) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert rig.client.get("/docs", headers=link).status_code == 200
    picture = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert rig.client.get("/docs", headers=picture).status_code == 403


# allowed origins


@pytest.fixture(params=["open", "keyed", "everybody"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Rig, dict[str, str]]:
    """A server that a page of `APP` may ask, and the page's headers."""
    origins = ("*",) if request.param == "everybody" else (APP, "http://other.example")
    rig = Rig(Settings(data_dir=tmp_path, allowed_origins=origins, max_body=64 * 1024))
    if request.param == "open":
        return rig, {"origin": APP}
    rig.gate.keys["k"] = Principal("acme", Role.ADMIN)
    return rig, {"origin": APP, "authorization": "Bearer k"}


def preflight(client: TestClient, path: str, method: str, headers: str, origin: str = APP) -> Any:
    asked = {"origin": origin, "access-control-request-method": method, "access-control-request-headers": headers}
    return client.options(path, headers=asked)


OPENAI_HEADERS = (
    "authorization",
    "content-type",
    *(f"x-stainless-{n}" for n in ("lang", "os", "retry-count", "new-one")),
)


def test_a_preflight_needs_no_key_and_allows_every_header(shared: tuple[Rig, dict[str, str]]) -> None:
    rig, _ = shared
    for method, path in [*every_route(rig), ("PATCH", "/v1/adapters/x"), ("DELETE", "/v1/adapters/x")]:
        answer = preflight(rig.client, path, method, ",".join((*OPENAI_HEADERS, "x-request-id")))
        assert answer.status_code == 200, path
        assert answer.headers["access-control-allow-origin"] in (APP, "*")
        assert method in answer.headers["access-control-allow-methods"]
        assert set(OPENAI_HEADERS) <= set(answer.headers["access-control-allow-headers"].split(","))
        assert answer.headers["x-request-id"]


def test_whole_answers_streams_and_errors_may_be_read(
    shared: tuple[Rig, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, page = shared
    monkeypatch.setattr(rig.directory, "visible_to", lambda tenant, start: 1 / 0)
    answers = {
        200: rig.client.post("/v1/chat/completions", json=CHAT, headers=page),
        400: rig.client.post("/v1/chat/completions", json={}, headers=page),
        404: rig.client.get("/nope", headers=page),
        405: rig.client.put("/v1/models", headers=page),
        413: rig.client.post("/v1/completions", content=b"x" * 100_000, headers={**page, **JSON}),
        415: rig.client.post("/v1/completions", content=b"x", headers={**page, "content-encoding": "gzip"}),
        500: rig.client.get("/v1/models", headers=page),
    }
    if rig.gate.keys:
        answers[401] = rig.client.get("/v1/models", headers={"origin": APP})
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] in (APP, "*")
        exposed = answer.headers["access-control-expose-headers"]
        assert all(name in exposed for name in ("x-request-id", "x-manylora-adapter", "retry-after"))
    stream = rig.client.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=page)
    assert stream.headers["access-control-allow-origin"] in (APP, "*")
    assert events(stream.text)


def test_a_preflight_for_a_method_that_nothing_has_names_the_method(shared: tuple[Rig, dict[str, str]]) -> None:
    refused = preflight(shared[0].client, "/v1/models", "PUT", "authorization")
    assert (refused.status_code, refused.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "'PUT'" in refused.json()["error"]["message"]
    assert refused.headers["access-control-allow-origin"] in (APP, "*")
    assert "PUT" not in refused.headers["access-control-allow-methods"]
    assert refused.headers["content-type"] == "application/json"


@pytest.mark.parametrize("is_keyed", [False, True])
def test_any_other_origin_is_not_allowed(tmp_path: Path, is_keyed: bool) -> None:
    rig = Rig(Settings(data_dir=tmp_path, allowed_origins=(APP,)))
    headers = {"origin": "https://app.example.com.evil.example"}
    if is_keyed:
        rig.gate.keys["k"] = Principal("acme", Role.USER)
        headers["authorization"] = "Bearer k"
    refused = preflight(rig.client, "/v1/models", "GET", "authorization", origin=headers["origin"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "cross_site")
    answer = rig.client.get("/v1/models", headers=headers)
    assert answer.status_code == (200 if is_keyed else 403)
    for each in (refused, answer):
        assert "access-control-allow-origin" not in each.headers


def test_by_default_no_origin_is_allowed(rig: Rig) -> None:
    rig.gate.keys["k"] = Principal("acme", Role.USER)
    assert preflight(rig.client, "/v1/models", "GET", "authorization").status_code == 405
    answer = rig.client.get("/v1/models", headers={"origin": APP, "authorization": "Bearer k"})
    assert "access-control-allow-origin" not in answer.headers
