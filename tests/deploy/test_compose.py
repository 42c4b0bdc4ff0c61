"""docker-compose.yml: right by Docker Compose's own schema, locked down, and everything it mounts is there."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from manylora.settings import ENV_PREFIX, Settings

from .conftest import Tool
from .files import PROMETHEUS, ROOT, read_yaml

CUDA = ("-f", "docker-compose.yml", "-f", "deploy/compose.cuda.yml")
SERVICES = ("server", "prometheus", "alertmanager", "grafana")


@pytest.fixture(scope="module")
def resolved(docker_compose: Tool) -> dict[str, Any]:
    """The file as Docker Compose understands it, every default filled in."""
    done = docker_compose("config", "--format", "json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "level=warning" not in done.stderr, done.stderr
    config: dict[str, Any] = json.loads(done.stdout)
    return config


def test_it_brings_up_the_server_and_what_watches_it(resolved: dict[str, Any]) -> None:
    assert set(resolved["services"]) == set(SERVICES)


def test_a_wrong_key_would_be_noticed(docker_compose: Tool, tmp_path: Path) -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    (tmp_path / "docker-compose.yml").write_text(text.replace("read_only: true", "readonly: true"))
    done = docker_compose("config", "--quiet", cwd=tmp_path)
    assert done.returncode != 0
    assert "readonly" in done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_locked_down(resolved: dict[str, Any], name: str) -> None:
    service = resolved["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert all(port["host_ip"] == "127.0.0.1" for port in service["ports"])


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_runs_as_root(resolved: dict[str, Any], name: str) -> None:
    users = re.findall(r"^USER (\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    user = resolved["services"][name].get("user") or users[-1]
    assert re.fullmatch(r"[1-9]\d*:\d+", user)


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_says_whether_it_is_well(resolved: dict[str, Any], name: str) -> None:
    check = resolved["services"][name].get("healthcheck")
    if name == "server":
        assert check is None, "the image has its own"
        assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    else:
        port = resolved["services"][name]["ports"][0]["target"]
        assert f"http://127.0.0.1:{port}/" in check["test"][-1]


def test_what_is_written_is_kept_in_named_volumes(resolved: dict[str, Any]) -> None:
    kept = {
        f"{name}:{volume['target']}"
        for name in SERVICES
        for volume in resolved["services"][name]["volumes"]
        if volume["type"] == "volume"
    }
    own = {"prometheus:/prometheus", "alertmanager:/alertmanager", "grafana:/var/lib/grafana"}
    assert kept == {"server:/cache", "server:/data", *own}
    used = {v["source"] for s in resolved["services"].values() for v in s["volumes"] if v["type"] == "volume"}
    assert used == set(resolved["volumes"])


def test_what_is_mounted_from_here_is_there_and_cannot_be_written(resolved: dict[str, Any]) -> None:
    bound = [v for s in resolved["services"].values() for v in s["volumes"] if v["type"] == "bind"]
    assert len(bound) == 4
    for volume in bound:
        assert Path(volume["source"]).is_dir()
        assert volume["read_only"] is True
    assert Path(resolved["secrets"]["manylora_key"]["file"]).is_file()


def test_prometheus_finds_its_key_and_the_server(resolved: dict[str, Any]) -> None:
    job = read_yaml(PROMETHEUS / "prometheus.yml")["scrape_configs"][0]
    secret = resolved["services"]["prometheus"]["secrets"][0]
    assert job["authorization"]["credentials_file"] == secret["target"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host == "server"
    assert int(port) == resolved["services"]["server"]["ports"][0]["target"]


def test_alerts_are_sent_to_a_receiver_that_is_there(resolved: dict[str, Any]) -> None:
    [target] = read_yaml(PROMETHEUS / "prometheus.yml")["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert target == f"alertmanager:{resolved['services']['alertmanager']['ports'][0]['target']}"
    config = read_yaml(ROOT / "deploy" / "alertmanager" / "alertmanager.yml")
    routes = [config["route"], *config["route"]["routes"]]
    assert {route["receiver"] for route in routes} == {receiver["name"] for receiver in config["receivers"]}
    [page] = config["route"]["routes"]
    assert page["matchers"] == ['severity = "page"']


def test_every_variable_for_the_server_is_a_setting(resolved: dict[str, Any]) -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert set(resolved["services"]["server"]["environment"]) <= known


def test_the_key_and_the_address_can_be_chosen_from_outside(
    docker_compose: Tool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MANYLORA_KEY_FILE", os.fspath(tmp_path / "key"))
    monkeypatch.setenv("MANYLORA_ADDRESS", "0.0.0.0")
    config = json.loads(docker_compose("config", "--format", "json", cwd=ROOT).stdout)
    assert config["secrets"]["manylora_key"]["file"] == os.fspath(tmp_path / "key")
    assert config["services"]["server"]["ports"][0]["host_ip"] == "0.0.0.0"
    assert config["services"]["prometheus"]["ports"][0]["host_ip"] == "127.0.0.1"


def test_the_file_for_gpus_builds_the_other_image_and_asks_for_one(docker_compose: Tool) -> None:
    done = docker_compose(*CUDA, "config", "--format", "json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    server = json.loads(done.stdout)["services"]["server"]
    assert server["build"]["args"]["VARIANT"] == "cuda"
    assert server["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert server["read_only"] is True
