"""The Grafana dashboard as a file: what Grafana's own schema knows, in its place, and written by its script."""

import json
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from .files import DASHBOARD, GRAFANA, dashboard, panels, read_yaml

# The Prometheus data source's own part of an annotation, which the dashboard's schema leaves open.
LEFT_OPEN = {"/annotations/list/titleFormat"}
# https://github.com/grafana/grafana/blob/main/packages/grafana-data/src/valueFormats/categories.ts
UNITS = {"short", "s", "bytes", "percentunit", "reqps", "ops", "suffix: tok/s"}


def losses(before: Any, after: Any, path: str = "") -> set[str]:
    """Where `after` says something else than `before`; what it says in addition does not matter."""
    if isinstance(before, dict) and isinstance(after, dict):
        absent = {f"{path}/{key}" for key in before.keys() - after.keys()}
        return absent.union(*(losses(before[key], after[key], f"{path}/{key}") for key in before.keys() & after.keys()))
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return set().union(*(losses(a, b, path) for a, b in zip(before, after, strict=True)))
    return set() if before == after else {path}


def test_the_file_is_what_its_script_writes(tmp_path: Path) -> None:
    written = tmp_path / "dashboard.json"
    subprocess.run([sys.executable, GRAFANA / "write_dashboard.py", written], check=True, timeout=60)
    assert DASHBOARD.read_text(encoding="utf-8") == written.read_text(encoding="utf-8"), (
        "run `python deploy/grafana/write_dashboard.py`"
    )


def test_grafanas_schema_knows_every_field() -> None:
    register_default_plugins()
    board = dashboard()
    understood = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert losses(board, understood) == LEFT_OPEN


def test_an_unknown_field_would_be_noticed() -> None:
    register_default_plugins()
    board = dashboard()
    board["panels"][1]["options"]["colourMode"] = "value"
    understood = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert losses(board, understood) - LEFT_OPEN == {"/panels/options/colourMode"}


def area(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return set(product(columns, lines))


def test_panels_lie_side_by_side() -> None:
    everything = dashboard()["panels"]
    for one, other in combinations(everything, 2):
        assert not area(one) & area(other), (one["title"], other["title"])
    assert all(x < 24 for panel in everything for x, _ in area(panel))
    rows = {y for panel in everything for _, y in area(panel)}
    assert rows == set(range(len(rows))), "a gap between rows"


def test_ids_are_told_apart_and_titles_too() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_every_panel_says_what_it_shows_in_which_unit_from_the_chosen_source(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]
    assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    if panel["type"] == "table":
        overridden = [
            p["value"] for o in panel["fieldConfig"]["overrides"] for p in o["properties"] if p["id"] == "unit"
        ]
        assert len(overridden) == len(panel["targets"])
        assert set(overridden) <= UNITS
    elif panel["type"] == "heatmap":
        assert panel["options"]["yAxis"]["unit"] in UNITS
    else:
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS


def test_there_are_panels_by_adapter_and_by_tenant() -> None:
    for label in ("adapter", "tenant"):
        grouped = [p["title"] for p in panels() if any(f"by ({label}" in t["expr"] for t in p["targets"])]
        assert len(grouped) >= 7, grouped


def test_every_variable_in_a_query_is_defined() -> None:
    defined = {variable["name"] for variable in dashboard()["templating"]["list"]}
    text = DASHBOARD.read_text(encoding="utf-8")
    builtin = {"__rate_interval", "__range", "__all"}
    used = set(re.findall(r"\$\{?(\w+)", text))
    assert used - builtin == defined


def test_grafana_is_told_where_dashboard_and_source_are() -> None:
    source = read_yaml(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"][0]
    provider = read_yaml(GRAFANA / "provisioning" / "dashboards" / "manylora.yml")["providers"][0]
    default = next(v for v in dashboard()["templating"]["list"] if v["name"] == "datasource")["current"]["value"]
    assert source["uid"] == default
    scrape = read_yaml(GRAFANA.parent / "prometheus" / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
    compose = read_yaml(GRAFANA.parents[1] / "docker-compose.yml")["services"]["grafana"]
    mounted = {volume.split(":")[1] for volume in compose["volumes"]}
    assert provider["options"]["path"] in mounted
