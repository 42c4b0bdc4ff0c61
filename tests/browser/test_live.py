"""The page while requests run."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from manylora.models.checkpoint import load_tokenizer
from tests.e2e.conftest import Server
from tests.tiny_adapters import make_adapter_that_spoils

from .conftest import NAMES, OpenPage, upload

pytestmark = pytest.mark.slow


@pytest.fixture
def load(server: Server) -> Iterator[None]:
    """Four clients that ask until the test is over."""
    is_over = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while not is_over.is_set():
                body = {"model": NAMES[number % len(NAMES)], "prompt": "The quick", "max_tokens": 200}
                client.post(f"{server.url}/v1/completions", json={**body, "ignore_eos": True})

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for client in clients:
        client.start()
    yield
    is_over.set()
    for client in clients:
        client.join()


def number_of(page: Page, tile: str) -> float:
    text = page.locator(".tile", has_text=tile).locator(".number").inner_text()
    return float(text.replace(",", ""))


@pytest.mark.usefixtures("load")
def test_the_tiles_show_what_runs_now(open_page: OpenPage) -> None:
    visit = open_page()
    page = visit.page
    visit.until("[...document.querySelectorAll('.tile:not([hidden]) .number')].every((n) => n.textContent !== '–')")
    for tile in ("TTFT p95", "TPOT p95"):
        expect(page.locator(".tile", has_text=tile)).to_be_visible()
    visit.until("parseFloat(document.querySelector('.tile .number').textContent) > 0")
    assert number_of(page, "Throughput") > 0
    expect(page.locator(".tile", has_text="In the batch").locator(".number")).not_to_have_text("0")
    expect(page.locator("#health-text")).to_contain_text("Ready")


@pytest.mark.usefixtures("load")
def test_the_numbers_move_without_a_reload(open_page: OpenPage) -> None:
    page = open_page().page
    requests = page.locator(".tile", has_text="Requests").locator(".note")
    expect(requests).to_contain_text("since start")
    first = requests.inner_text()
    expect(requests).not_to_have_text(first)


@pytest.mark.usefixtures("load")
def test_the_charts_draw_their_lines(open_page: OpenPage) -> None:
    visit = open_page()
    page = visit.page
    for chart in ("#chart-throughput", "#chart-ttft", "#chart-tpot"):
        expect(page.locator(f"{chart} .readings .value").first).not_to_have_text("–")
        colour = page.locator(f"{chart} [data-series]").first.evaluate(
            "(e) => getComputedStyle(e).getPropertyValue('--series').trim()"
        )
        visit.until(COLOURED, [f"{chart} canvas", colour])


# Whether a canvas has some pixels of a colour written as #rrggbb.
COLOURED = """([selector, colour]) => {
    const canvas = document.querySelector(selector);
    if (!canvas || !canvas.width) return false;
    const wanted = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
    let found = 0;
    for (let i = 0; i < data.length; i += 4)
        if (data[i + 3] > 200 && wanted.every((value, k) => Math.abs(value - data[i + k]) < 24)) found += 1;
    return found > 5;
}"""


@pytest.mark.usefixtures("load")
def test_slots_in_use_are_hot_and_say_what_they_hold(open_page: OpenPage) -> None:
    page = open_page().page
    hot = page.locator(".slot[data-heat='4']").first
    expect(hot).to_be_visible()
    hot.hover()
    expect(page.locator("#slots-note")).to_contain_text("running")
    assert any(name in page.locator("#slots-note").inner_text() for name in NAMES)


@pytest.mark.usefixtures("load")
def test_the_table_has_traffic_by_adapter(open_page: OpenPage) -> None:
    visit = open_page(tab="adapters")
    row = visit.page.locator("#adapters-body tr", has_text=NAMES[0])
    expect(row).to_contain_text("device")
    expect(row.locator("td[data-column=ttft]")).to_contain_text("s")
    visit.until(
        "(name) => [...document.querySelectorAll('#adapters-body tr')]"
        ".some((r) => r.textContent.includes(name)"
        " && parseInt(r.querySelector('[data-column=requests]').textContent) > 1"
        " && parseFloat(r.querySelector('[data-column=tokens]').textContent) > 0)",
        NAMES[0],
    )


def test_minutes_before_the_page_was_opened_are_drawn(open_page: OpenPage, server: Server) -> None:
    def marks() -> dict[str, list[float]]:
        timeline: dict[str, list[float]] = httpx.get(f"{server.url}/v1/stats?timeline=true").json()["timeline"]
        return timeline

    httpx.post(f"{server.url}/v1/completions", json={"model": "sql", "prompt": "The", "max_tokens": 64}, timeout=60)
    while not any(marks()["completion_tokens_per_s"]):  # a mark every five seconds
        time.sleep(0.2)
    visit = open_page()
    expect(visit.page.locator("#chart-throughput .readings .value")).not_to_have_text("–")
    assert next(url for url in visit.requests if "/v1/stats" in url).endswith("?timeline=true")
    visit.until(COLOURED, ["#chart-throughput canvas", "#1f5fbf"])


def test_a_server_that_is_gone_is_called_gone(open_page: OpenPage, own_server: Server) -> None:
    visit = open_page(of=own_server)
    expect(visit.page.locator("#health-text")).to_contain_text("Ready")
    own_server.process.kill()
    expect(visit.page.locator("#health-text")).to_contain_text("unreachable")
    visit.complaints.clear()  # Chromium names every refused connection


def test_an_adapter_whose_logits_are_no_numbers_is_marked(
    open_page: OpenPage, own_server: Server, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    token_id = int(load_tokenizer(tiny_llama_dir)("我")["input_ids"][-1])
    upload(own_server.url, make_adapter_that_spoils(tiny_llama_dir, tmp_path / "spoiling", token_id), "spoiling")
    for prompt, status in (("The quick", 200), ("我", 500), ("我", 500)):
        body = {"model": "spoiling", "prompt": prompt, "max_tokens": 2}
        assert httpx.post(f"{own_server.url}/v1/completions", json=body, timeout=60).status_code == status
    visit = open_page(own_server, tab="adapters")
    page = visit.page
    rows = page.locator("#adapters-body tr")
    expect(rows.filter(has_text="spoiling").locator(".badge.bad")).to_have_text("NaN: 2")
    for other in rows.filter(has_not_text="spoiling").all():
        expect(other.locator(".badge.bad")).to_be_hidden()
    visit.to("errors")
    expect(page.get_by_text("adapter_not_finite").first).to_be_visible()
