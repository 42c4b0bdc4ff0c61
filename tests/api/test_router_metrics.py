"""`/metrics/router`, held against the protocol between model servers and the routers that read it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from manylora.api import router_metrics
from manylora.engine.interface import Residency
from manylora.settings import Settings
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .fakes import make_ref

# Model server protocol of the Gateway API Inference Extension, and vLLM's series of adapters in memory.
GAUGES = {
    "vllm:num_requests_waiting": {"model_name"},
    "vllm:num_requests_running": {"model_name"},
    "vllm:kv_cache_usage_perc": {"model_name"},
    "vllm:cache_config_info": {"model_name", "block_size", "num_gpu_blocks"},
    "vllm:lora_requests_info": {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
    "vllm:lora_adapter_loaded": {"model_name", "adapter_name", "level", "pinned", "rank"},
    "vllm:num_gpu_loaded_lora_adapters": {"model_name"},
    "vllm:num_cpu_loaded_lora_adapters": {"model_name"},
    "vllm:max_gpu_lora_adapters": {"model_name"},
}
ALPHA, BETA = make_ref("alpha", 1), make_ref("beta", 1, "acme")


def series(rig: Rig) -> dict[str, list[tuple[dict[str, str], float]]]:
    answer = rig.client.get("/metrics/router")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        family.name: [(sample.labels, sample.value) for sample in family.samples]
        for family in text_string_to_metric_families(answer.text)
        if family.type == "gauge"
    }


def loaded(rig: Rig) -> dict[str, str]:
    """Where each name's adapter is."""
    return {labels["adapter_name"]: labels["level"] for labels, _ in series(rig)["vllm:lora_adapter_loaded"]}


def test_every_series_of_the_protocol_is_there_with_its_labels(rig: Rig) -> None:
    rig.engine.resident = Residency(num_slots=8, device=(ALPHA,))
    found = series(rig)
    assert {name: set(samples[0][0]) for name, samples in found.items()} == GAUGES
    assert found["vllm:max_gpu_lora_adapters"] == [({"model_name": "base-model"}, 8.0)]
    assert found["vllm:kv_cache_usage_perc"][0][1] == 0.0
    assert all(value == 1.0 for _, value in found["vllm:lora_adapter_loaded"])


def test_adapters_are_listed_by_every_name_that_leads_to_what_is_there(rig: Rig) -> None:
    old = make_ref("alpha", 2)  # not the active one
    rig.engine.resident = Residency(8, device=(old,), host=(ALPHA, BETA, old), pinned=frozenset({BETA.id}))
    both = {"alpha": "cpu", "public/alpha": "cpu", "alpha@1": "cpu", "public/alpha@1": "cpu"}
    acme = {"beta": "cpu", "acme/beta": "cpu", "beta@1": "cpu", "acme/beta@1": "cpu"}
    assert loaded(rig) == {**both, **acme, "alpha@2": "gpu", "public/alpha@2": "gpu"}
    rows = series(rig)["vllm:lora_adapter_loaded"]
    assert {labels["adapter_name"] for labels, _ in rows if labels["pinned"] == "true"} == set(acme)
    rig.engine.resident = Residency(8, device=(old, make_ref("alpha", 3)), host=(ALPHA,))  # one that nobody can name
    assert "alpha@3" not in loaded(rig)
    rig.directory.active["alpha"] = 2
    assert loaded(rig)["alpha"] == "gpu"


def test_what_runs_is_named_wherever_it_is(rig: Rig) -> None:
    rig.engine.resident = Residency(8, running=(ALPHA,))
    ((labels, _),) = series(rig)["vllm:lora_requests_info"]
    assert "public/alpha" in labels["running_lora_adapters"].split(",")
    assert ALPHA in rig.engine.resident.refs()


def test_activity_has_the_time_of_its_last_change(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000, 2000, 5))
    monkeypatch.setattr(router_metrics, "time", SimpleNamespace(time=lambda: next(clock)))
    rig.engine.resident = Residency(8, device=(ALPHA,), running=(ALPHA,), waiting=(BETA,))
    ((labels, first),) = series(rig)["vllm:lora_requests_info"]
    assert labels["running_lora_adapters"].split(",") == ["alpha", "alpha@1", "public/alpha", "public/alpha@1"]
    assert "acme/beta" in labels["waiting_lora_adapters"].split(",")
    assert labels["max_lora"] == "8"
    assert first == 1000.0
    for device in ((ALPHA,), (ALPHA, BETA)):  # the same again, and what came to memory and runs not
        rig.engine.resident = Residency(8, device=device, running=(ALPHA,), waiting=(BETA,))
        assert series(rig)["vllm:lora_requests_info"][0][1] == 1000.0
    rig.engine.resident = Residency(8, device=(ALPHA, BETA))
    ((labels, last),) = series(rig)["vllm:lora_requests_info"]
    assert (labels["running_lora_adapters"], labels["waiting_lora_adapters"]) == ("", "")
    assert last == 1005.0, "the clock is looked at for changes alone"


@pytest.mark.parametrize(("mode", "of_admin", "of_user"), [("keys", 200, 403), ("open", 200, 200), ("off", 404, 404)])
def test_who_may_read_it(mode: str, of_admin: int, of_user: int, tmp_path: Path) -> None:
    rig = Rig(Settings.model_validate({"data_dir": tmp_path, "router_metrics": mode}))
    rig.gate.keys = {"admin": Principal("ops", Role.ADMIN), "user": Principal("acme", Role.MANAGER)}
    for key, status in (("admin", of_admin), ("user", of_user)):
        answer = rig.client.get("/metrics/router", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == status
    nobody = {"keys": 401, "open": 200, "off": 404}[mode]
    assert rig.client.get("/metrics/router").status_code == nobody
