"""The Helm chart: rendered by Helm for each set of values, and right by the schemas of Kubernetes, to the last key."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from fsspec.registry import known_implementations

from manylora.settings import ENV_PREFIX, Settings
from tests.catalog.rig import running

from .conftest import Tool
from .files import ROOT, metrics_in, read_yaml

CHART = ROOT / "deploy" / "helm" / "manylora"
SETS = sorted(path.stem for path in (CHART / "values").glob("*.yaml"))
KUBERNETES = "1.33"
CRDS = read_yaml(Path(__file__).parent / "crds.yml")
DATABASE = ("--set", "database.existingSecret=db")
STORE = ("--set", "store.url=s3://bucket/adapters")
PUSH = ("--set", "push.enabled=true,push.image.repository=ours,push.keySecret=admin")


def rendered(helm: Tool, *arguments: str) -> list[dict[str, Any]]:
    done = helm("template", "rel", CHART, "--namespace", "ns", *arguments)
    assert done.returncode == 0, done.stderr
    return [resource for resource in yaml.safe_load_all(done.stdout) if resource is not None]


def of_kind(resources: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [resource for resource in resources if resource["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def by_set(helm: Tool) -> dict[str, list[dict[str, Any]]]:
    return {name: rendered(helm, "-f", str(CHART / "values" / f"{name}.yaml")) for name in SETS}


@pytest.mark.parametrize("name", SETS)
def test_every_set_of_values_is_right_by_strict_schemas(name: str, by_set: dict[str, list[dict[str, Any]]]) -> None:
    for resource in by_set[name]:
        known = CRDS.get(resource["kind"])
        if known is None:
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        else:
            assert resource["apiVersion"] == known["apiVersion"]
            jsonschema.validate(resource["spec"], known["spec"])


def test_every_resource_is_rendered_by_some_set(by_set: dict[str, list[dict[str, Any]]]) -> None:
    kinds = {resource["kind"] for resources in by_set.values() for resource in resources}
    declared = re.findall(
        r"^kind: (\w+)$", "\n".join(p.read_text() for p in CHART.glob("templates/*.yaml")), re.MULTILINE
    )
    assert kinds == set(declared)


def test_the_chart_is_clean(helm: Tool) -> None:
    for name in SETS:
        done = helm("lint", CHART, "--strict", "-f", CHART / "values" / f"{name}.yaml")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "existingSecret"),
        (DATABASE, "store"),
        ((*DATABASE, "--set", "store.url=file:///mnt/adapters"), "store"),
        ((*DATABASE, "--set", "store.url=gs://bucket/adapters"), "store"),
        ((*DATABASE, *STORE, "--set", "persistence.enabled=true"), "replicas"),
        ((*DATABASE, *STORE, "--set", "replicaCount=3"), "replicaCount"),
        ((*DATABASE, *STORE, "--set", "settings.store_url=x"), "store_url"),
        ((*DATABASE, *STORE, "--set", "settings.drain_delay_s=30"), "drain_delay_s"),
        ((*DATABASE, *STORE, "--set", "autoscaling.hpa=true,autoscaling.keda=true"), "autoscaling"),
        ((*DATABASE, *STORE, "--set", "gateway.enabled=true"), "gateway"),
        ((*DATABASE, *STORE, "--set", "push.enabled=true"), "push"),
    ],
)
def test_values_that_cannot_work_are_refused(arguments: tuple[str, ...], named: str, helm: Tool) -> None:
    done = helm("template", "rel", CHART, *arguments)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.parametrize("name", SETS)
def test_the_server_takes_the_settings_that_it_is_given(
    name: str, by_set: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = of_kind(by_set[name], "ConfigMap")["data"]
    for variable, value in given.items():
        assert variable.removeprefix(ENV_PREFIX).lower() in Settings.model_fields
        monkeypatch.setenv(variable, value)
    settings = Settings()
    assert (settings.host, settings.port, settings.log_json) == ("0.0.0.0", 8000, True)
    if name == "gpu":
        assert (settings.max_num_seqs, settings.kv_cache_memory, settings.adapter_memory) == (128, 0.6, 8 * 2**30)


def test_lists_and_whole_numbers_arrive_as_they_are(helm: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    more = "settings.allowed_origins={https://a.example,https://b.example},settings.orphan_days=10000000"
    for variable, value in of_kind(rendered(helm, *DATABASE, *STORE, "--set", more), "ConfigMap")["data"].items():
        monkeypatch.setenv(variable, value)
    settings = Settings()
    assert settings.allowed_origins == ("https://a.example", "https://b.example")
    assert settings.orphan_days == 10_000_000


def test_a_pod_has_the_time_that_it_needs_to_stop(helm: Tool) -> None:
    resources = rendered(helm, *DATABASE, *STORE, "--set", "drainTimeoutSeconds=90,preStopSeconds=7")
    pod = of_kind(resources, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["lifecycle"]["preStop"] == {"sleep": {"seconds": 7}}
    # What still runs after the drain is cut five seconds later.
    assert pod["terminationGracePeriodSeconds"] >= 7 + 90 + 5
    assert of_kind(resources, "ConfigMap")["data"]["MANYLORA_DRAIN_TIMEOUT_S"] == "90"


def test_an_update_takes_no_replica_away_before_another_is_ready(by_set: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("gpu", "gateway", "keda"):
        deployment = of_kind(by_set[name], "Deployment")["spec"]
        assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        (container,) = deployment["template"]["spec"]["containers"]
        assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
        assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert of_kind(by_set["one-machine"], "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_who_scales_owns_the_number_of_replicas(by_set: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("gateway", "keda"):
        assert "replicas" not in of_kind(by_set[name], "Deployment")["spec"]
    assert of_kind(by_set["gpu"], "Deployment")["spec"]["replicas"] == 2


def test_scaling_asks_for_metrics_that_there_are(by_set: dict[str, list[dict[str, Any]]]) -> None:
    documented = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    triggers = of_kind(by_set["keda"], "ScaledObject")["spec"]["triggers"]
    asked = {name for trigger in triggers for name in metrics_in(trigger["metadata"]["query"])}
    (metric,) = of_kind(by_set["gateway"], "HorizontalPodAutoscaler")["spec"]["metrics"]
    asked.add(metric["pods"]["metric"]["name"])
    assert len(asked) == 3
    for name in asked:
        assert f"`{name}`" in documented


def test_queries_of_scaling_are_promql(by_set: dict[str, list[dict[str, Any]]], promtool: Tool, tmp_path: Path) -> None:
    triggers = of_kind(by_set["keda"], "ScaledObject")["spec"]["triggers"]
    rules = [{"record": f"a:{t['name']}", "expr": t["metadata"]["query"]} for t in triggers]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "scaling", "rules": rules}]}), encoding="utf-8")
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_requests_nothing_is_scaled_by_them(
    by_set: dict[str, list[dict[str, Any]]], promtool: Tool, tmp_path: Path
) -> None:
    triggers = of_kind(by_set["keda"], "ScaledObject")["spec"]["triggers"]
    (query,) = [t["metadata"]["query"] for t in triggers if t["name"] == "cold"]
    (of,) = set(re.findall(r'namespace="[^"]*",service="[^"]*"', query))

    def case(disk: str, device: str, expected: float) -> dict[str, Any]:
        series = {"disk": disk, "device": device}
        return {
            "interval": "1m",
            "input_series": [
                {"series": f'manylora_adapter_requests_by_tier_total{{{of},tier="{tier}"}}', "values": values}
                for tier, values in series.items()
            ],
            "promql_expr_test": [
                {"expr": query, "eval_time": "30m", "exp_samples": [{"labels": "{}", "value": expected}]}
            ],
        }

    tests = [case("7x60", "7x60", 0), case("_x60", "_x60", 0), case("0+30x60", "0+90x60", 0.25)]
    path = tmp_path / "tests.yml"
    path.write_text(yaml.safe_dump({"tests": tests}), encoding="utf-8")
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_has_a_driver_for_every_store(by_set: dict[str, list[dict[str, Any]]]) -> None:
    (extras,) = re.findall(r'"\.\[([a-z0-9,]+)\]"', (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    installed = {re.split(r"[^\w-]", need)[0] for extra in extras.split(",") for need in known[extra]}
    found = [of_kind(resources, "ConfigMap")["data"].get("MANYLORA_STORE_URL") for resources in by_set.values()]
    urls = [url for url in found if url is not None]
    assert len(urls) == len(by_set) - 1
    for url in urls:
        driver: str = known_implementations[url.partition("://")[0]]["class"]
        assert driver.partition(".")[0] in installed


def test_the_job_that_uploads_needs_a_key_and_so_runs_after_upgrades(helm: Tool, tmp_path: Path) -> None:
    job = of_kind(rendered(helm, *DATABASE, *STORE, *PUSH), "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "post-upgrade"
    said = run_job(job, tmp_path, refused="b")
    assert said == (1, ["a", "b", "c"], "These were not uploaded: b")
    assert run_job(job, tmp_path, refused="")[:2] == (0, ["a", "b", "c"])
    activating = of_kind(rendered(helm, *DATABASE, *STORE, *PUSH, "--set", "push.activate=true"), "Job")
    for each, wanted in ((job, False), (activating, True)):
        (container,) = each["spec"]["template"]["spec"]["containers"]
        assert ("--activate" in container["args"][0]) is wanted


def run_job(job: dict[str, Any], folder: Path, *, refused: str) -> tuple[int, list[str], str]:
    """The job's own script over three folders, with a `manylora` that refuses one: its end, what came, what it said."""
    work, tried = folder / "work", folder / "tried"
    tried.unlink(missing_ok=True)
    for name in "abc":
        (work / name).mkdir(parents=True, exist_ok=True)
    program = folder / "manylora"
    program.write_text(f'#!/bin/sh\nbasename "$3" >>{tried}\n[ "$(basename "$3")" != "{refused}" ]\n')
    program.chmod(0o755)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = [*container["command"], container["args"][0].replace("/work/", f"{work}/")]
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, tried.read_text().split(), done.stderr.strip()


def test_notes_put_no_secret_on_a_command_line_and_say_when_the_job_runs(helm: Tool) -> None:
    for more, wanted in (((), "upgrade with push.enabled"), (PUSH, "did not run")):
        done = helm("install", "rel", CHART, "--dry-run=client", *DATABASE, *STORE, *more)
        assert done.returncode == 0, done.stderr
        notes = done.stdout.partition("NOTES:")[2]
        assert "keys create --tenant ops --role admin\n" in notes
        assert "get secret" not in notes
        assert wanted in notes


# Of the routes whose bodies name a model, those that any replica answers, and why.
NOT_PICKED = {
    "/tokenize": "computes nothing",
    "/detokenize": "computes nothing",
    "/api/show": "computes nothing",
    "/classify": "text-embeddings-inference's bodies have no model",
    "/rerank": "text-embeddings-inference's bodies have no model",
    "/v1/fine_tuning/jobs": "whichever worker is free trains, on the base that all replicas have",
}


@pytest.mark.anyio
async def test_the_picker_sees_every_request_that_names_a_model(
    by_set: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    picked, _ = of_kind(by_set["gateway"], "HTTPRoute")["spec"]["rules"]
    prefixes = [match["path"]["value"] for match in picked["matches"]]
    async with running(Settings(data_dir=tmp_path / "data", allow_open=True)) as rig:
        schema = rig.app.openapi()
    bodies = {
        path: operations["post"].get("requestBody")
        for path, operations in schema["paths"].items()
        if "post" in operations
    }
    named = {path for path, body in bodies.items() if body and names_a_model(body, schema)}
    assert NOT_PICKED.keys() <= named
    reached = {path for path in bodies if any(f"{path}/".startswith(f"{prefix}/") for prefix in prefixes)}
    assert reached == named - NOT_PICKED.keys()


def names_a_model(body: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Whether each form of the body has `model`."""
    found = body["content"].get("application/json", {}).get("schema", {})
    forms = [form for key in ("anyOf", "oneOf") for form in found.get(key, ())] or [found]
    components = schema["components"]["schemas"]
    whole = [components[form["$ref"].rpartition("/")[2]] if "$ref" in form else form for form in forms]
    return all("model" in form.get("properties", {}) for form in whole)


def test_no_container_may_do_more_than_it_needs(by_set: dict[str, list[dict[str, Any]]]) -> None:
    for resources in by_set.values():
        for resource in resources:
            pod = resource.get("spec", {}).get("template", {}).get("spec")
            if pod is None:
                continue
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["automountServiceAccountToken"] is False
            for container in [*pod["containers"], *pod.get("initContainers", [])]:
                locked = container["securityContext"]
                assert locked["readOnlyRootFilesystem"] is True
                assert locked["allowPrivilegeEscalation"] is False
                assert locked["capabilities"] == {"drop": ["ALL"]}
                assert "memory" in container["resources"]["limits"]
                mounted = {mount["name"] for mount in container["volumeMounts"]}
                assert mounted <= {volume["name"] for volume in pod["volumes"]}


def test_readme_and_schema_know_every_value() -> None:
    values = read_yaml(CHART / "values.yaml")
    schema = read_yaml(CHART / "values.schema.json")["properties"]
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    assert set(values) <= set(schema)
    for name, value in values.items():
        assert f"`{name}" in readme, name
        if isinstance(value, dict) and "properties" in schema[name]:
            assert set(value) <= set(schema[name]["properties"]), name
