"""Alert and recording rules: right in form, tested in both directions, each with a paragraph on what to do."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from manylora.engine.interface import EngineStats
from manylora.metrics import BUCKETS, OUTCOMES, Metrics

from .conftest import Tool
from .files import PROMETHEUS, ROOT, RULE_TESTS, RULES, alerts, metrics_in, queries, read_yaml, rules


def test_promtool_accepts_the_rules(promtool: Tool) -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration(promtool: Tool, tmp_path: Path) -> None:
    config = read_yaml(PROMETHEUS / "prometheus.yml")
    config["rule_files"] = [str(PROMETHEUS / pattern) for pattern in config["rule_files"]]
    credentials = config["scrape_configs"][0]["authorization"]
    credentials["credentials_file"] = str(PROMETHEUS / "no-key")  # where compose mounts it, there is nothing here
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    done = promtool("check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_the_rules_fire_when_they_should_and_not_before(promtool: Tool, path: Path) -> None:
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def expectations(alert: str) -> list[list[dict[str, Any]]]:
    """What the unit tests expect of it, at each time that they look."""
    return [
        look["exp_alerts"]
        for path in RULE_TESTS
        for test in read_yaml(path)["tests"]
        for look in test.get("alert_rule_test", ())
        if look["alertname"] == alert
    ]


@pytest.mark.parametrize("alert", alerts())
def test_every_alert_is_tested_firing_and_silent(alert: str) -> None:
    looks = expectations(alert)
    assert any(looks), "no unit test lets it fire"
    assert not all(looks), "no unit test keeps it silent"


@pytest.mark.parametrize("alert", alerts())
def test_every_alert_says_how_urgent_it_is_and_what_to_do(alert: str) -> None:
    rule = alerts()[alert]
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"{{{{ $externalLabels.runbooks }}}}{rule['annotations']['runbook']}"
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor == alert.lower()
    sections = re.findall(r"^#+ (Manylora\w+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert alert in sections


def test_the_runbook_knows_no_alert_that_is_gone() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^#+ (Manylora\w+)$", text, re.MULTILINE)) == set(alerts())


def test_every_query_asks_for_metrics_that_exist() -> None:
    metrics = Metrics()
    metrics.watch_engine(EngineStats, lambda: True)
    exported = {f"{m.name}_total" if m.type == "counter" else m.name for m in metrics.registry.collect()}
    unknown = {where: metrics_in(query) - exported for where, query in queries() if metrics_in(query) - exported}
    assert unknown == {}


def test_every_recorded_series_that_is_asked_for_is_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    asked = {name for _, query in queries() for name in re.findall(r"\b[a-z]+:manylora_\w+:\w+", query)}
    assert asked <= recorded
    assert recorded <= asked, "recorded and never used"


def test_labels_in_queries_have_values_that_are_exported() -> None:
    for where, query in queries():
        for value in re.findall(r'outcome=~?"([^"]*)"', query):
            assert set(value.split("|")) <= set(OUTCOMES), where
        for bound in re.findall(r'le="([^"]*)"', query):
            assert float(bound) in BUCKETS, where
