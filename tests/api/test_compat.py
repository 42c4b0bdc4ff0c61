"""What real clients do a little differently: HEAD, slashes, encodings, where the key is, which model they name."""

import gzip
from pathlib import Path

import httpx
import orjson
import pytest
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from manylora.api import dashboard_routes
from manylora.errors import InvalidSettings
from manylora.metrics import Metrics
from manylora.serving.app import create_app
from manylora.settings import Settings, load_settings
from manylora.tenants.interface import Principal, Role

from .conftest import Rig, served

BODY = {"model": "base-model", "prompt": "hi", "max_tokens": 4}


@pytest.fixture
def whole(settings: Settings) -> TestClient:
    """With the dashboard's routes."""
    return client_of(settings)


def client_of(settings: Settings, root_path: str = "") -> TestClient:
    rig = Rig(settings)
    app = create_app(
        settings,
        rig.engine,
        rig.directory,
        rig.gate,
        Metrics(),
        extra_routers=(dashboard_routes.build_router(root_path),),
    )
    return TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)


def get_paths(client: TestClient) -> list[str]:
    paths = client.get("/openapi.json").json()["paths"]
    found = [path.replace("{model_id}", "alpha") for path, methods in paths.items() if "get" in methods]
    return [*found, "/dashboard", "/docs", "/openapi.json", "/docs/assets/swagger-ui.css"]


def test_head_is_get_without_the_body(whole: TestClient) -> None:
    for path in get_paths(whole):
        head, get = whole.head(path), whole.get(path)
        assert (head.status_code, head.content) == (200, b""), path
        names = set(get.headers) - {"x-request-id"}
        assert names <= set(head.headers), path
        if path not in ("/metrics", "/v1/stats"):
            assert head.headers["content-length"] == get.headers["content-length"]


def test_head_of_what_is_not_there_is_what_get_is(whole: TestClient) -> None:
    assert whole.head("/nope").status_code == 404
    assert whole.head("/v1/completions").status_code == 405


def test_head_over_a_real_connection(rig: Rig) -> None:
    with capture_logs() as logs, served(rig.app) as url, httpx.Client(base_url=url) as client:
        for _ in range(2):
            assert client.head("/version").status_code == 200
        assert client.get("/version").json()["version"]
    assert [line["method"] for line in logs if line["event"] == "request"] == ["HEAD", "HEAD", "GET"]


def test_a_slash_at_the_end_makes_no_difference(whole: TestClient) -> None:
    for path in get_paths(whole):
        answer = whole.get(f"{path}/")
        if path in ("/dashboard", "/docs"):
            assert (answer.status_code, answer.headers["location"]) == (308, f"..{path}")
        elif "assets" not in path:
            assert answer.status_code == 200, path
    assert whole.post("/v1/completions/", json=BODY).status_code == 200
    assert whole.get("/v1/models//").status_code == 404


def test_an_upload_with_a_slash_has_the_uploads_limit(rig: Rig) -> None:
    assert rig.client.post("/v1/adapters/", content=b"x" * 100_000, headers={"content-type": "x/y"}).status_code == 404


def test_the_root_leads_to_the_dashboard(whole: TestClient) -> None:
    answer = whole.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "dashboard")


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate", "zstd", "gzip, identity", "x" * 5000])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/adapters", "/v1/load_lora_adapter"])
def test_an_encoded_body_is_415(rig: Rig, path: str, encoding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    answer = rig.client.post(path, content=gzip.compress(orjson.dumps(BODY)), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
    assert "content-encoding" in answer.json()["error"]["message"]
    assert len(answer.content) < 500


def test_identity_is_no_encoding(rig: Rig) -> None:
    headers = {"content-type": "application/json", "content-encoding": "identity"}
    assert rig.client.post("/v1/completions", content=orjson.dumps(BODY), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "good"}, 200),
        ({"x-api-key": "bad"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "good", "authorization": ""}, 200),
        ({"x-api-key": "bad", "authorization": ""}, 401),
        ({"x-api-key": "bad", "authorization": "Bearer good"}, 200),
        ({"x-api-key": "good", "authorization": "Bearer bad"}, 401),
    ],
)
def test_the_key_may_come_in_x_api_key(rig: Rig, headers: dict[str, str], status: int) -> None:
    rig.gate.keys["good"] = Principal("acme", Role.USER)
    assert rig.client.get("/v1/models", headers=headers).status_code == status


ALIASES = (
    *("gpt-4o-mini=base-model", "gpt-4=alpha", "gpt-3.5-turbo = alpha@2", "beta=alpha", "openai/o1=gone", "x=beta"),
    *("beta@1=alpha", "acme/beta=alpha", "base-model:beta=alpha"),
)


@pytest.fixture
def aliased(tmp_path: Path) -> Rig:
    return Rig(Settings(data_dir=tmp_path, model_aliases=ALIASES))


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("gpt-4o-mini", "base"),
        ("gpt-4", "alpha@1"),
        ("gpt-3.5-turbo", "alpha@2"),
        ("beta", "alpha@1"),
        ("beta@1", "alpha@1"),
        ("acme/beta", "alpha@1"),
        ("alpha", "alpha@1"),
    ],
)
def test_an_alias_is_another_name(aliased: Rig, name: str, adapter: str) -> None:
    answer = aliased.complete(model=name)
    assert answer.headers["x-manylora-adapter"] == adapter
    assert answer.json()["model"] == name
    found = aliased.client.get(f"/v1/models/{name}").json()
    assert found["id"] == name
    assert (found["parent"] is None) == (adapter == "base")


def test_a_callers_own_adapter_keeps_its_name(aliased: Rig) -> None:
    aliased.gate.keys["k"] = Principal("acme", Role.USER)
    aliased.client.headers["authorization"] = "Bearer k"
    for name in ("beta", "beta@1", "acme/beta", "base-model:beta"):
        assert aliased.complete(model=name).headers["x-manylora-adapter"] == "beta@1"
        assert aliased.client.get(f"/v1/models/{name}").json()["owned_by"] == "acme"
    listed = [entry["id"] for entry in aliased.client.get("/v1/models").json()["data"]]
    assert listed == ["base-model", "alpha", "beta", "gpt-4o-mini", "gpt-4", "gpt-3.5-turbo", "x"]


@pytest.mark.parametrize("name", ["openai/o1", "x", "gpt-5"])
def test_an_alias_of_what_the_caller_may_not_use_is_not_found(aliased: Rig, name: str) -> None:
    answer = aliased.complete(model=name)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")


def test_aliases_are_listed_where_they_lead_somewhere(aliased: Rig) -> None:
    ids = [entry["id"] for entry in aliased.client.get("/v1/models").json()["data"]]
    assert ids == [
        "base-model",
        "alpha",
        "gpt-4o-mini",
        "gpt-4",
        "gpt-3.5-turbo",
        "beta",
        "beta@1",
        "acme/beta",
        "base-model:beta",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_aliases", ["gpt-4"]),
        ("model_aliases", ["=sql"]),
        ("allowed_origins", ["app.example.com"]),
        ("allowed_origins", ["https://app.example.com/page"]),
        ("root_path", "llm"),
        ("root_path", "/v1"),
        ("root_path", "/a?b"),
    ],
)
def test_what_is_no_alias_origin_or_prefix_is_refused_at_the_start(name: str, value: object) -> None:
    with pytest.raises(InvalidSettings, match=name):
        load_settings(**{name: value})


@pytest.mark.parametrize("path", ["/llm/v1/models", "/v1/models", "/llm/v1/models/"])
def test_a_proxys_prefix_may_be_left_on_or_taken_off(tmp_path: Path, path: str) -> None:
    client = client_of(Settings(data_dir=tmp_path, root_path="/llm/"), "/llm")
    assert client.get(path).status_code == 200
    assert client.get("/llmx/v1/models").status_code == 404
    for start in ("/llm", "/llm/", "/"):
        assert client.get(start).headers["location"] == "/llm/dashboard"


def test_no_page_and_no_schema_has_an_absolute_link(whole: TestClient) -> None:
    for path in ("/docs", "/dashboard"):
        page = whole.get(path).text
        assert 'href="/' not in page
        assert 'src="/' not in page
        assert "url: '/" not in page
    assert whole.get("/openapi.json").json()["servers"] == [{"url": "."}]
