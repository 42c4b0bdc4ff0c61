"""The operations routes."""

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from manylora import __version__
from manylora.tenants.interface import Principal, Role

from .conftest import Rig


def test_health_is_about_the_process_alone(rig: Rig) -> None:
    rig.engine.is_ready = False
    assert rig.client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("is_ready", "is_draining", "status"), [(True, False, 200), (False, False, 503), (True, True, 503)]
)
def test_ready_is_about_the_engine(rig: Rig, is_ready: bool, is_draining: bool, status: int) -> None:
    rig.engine.is_ready, rig.engine.is_draining = is_ready, is_draining
    answer = rig.client.get("/ready")
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) == (status == 503)


def test_version(rig: Rig) -> None:
    assert rig.client.get("/version").json()["version"] == __version__


def samples(rig: Rig) -> dict[tuple[str, str, str], float]:
    """(name, tenant/adapter, other label) -> value."""
    found = {}
    for family in text_string_to_metric_families(rig.client.get("/metrics").text):
        for sample in family.samples:
            labels = dict(sample.labels)
            caller = f"{labels.pop('tenant', '')}/{labels.pop('adapter', '')}"
            found[sample.name, caller, ",".join(labels.values())] = sample.value
    return found


def test_metrics_count_what_was_served(rig: Rig) -> None:
    rig.complete(model="alpha", max_tokens=4)
    rig.complete(max_tokens=4)
    rig.complete(max_tokens=-1)
    found = samples(rig)
    assert found["manylora_requests_total", "public/alpha", "ok"] == 1
    assert found["manylora_requests_total", "public/__base__", "ok"] == 1
    assert found["manylora_requests_total", "public/__base__", "invalid"] == 1
    assert found["manylora_prompt_tokens_total", "public/alpha", ""] == 3
    assert found["manylora_completion_tokens_total", "public/alpha", ""] == 4
    assert found["manylora_prefix_cache_hit_tokens_total", "public/alpha", ""] == 2
    assert found["manylora_adapter_requests_by_tier_total", "public/alpha", "host"] == 1
    assert found["manylora_inter_token_latency_seconds_count", "public/alpha", ""] == 3
    assert found["manylora_time_to_first_token_seconds_count", "public/alpha", ""] == 1
    assert found["manylora_queue_wait_seconds_sum", "public/alpha", ""] == 0.0015
    assert found["manylora_kv_blocks_total", "/", ""] == 64
    assert found["manylora_preemptions_total", "/", ""] == 3


def test_stats_have_what_the_dashboard_draws(rig: Rig) -> None:
    rig.complete(model="alpha", max_tokens=4)
    stats = rig.client.get("/v1/stats").json()
    for name in ("running", "waiting", "kv_blocks_used", "kv_blocks_total", "slots_used", "slots_total"):
        assert isinstance(stats[name], int), name
    assert stats["totals"]["requests"] == 1
    assert stats["totals"]["completion_tokens"] == 4
    assert stats["latency"]["ttft_ms"]["p50"] > 0
    (row,) = stats["adapters"]
    assert (row["name"], row["version"], row["tier"], row["requests"]) == ("alpha", 1, "device", 1)
    assert len(stats["resident"]) == 2


def test_stats_list_the_newest_errors_first(rig: Rig) -> None:
    rig.engine.error_at = 0
    first, second = (rig.complete() for _ in range(2))
    errors = rig.client.get("/v1/stats").json()["recent_errors"]
    assert [e["request_id"] for e in errors] == [second.headers["x-request-id"], first.headers["x-request-id"]]
    assert errors[0]["message"] == "the engine tripped"


def test_a_tenants_stats_show_nothing_of_another(rig: Rig) -> None:
    rig.gate.keys |= {"acme": Principal("acme", Role.USER), "rival": Principal("rival", Role.MANAGER)}

    def ask(key: str, path: str, **body: object) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}"}
        return rig.client.post(path, json=body, headers=headers) if body else rig.client.get(path, headers=headers)

    ask("acme", "/v1/completions", model="beta", prompt="hi")
    rig.engine.error_at = 0
    ask("acme", "/v1/completions", model="beta", prompt="hi")
    own, foreign = ask("acme", "/v1/stats").json(), ask("rival", "/v1/stats").json()
    assert own["totals"]["requests"] == 2
    assert [r["name"] for r in own["adapters"]] == ["beta"]
    assert [r["id"] for r in own["resident"]] == ["a1"]
    assert foreign["totals"]["requests"] == 0
    assert foreign["adapters"] == foreign["recent_errors"] == []
    assert [r["id"] for r in foreign["resident"]] == ["b1"]
    assert foreign["rates"]["completion_tokens_per_s"] == 0
    assert foreign["latency"]["ttft_ms"]["p50"] is None


def test_stats_of_one_tenant_are_what_that_tenant_sees(rig: Rig) -> None:
    rig.gate.keys |= {"acme": Principal("acme", Role.MANAGER), "ops": Principal("public", Role.ADMIN)}

    def ask(key: str, path: str) -> httpx2.Response:
        return rig.client.get(path, headers={"authorization": f"Bearer {key}"})

    body = {"model": "beta", "prompt": "hi"}
    rig.client.post("/v1/completions", json=body, headers={"authorization": "Bearer acme"})
    own = ask("acme", "/v1/stats").json()
    for key, path in (("acme", "/v1/stats?tenant=acme"), ("ops", "/v1/stats?tenant=acme")):
        seen = ask(key, path).json()
        assert (seen["tenant"], seen["totals"], seen["resident"]) == ("acme", own["totals"], own["resident"])
    assert own["totals"]["requests"] == 1
    assert ask("ops", "/v1/stats?tenant=rival").json()["totals"]["requests"] == 0
    assert ask("ops", "/v1/stats").json()["totals"]["requests"] == 1
    refused = ask("acme", "/v1/stats?tenant=rival")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_role")
    assert not {"steps", "snapshots"} & own.keys()


def test_the_docs_page_loads_nothing_from_elsewhere(rig: Rig) -> None:
    page = rig.client.get("/docs")
    assert page.status_code == 200
    assert "https://" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f"docs/assets/{asset}" in page.text
        assert rig.client.get(f"/docs/assets/{asset}").status_code == 200


def test_the_schema_describes_both_bodies(rig: Rig) -> None:
    schema = rig.client.get("/openapi.json").json()
    for path, name in (("/v1/completions", "CompletionRequest"), ("/v1/chat/completions", "ChatRequest")):
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert "temperature" in schema["components"]["schemas"][name]["properties"]


def test_models_show_what_the_caller_may_name(rig: Rig) -> None:
    rig.gate.keys["acme"] = Principal("acme", Role.USER)
    rig.client.headers["authorization"] = "Bearer acme"
    listed = rig.client.get("/v1/models").json()
    assert listed["object"] == "list"
    base, *adapters = listed["data"]
    assert (base["id"], base["parent"], base["root"]) == ("base-model", None, "base-model")
    assert [(m["id"], m["parent"], m["root"]) for m in adapters] == [
        ("alpha", "base-model", "d1" * 8),
        ("beta", "base-model", "d1" * 8),
    ]


@pytest.mark.parametrize("model_id", ["base-model", "alpha", "alpha@2", "base-model:alpha", "base-model:alpha@1"])
def test_a_model_is_found_by_every_name_it_has(rig: Rig, model_id: str) -> None:
    answer = rig.client.get(f"/v1/models/{model_id}")
    assert (answer.status_code, answer.json()["id"]) == (200, model_id)


@pytest.mark.parametrize("model_id", ["beta", "gone", "alpha@9", "other:alpha", "a/b"])
def test_a_model_that_the_caller_may_not_name_is_not_found(rig: Rig, model_id: str) -> None:
    answer = rig.client.get(f"/v1/models/{model_id}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")
