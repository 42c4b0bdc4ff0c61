"""The tabs for those who run a server: usage, tenants and keys, jobs, errors; both languages."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import Server, running

from .chromium import Visit
from .conftest import OpenPage, complete
from .test_page import sign_in

pytestmark = pytest.mark.slow
TABS = ("now", "adapters", "try", "usage", "tenants", "jobs", "errors")
ROWS = b"".join(json.dumps({"prompt": f"{n}+1=", "completion": f" {n + 1}"}).encode() + b"\n" for n in range(24))
# What has a name of its own in every language, and what the server itself says.
NAMES = re.compile(
    r"manylora|legal-contracts|support-de|sql|tiny|public|admin|manager|English|KV|TTFT|p50|p95|p99|KiB|MiB|API|UTC|JSON"
    r"|lines|messages|curl|Python|Top p|USD|price_|mm/dd/yyyy|Ctrl-Enter|adapters DIR|@2|nobody"
    r"|DPO|\bms\b|\bB\b|[a-z_]+_found"
)
SHOWN = """() => {
    const seen = [];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_ELEMENT);
    while (walk.nextNode()) {
        const e = walk.currentNode;
        if (!e.checkVisibility() || e.closest('.message, .log, .uplot, .example, .badge, script, code')) continue;
        seen.push(...['aria-label', 'title', 'placeholder'].map((name) => e.getAttribute(name)));
        seen.push(...[...e.childNodes].map((node) => (node.nodeType === Node.TEXT_NODE ? node.data.trim() : null)));
    }
    return seen.filter(Boolean);
}"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "Sums And.jsonl"
    path.write_bytes(ROWS)
    return path


def expect_tab(page: Page, name: str) -> None:
    expect(page.locator(f"#tab-{name}")).to_be_visible()
    expect(page.locator(".tab:visible")).to_have_count(1)


def test_each_tab_has_an_address_and_the_way_back_leads_to_the_one_before(open_page: OpenPage) -> None:
    visit = open_page()
    page = visit.page
    expect_tab(page, "now")
    for tab in TABS:
        visit.to(tab)
        expect_tab(page, tab)
        expect(page.locator("#sections [aria-current=page]")).to_have_attribute("href", f"#{tab}")
        assert page.url.endswith(f"/dashboard#{tab}")
    page.go_back()
    expect_tab(page, "jobs")
    page.goto(f"{visit.url}/dashboard#recent-errors")  # as it was called before there were tabs
    page.reload()
    expect_tab(page, "errors")
    page.goto(f"{visit.url}/dashboard#%")  # which encodes nothing
    expect_tab(page, "errors")
    page.reload()
    expect_tab(page, "now")
    expect(page.locator("#health-text")).to_contain_text("Ready")


@pytest.mark.parametrize(
    ("role", "hidden"), [("user", {"tenants", "jobs"}), ("manager", {"tenants"}), ("admin", set())]
)
def test_each_role_is_offered_the_tabs_that_it_can_use(
    open_page: OpenPage, keyed_server: Server, keys: dict[str, str], role: str, hidden: set[str]
) -> None:
    page = open_page(keyed_server, {401}, tab="tenants").page
    sign_in(page, keys[role])
    expect(page.locator("#health-text")).to_contain_text("Ready")
    expect(page.locator(f"#tab-{'now' if 'tenants' in hidden else 'tenants'}")).to_be_visible()
    links = page.locator("#sections a:visible").evaluate_all("(all) => all.map((a) => a.hash.slice(1))")
    assert links == [tab for tab in TABS if tab not in hidden]


def test_usage_is_drawn_and_listed_and_grows(open_page: OpenPage, server: Server) -> None:
    body = {"model": "sql", "prompt": "The quick", "max_tokens": 8}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    visit = open_page(tab="usage")
    page = visit.page
    row = page.locator("#tab-usage tbody tr", has_text="sql")
    expect(row).to_contain_text("public")
    expect(page.locator("#tab-usage tfoot")).to_contain_text("All together")
    visit.until("document.querySelector('#tab-usage .plot canvas')")
    expect(page.locator("#tab-usage")).to_contain_text("No prices are set")
    for period, name in (("week", "Tokens by day"), ("month", "Tokens by day"), ("day", "Tokens by hour")):
        page.locator("#usage-period").select_option(period)
        expect(page.get_by_role("heading", name=name)).to_be_visible()
    page.locator("#usage-group").select_option("tenant")
    expect(page.locator("#tab-usage thead")).not_to_contain_text("Adapter")
    answer = httpx.get(f"{server.url}/v1/usage").json()["total"]
    expect(page.locator(".figure-box", has_text="Requests").locator("dd")).to_have_text(f"{answer['requests']:,}")


def test_what_cannot_be_asked_for_says_how_old_it_is(open_page: OpenPage) -> None:
    visit = open_page(tab="usage", expected={503})
    page = visit.page
    age = page.locator("#tab-usage .age")
    expect(age).to_have_attribute("data-old", "false")
    refused = {"error": {"message": "the database is away"}}
    page.route("**/v1/usage?*", lambda route: route.fulfill(status=503, json=refused))
    page.locator("#usage-period").select_option("week")
    expect(age).to_have_attribute("data-old", "true")
    expect(age).to_contain_text("the database is away")


def test_a_key_is_made_shown_once_and_revoked(open_page: OpenPage, keyed_server: Server, keys: dict[str, str]) -> None:
    page = open_page(keyed_server, {401}, tab="tenants").page
    sign_in(page, keys["admin"])
    form = page.locator("#new-key")
    form.get_by_label("Tenant").fill("newcomer")
    form.get_by_label("What it is for").fill("nightly batch")
    form.get_by_label("Expires").fill("2099-12-31")
    form.get_by_role("button", name="Create key").click()
    made = page.locator("#made-key").inner_text()
    headers = {"authorization": f"Bearer {made}"}
    assert httpx.get(f"{keyed_server.url}/v1/models", headers=headers).status_code == 200
    row = page.locator("#tab-tenants tr", has_text="nightly batch")
    expect(row).to_contain_text("31 Dec 2099")
    expect(row).to_contain_text("valid")
    page.get_by_role("button", name="Close", exact=True).click()
    expect(page.locator("#made-key")).to_have_count(0)
    assert made not in page.content()
    row.get_by_role("button", name="Revoke").click()
    page.locator("#confirm-dialog").get_by_role("button", name="Revoke").click()
    expect(row).to_have_count(0)
    assert httpx.get(f"{keyed_server.url}/v1/models", headers=headers).status_code == 401
    page.get_by_label("Show revoked and expired ones, too").check()
    expect(row).to_contain_text("revoked")


def test_quotas_are_set_and_lifted(open_page: OpenPage, keyed_server: Server, keys: dict[str, str]) -> None:
    page = open_page(keyed_server, {401}, tab="tenants").page
    sign_in(page, keys["admin"])

    def limits() -> dict[str, Any]:
        headers = {"authorization": f"Bearer {keys['admin']}"}
        found: dict[str, Any] = httpx.get(f"{keyed_server.url}/v1/tenants/acme", headers=headers).json()
        return found

    quotas = page.get_by_role("button", name="Quotas of acme")
    for value, weight, told in (("7", "2.5", "1 quota"), ("", "1", "none")):
        quotas.click()
        page.get_by_label("Requests at once").fill(value)
        page.get_by_label("Share of the machine").fill(weight)
        page.locator("#quotas").get_by_role("button", name="Save").click()
        expect(quotas).to_have_text(told)
        found = limits()
        assert (found["max_concurrent"], found["weight"]) == (int(value) if value else None, float(weight))


def submit(visit: Visit, rows: Path, *, activate: str = "never") -> Page:
    page = visit.page
    expect(page.locator("#tab-jobs .age")).to_be_visible()
    visit.drop(rows)
    expect(page.locator("#jobs-name")).to_have_value("sums-and")
    page.locator("#new-job").get_by_label("Epochs").fill("1")
    page.locator("#new-job").get_by_label("Rank").fill("4")
    page.locator("#new-job select[name=activate]").select_option(activate)
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#job-title")).to_have_text("sums-and")
    return page


def test_a_job_is_submitted_by_a_drop_paused_resumed_and_cancelled(open_page: OpenPage, rows: Path) -> None:
    visit = open_page(tab="jobs")
    page = submit(visit, rows)
    assert re.search(r"#jobs/ftjob-\w+$", page.url)
    status = page.locator("#job [data-status]")
    expect(page.locator("#job .log")).to_contain_text("Created fine-tuning job")
    for button, is_now in (("Pause", "paused"), ("Resume", "queued")):
        page.locator("#job").get_by_role("button", name=button).click()
        expect(status).to_have_text(is_now)
    page.locator("#job").get_by_role("button", name="Cancel job").click()
    page.locator("#confirm-dialog").get_by_role("button", name="Cancel job").click()
    expect(status).to_have_text("cancelled")
    page.get_by_role("link", name="All jobs").click()
    expect(page.locator("#tab-jobs tbody tr").first).to_contain_text("cancelled")


def test_preferences_are_learnt_by_dpo(open_page: OpenPage, server: Server, rows: Path) -> None:
    row = json.dumps({"prompt": "Say hello.", "chosen": "Good morning.", "rejected": "What?"})
    rows.write_text(f"{row}\n" * 4)
    visit = open_page(tab="jobs")
    page = visit.page
    expect(page.locator("#tab-jobs .age")).to_be_visible()
    visit.drop(rows)
    form = page.locator("#new-job")
    expect(form.get_by_label("Beta")).to_have_count(0)
    form.get_by_label("Learns from").select_option("dpo")
    form.get_by_label("Beta").fill("0.25")
    form.get_by_label("Epochs").fill("2")
    form.get_by_role("button", name="Start training").click()
    expect(page.locator("#job-title")).to_have_text("sums-and")
    path = f"{server.url}/v1/fine_tuning/jobs/{page.url.partition('#jobs/')[2]}"
    method = httpx.get(path).json()["method"]
    assert method["type"] == "dpo"
    asked = method["dpo"]["hyperparameters"]
    assert (asked["beta"], asked["n_epochs"]) == (0.25, 2)
    assert httpx.post(f"{path}/cancel").status_code == 200


def test_faulty_rows_are_refused_in_the_servers_words(open_page: OpenPage, rows: Path) -> None:
    rows.write_bytes(ROWS + b'{"prompt": 1}\n')
    visit = open_page(tab="jobs", expected={400})
    page = visit.page
    expect(page.locator("#tab-jobs .age")).to_be_visible()
    visit.drop(rows)
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#new-job .problem-line")).to_contain_text("25")
    expect(page.get_by_role("button", name="Start training")).to_be_enabled()


@pytest.fixture
def training_server(settings: dict[str, Any], tmp_path: Path) -> Iterator[Server]:
    with running(settings | {"data_dir": str(tmp_path / "data"), "jobs": 1}, tmp_path / "log") as server:
        yield server


def test_a_training_is_followed_to_its_version_which_answers(
    open_page: OpenPage, training_server: Server, rows: Path
) -> None:
    page = submit(open_page(training_server, tab="jobs"), rows, activate="always")
    expect(page.locator("#job [data-status]")).to_have_text("succeeded", timeout=240_000)
    expect(page.locator("#job .plot canvas")).to_be_visible()
    expect(page.locator("#job .facts")).to_contain_text("3 of 3 steps")
    page.get_by_role("link", name="Show sums-and@1").click()
    drawer = page.locator("#detail")
    expect(drawer.locator("h2")).to_have_text("sums-and")
    expect(drawer).to_contain_text("Version 1")
    drawer.get_by_role("button", name="Try it", exact=True).first.click()
    expect(page.locator("#try-adapter")).to_have_value("sums-and")
    page.locator("#try-mode").select_option("completion")
    page.locator("#try-tokens").fill("8")
    page.locator("#try-prompt").fill("3+1=")
    page.get_by_role("button", name="Run both").click()
    for foot in page.locator(".answer-foot").all():
        expect(foot).to_contain_text("tokens")
    answers = [pane.text_content() for pane in page.locator(".pane .answer").all()]
    assert answers == [complete(training_server.url, model, "3+1=", 8) for model in ("sums-and", "tiny")]


def test_errors_are_grouped_and_lead_to_their_log_lines(open_page: OpenPage, server: Server) -> None:
    ids = []
    for _ in range(3):
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "grouped-away", "prompt": "x"}, timeout=60)
        ids.append(answer.headers["x-request-id"])
    visit = open_page(tab="errors")
    page = visit.page
    group = page.locator("#errors-list > li", has_text="grouped-away")
    expect(group).to_have_count(1)
    expect(group).to_contain_text("client error")
    group.get_by_text("times").click()
    shown = group.locator(".request")
    assert shown.all_inner_texts()[:3] == ids[::-1]
    group.get_by_role("button", name="Log lines").first.click()
    expect(page.locator("#lines .log")).to_contain_text(ids[-1])
    expect(page.locator("#lines .log")).to_contain_text("404")
    page.locator("#errors-kind").select_option("server")
    expect(group).to_have_count(0)


def test_the_table_keeps_its_order_under_the_focus(open_page: OpenPage, server: Server) -> None:
    page = open_page(tab="adapters").page
    names = page.locator("#adapters-body button.name")
    expect(names.first).to_be_visible()
    before = names.all_inner_texts()
    names.last.focus()
    body = {"model": before[-1], "prompt": "The quick", "max_tokens": 2}
    for _ in range(40):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    row = page.locator("#adapters-body tr", has=page.get_by_role("button", name=before[-1], exact=True))
    expect(row.locator("[data-column=requests]")).not_to_have_text("0")
    assert names.all_inner_texts() == before
    page.locator("#filter").focus()
    expect(names.first).to_have_text(before[-1])


@pytest.mark.parametrize("tab", TABS)
def test_a_chinese_browser_reads_chinese(open_page: OpenPage, server: Server, tab: str) -> None:
    listed = httpx.get(f"{server.url}/v1/adapters?limit=1000").json()["data"]
    used = httpx.get(f"{server.url}/v1/usage").json()["data"]
    names = {each["name"] for each in listed} | {each["adapter"] for each in used if each["adapter"]}
    data = re.compile(
        "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r"|\b[0-9a-f]{6,}\S*|ftjob-\w+|sums-and"
    )
    visit = open_page(tab=tab, locale="zh-CN")
    expect(visit.page.locator("#health-text")).to_contain_text("就绪")
    expect(visit.page.locator(f"#tab-{tab} .skeleton:visible")).to_have_count(0)
    assert visit.page.locator("html").get_attribute("lang") == "zh-CN"
    texts: list[str] = visit.page.evaluate(SHOWN)
    assert len(texts) > 20
    left = {text for text in texts if re.search("[A-Za-z]{2,}", NAMES.sub("", data.sub("", text)))}
    assert left == set()


def test_the_language_is_switched_and_stays(open_page: OpenPage) -> None:
    page = open_page().page
    expect(page.locator("#health-text")).to_contain_text("Ready")
    page.get_by_role("button", name="中文").click()
    expect(page.locator("#health-text")).to_contain_text("就绪")
    page.reload()
    expect(page.get_by_role("link", name="租户与密钥")).to_be_visible()
    page.get_by_role("button", name="English").click()
    expect(page.locator("#health-text")).to_contain_text("Ready")
