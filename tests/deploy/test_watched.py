"""Prometheus scrapes a server under load, and everything that is drawn or alerted of it has data."""

import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Server, running
from tests.tiny_adapters import make_adapter

from .conftest import installed
from .files import dashboard, panels, rules
from .watched import BASE, Load, Prometheus, make_key, prometheus, substituted, until

pytestmark = pytest.mark.slow
ADAPTERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class Watched:
    """The server, what watches it, and the load on it."""

    server: Server
    prometheus: Prometheus
    load: Load


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def lose_files(store: Path, of: Path) -> None:
    """Take an adapter's files away from under the server."""
    weights = (of / "adapter_model.safetensors").read_bytes()
    found = [path.parent for path in store.rglob("adapter_model.safetensors") if path.read_bytes() == weights]
    assert len(found) == 1
    shutil.rmtree(found[0])


@pytest.fixture(scope="module")
def watched(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two slots and host memory for two adapters, so that those of three users push each other out everywhere."""
    program = installed("prometheus")
    folder = tmp_path_factory.mktemp("watched")
    made = [
        make_adapter(tiny_llama_dir, folder / "adapters" / name, rank=8, seed=seed)
        for seed, name in enumerate((*ADAPTERS, "broken"))
    ]
    new = make_adapter(tiny_llama_dir, folder / "new", rank=4, seed=99, strength=2.0)
    keys = {tenant: make_key(folder / "data", tenant, "admin", sys.executable) for tenant in ("acme", "beta")}
    (folder / "key").write_text(keys["acme"])
    settings: dict[str, Any] = {
        "model": str(tiny_llama_dir),
        "served_name": BASE,
        "adapters": str(folder / "adapters"),
        "data_dir": str(folder / "data"),
        "port": 0,
        "dtype": "float32",
        "kv_cache_memory": "4MiB",
        "adapter_memory": "64MiB",
        "host_tier_memory": str(int(2.5 * (made[0] / "adapter_model.safetensors").stat().st_size)),
        "max_slots": 2,
        "num_threads": 1,
    }
    with running(settings, folder / "log") as server:
        lose_files(folder / "data" / "store", made[-1])
        port = free_port()
        with (
            prometheus(program, server.url.removeprefix("http://"), folder / "key", folder, port) as watching,
            Load(server.url, keys, ADAPTERS, "broken", new) as load,
        ):
            yield Watched(server, watching, load)


def test_the_server_is_scraped_with_its_key(watched: Watched) -> None:
    def is_up() -> bool:
        return [s["value"][1] for s in watched.prometheus.query('up{job="manylora"}')] == ["1"]

    until(is_up, "a scrape has succeeded")


# Nothing of these happens in the load, so their panels draw zeros.
QUIET = {"Preemptions", "Waiting"}


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_every_query_of_the_panel_returns_numbers_and_what_happened_is_seen(
    watched: Watched, panel: dict[str, Any]
) -> None:
    def drawn() -> bool:
        numbers = [watched.prometheus.numbers(target) for target in panel["targets"]]
        is_seen = panel["title"] in QUIET or any(number > 0 for found in numbers for number in found)
        return all(numbers) and is_seen

    until(drawn, f"{panel['title']} has data: {[target['expr'] for target in panel['targets']]}")
    assert watched.load.failures == []


@pytest.mark.parametrize(
    "choice", [{"tenant": "acme"}, {"adapter": "one|five"}, {"tenant": "beta", "adapter": "__base__"}], ids=str
)
def test_one_tenant_and_one_adapter_can_be_chosen(watched: Watched, choice: dict[str, str]) -> None:
    busy = next(panel for panel in panels() if panel["title"] == "Requests by outcome")["targets"][0]
    until(lambda: any(watched.prometheus.numbers(busy, **choice)), f"requests of {choice}")
    assert watched.prometheus.numbers(busy, tenant="nobody") == []


def test_the_variables_offer_what_there_is(watched: Watched) -> None:
    offered = {}
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            series, label = variable["query"].removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
            selector = {"match[]": substituted(series)}
            offered[variable["name"]] = set(watched.prometheus.get(f"label/{label}/values", **selector))
    assert offered["job"] == {"manylora"}
    assert offered["instance"] == {watched.server.url.removeprefix("http://")}
    assert offered["tenant"] == {"acme", "beta"}
    assert offered["adapter"] == {*ADAPTERS, "broken", "__base__"}


def test_prometheus_evaluates_every_rule(watched: Watched) -> None:
    def loaded() -> list[dict[str, Any]]:
        groups = watched.prometheus.get("rules")["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    found = until(loaded, "every rule was evaluated")
    assert len(found) == len(rules())
    assert {rule["name"]: rule.get("lastError") for rule in found if rule["health"] != "ok"} == {}


@pytest.mark.parametrize("record", [rule["record"] for rule in rules() if "record" in rule])
def test_every_recorded_series_has_numbers(watched: Watched, record: str) -> None:
    until(lambda: watched.prometheus.numbers({"expr": record}), f"{record} is recorded")


def active(watched: Watched) -> dict[str, dict[str, str]]:
    return {alert["labels"]["alertname"]: alert["labels"] for alert in watched.prometheus.get("alerts")["alerts"]}


def test_an_adapter_without_files_raises_its_alert(watched: Watched) -> None:
    labels = until(lambda: active(watched).get("ManyloraAdapterLoadFails"), "the alert is active")
    assert (labels["tenant"], labels["adapter"]) == ("public", "broken")


def test_adapters_that_push_each_other_out_raise_theirs(watched: Watched) -> None:
    until(lambda: "ManyloraSlotThrash" in active(watched), "the alert is pending")


def test_the_annotation_of_restarts_is_a_query(watched: Watched) -> None:
    for annotation in dashboard()["annotations"]["list"]:
        assert watched.prometheus.query(substituted(annotation["expr"])) == []


def test_a_server_that_is_gone_raises_its_alert(watched: Watched) -> None:
    """The last test here: the load ends with the server."""
    watched.load.__exit__()
    assert watched.load.failures == []
    watched.server.process.kill()
    until(lambda: "ManyloraDown" in active(watched), "the alert is pending")
