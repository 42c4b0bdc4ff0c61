"""`GET /v1/adapters/{name}/versions/{n}/inspection` of a real server."""

from pathlib import Path
from typing import Any

import httpx

from manylora.lifecycle.weights.config import InspectConfig
from manylora.lifecycle.weights.inspection import inspect_adapter
from tests.e2e.conftest import ADAPTERS, Server


def inspection(server: Server, name: str, version: int | str = 1) -> httpx.Response:
    return httpx.get(f"{server.url}/v1/adapters/{name}/versions/{version}/inspection", timeout=60)


def test_the_insides_of_an_adapter_are_told(server: Server, adapters_dir: Path, settings: dict[str, Any]) -> None:
    report = inspection(server, "middle").json()
    told = inspect_adapter(InspectConfig(adapters_dir / "middle", base=settings["model"]))

    assert (report["object"], report["name"], report["version"]) == ("adapter.inspection", "middle", 1)
    assert report["rank"] == ADAPTERS["middle"]
    assert report["num_parameters"] == told["num_parameters"]
    assert report["modules"].keys() == told["modules"].keys()
    assert report["warnings"] == told["warnings"]
    assert "adapter" not in report  # the folder in the server's store


def test_asking_again_gives_the_same(server: Server) -> None:
    assert inspection(server, "small").json() == inspection(server, "small").json()


def test_what_does_not_exist_is_not_inspected(server: Server) -> None:
    for name, version in (("nobody", 1), ("small", 7), ("small", "x")):
        answer = inspection(server, name, version)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "adapter_not_found"
