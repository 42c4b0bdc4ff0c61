"""`--no-metrics`: nothing is recorded, and the route says so."""

from pathlib import Path

from manylora.metrics import NoMetrics
from manylora.settings import Settings
from tests.api.conftest import Rig


def rig_without_metrics(folder: Path) -> Rig:
    return Rig(Settings(data_dir=folder), metrics=NoMetrics())


def test_without_metrics_the_route_is_not_found(tmp_path: Path) -> None:
    answer = rig_without_metrics(tmp_path).client.get("/metrics")
    assert answer.status_code == 404
    assert "--no-metrics" in answer.json()["error"]["message"]


def test_without_metrics_requests_are_answered_and_the_live_page_still_counts_them(tmp_path: Path) -> None:
    rig = rig_without_metrics(tmp_path)
    assert rig.complete(max_tokens=4).status_code == 200
    assert rig.client.get("/v1/stats").json()["totals"]["outcomes"] == {"ok": 1}
