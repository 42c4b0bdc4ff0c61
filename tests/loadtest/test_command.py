"""The command as a person runs it: exit codes, files, reports."""

import html.parser
import re
import sys
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from manylora_loadtest import cli
from manylora_loadtest.errors import LoadTestError, ScenarioError
from manylora_loadtest.record import read_run
from manylora_loadtest.scenario import load_scenario, ready_scenarios
from manylora_loadtest.summary import summarise
from tests.loadtest.conftest import Serve
from tests.loadtest.fake_server import FakeServer

SCENARIO = """
name = "test"
description = "a <b>bold</b> claim"

[arrival]
process = "closed"
concurrency = 4
requests = 20

[adapters]
discover = true
base_share = 0.3

[requests]
prompt_tokens = 3
output_tokens = 3

[slo]
ttft_ms = 60000
"""


def _invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [*arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def _scenario(folder: Path, more: str = "") -> str:
    path = folder / "test.toml"
    path.write_text(SCENARIO + more, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("thresholds", "code"),
    [
        ("", 0),
        ("error_rate = 0.2\ngoodput_rps = 0.001\nttft_p99_ms = 60000\ncounter_mismatches = 0", 0),
        ("error_rate = 0.05", 1),
        ("e2e_p50_ms = 0.0001", 1),
        ("slo_attainment = 0.95", 1),
        ("requests_per_s = 1e9", 1),
        ("jain_index = 0.1", 1),  # one tenant: nothing was measured
    ],
)
def test_thresholds_decide_the_exit_code(serve: Serve, tmp_path: Path, thresholds: str, code: int) -> None:
    url = serve(FakeServer(fail_every=10))
    scenario = _scenario(tmp_path, f"\n[thresholds]\n{thresholds}\n")
    assert _invoke("run", scenario, "--url", url, "--out", str(tmp_path), "--no-live", "--no-report")[0] == code


def test_run_that_cannot_be_done_exits_with_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["loadtest", "run", "smoke", "--url", "http://127.0.0.1:9", "--no-live"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2


def test_a_report_that_cannot_be_drawn_is_said_before_the_run(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    server = serve(FakeServer())
    with pytest.raises(LoadTestError, match="--no-report"):
        _invoke("run", _scenario(tmp_path), "--url", server, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_unknown_scenario_names_the_ready_ones() -> None:
    with pytest.raises(ScenarioError, match="smoke"):
        _invoke("run", "no-such")


@pytest.mark.parametrize("name", ready_scenarios())
def test_ready_scenario_is_valid(name: str) -> None:
    scenario = load_scenario(ready_scenarios()[name])
    assert scenario.name == name
    assert scenario.thresholds.root


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[thresholds]\nttft_p42_ms = 1", "ttft_p42_ms"),
        ("[surprise]\nx = 1", "surprise"),
        ("[trace]\npath = 'x.jsonl'", "one of them"),
        ("[[changes]]\nkind = 'upload'\nadapter = 'a'\nevery_s = 1", "folders"),
        ("[[changes]]\nkind = 'promote'\nadapter = 'a'\nevery_s = 1\ntenant = 'nobody'", "nobody"),
        ("[[tenants]]\nname = 'a'\n[[tenants]]\nname = 'a'", "same name"),
        ("nonsense", "line"),
    ],
)
def test_wrong_scenario_is_refused_with_the_place(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(ScenarioError, match=where):
        load_scenario(Path(_scenario(tmp_path, f"\n{text}\n")))


def test_unset_key_variable_is_an_error(serve: Serve, tmp_path: Path) -> None:
    scenario = _scenario(tmp_path, "\n[[tenants]]\nname = 'a'\nkey_env = 'LOADTEST_TEST_UNSET'\n")
    with pytest.raises(LoadTestError, match="LOADTEST_TEST_UNSET"):
        _invoke("run", scenario, "--url", serve(FakeServer()), "--no-live")


def test_arrivals_can_be_changed_from_the_command_line(serve: Serve, tmp_path: Path) -> None:
    fake = FakeServer()
    arguments = ["--requests", "6", "--concurrency", "1,2", "--out", str(tmp_path), "--no-live", "--no-report"]
    _invoke("run", _scenario(tmp_path), "--url", serve(fake), *arguments)
    assert fake.num_requests == 12


def test_results_are_json_lines_that_read_back(serve: Serve, tmp_path: Path) -> None:
    scenario = _scenario(tmp_path, "\n[[tenants]]\nname = 'a'\nkey = 'secret-key'\n")
    fake = FakeServer(keys={"secret-key": "a"}, fail_every=9)
    _invoke("run", scenario, "--url", serve(fake), "--out", str(tmp_path), "--no-live", "--no-report")
    text = (tmp_path / "results.jsonl").read_text(encoding="utf-8")
    kinds = [orjson.loads(line)["record"] for line in text.splitlines()]
    assert (kinds[0], kinds.count("request"), kinds[-1]) == ("setup", 20, "summary")
    assert "secret-key" not in text
    again = summarise(read_run(tmp_path / "results.jsonl"))
    assert (again.totals.ok, again.totals.output_tokens) == (fake.num_ok, fake.completion_tokens)


class _Loads(html.parser.HTMLParser):
    """Collects everything in a page that would make a browser fetch or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            is_address = name in {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"}
            if is_address and not (value or "").startswith(("#", "data:")):
                self.found.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.found.append(f"{tag} {name}")
        if tag in {"script", "link", "iframe", "object", "embed", "base"}:
            self.found.append(tag)


def _report(serve: Serve, folder: Path, fake: FakeServer, more: str = "") -> str:
    _invoke("run", _scenario(folder, more), "--url", serve(fake), "--out", str(folder), "--no-live")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_report_is_self_contained(serve: Serve, tmp_path: Path) -> None:
    page = _report(serve, tmp_path, FakeServer(fail_every=6))
    loads = _Loads()
    loads.feed(page)
    assert loads.found == []
    assert all(address.startswith(("#", "data:")) for address in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\s<\"']+", page)) == set(re.findall(r"http://127\.0\.0\.1:\d+", page))


def test_report_has_every_plot(serve: Serve, tmp_path: Path) -> None:
    page = _report(serve, tmp_path, FakeServer())
    assert page.count("<svg") == 4
    for title in ("Objective against load", "Timeline", "Adapters over time", "time to first token"):
        assert title in page


def test_report_of_a_run_without_an_answer_is_drawn(serve: Serve, tmp_path: Path) -> None:
    page = _report(serve, tmp_path, FakeServer(fail_every=1), "\n[thresholds]\nttft_p95_ms = 5\n")
    assert "not measured" in page
    assert page.count("<svg") == 4


def test_hostile_names_are_shown_as_text(serve: Serve, tmp_path: Path) -> None:
    page = _report(serve, tmp_path, FakeServer(adapters=("<script>alert(1)</script>", "a$b$c^{x}")))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a &lt;b&gt;bold&lt;/b&gt; claim" in page


def test_report_can_be_drawn_again(serve: Serve, tmp_path: Path) -> None:
    page = _report(serve, tmp_path, FakeServer())
    _invoke("report", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "again.html"))
    again = (tmp_path / "again.html").read_text(encoding="utf-8")
    tiles = re.compile(r'<div class="tiles">.*?</div>\s*</div>', re.DOTALL)
    assert tiles.findall(again) == tiles.findall(page) != []
