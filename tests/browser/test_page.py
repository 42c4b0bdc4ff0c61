"""The page itself: its key, what each role is shown, its colours, a phone, a keyboard."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.e2e.conftest import Server

from .chromium import PHONE
from .conftest import OpenPage

pytestmark = pytest.mark.slow

# Relative luminance contrast (WCAG 2) of an element's text with the nearest ground that is not see-through.
CONTRAST = """(selector) => {
    const element = document.querySelector(selector);
    const channels = (text) => {  // rgb(0 to 255), or color(srgb 0 to 1)
        const numbers = text.match(/[\\d.]+/g).map(Number);
        return text.startsWith('color(') ? numbers.map((v, i) => (i < 3 ? v * 255 : v)) : numbers;
    };
    const luminance = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    let ground = element, colour;
    do {
        colour = channels(getComputedStyle(ground).backgroundColor);
        ground = ground.parentElement;
    } while (ground && colour.length === 4 && colour[3] === 0);
    const [a, b] = [luminance(channels(getComputedStyle(element).color)), luminance(colour)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
TEXTS = ("body", ".tile dt", ".tile .note", ".hint", "#health-text", "th button", ".slots-note", ".primary")


def sign_in(page: Page, key: str) -> None:
    page.locator("#key-input").fill(key)
    page.get_by_role("button", name="Use key").click()


def signed_in(open_page: OpenPage, keyed_server: Server, key: str, **options: Any) -> Page:
    page = open_page(**({"of": keyed_server, "expected": {401}, "tab": "adapters"} | options)).page
    sign_in(page, key)
    expect(page.locator("#health-text")).to_contain_text("Ready")
    return page


def drawer_of(page: Page, name: str) -> Locator:
    page.get_by_role("button", name=name, exact=True).first.click()
    drawer = page.locator("#detail")
    expect(drawer).to_be_visible()
    return drawer


def button_names(place: Locator) -> list[str]:
    return place.get_by_role("button").all_inner_texts()


# keys


def test_a_key_is_asked_for_where_there_are_keys(
    open_page: OpenPage, keyed_server: Server, keys: dict[str, str]
) -> None:
    page = open_page(of=keyed_server, expected={401}).page
    expect(page.locator("#key-dialog")).to_be_visible()
    expect(page.locator("#health-text")).to_have_text("Waiting for a key")
    sign_in(page, "sk-not-a-key")
    expect(page.locator("#key-dialog .problem-line")).to_be_visible()
    sign_in(page, keys["user"])
    expect(page.locator("#health-text")).to_contain_text("Ready")
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator("#who")).to_have_text("acme · user")


def test_the_key_stays_in_its_tab_and_leaves_with_it(
    open_page: OpenPage, keyed_server: Server, keys: dict[str, str]
) -> None:
    page = signed_in(open_page, keyed_server, keys["user"])
    page.reload()
    expect(page.locator("#health-text")).to_contain_text("Ready")
    assert page.context.cookies() == []
    kept = page.evaluate(
        "[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie, location.href]"
    )
    assert [keys["user"] in place for place in kept] == [False, True, False, False]
    other = page.context.new_page()  # another tab of the same person
    other.goto(f"{keyed_server.url}/dashboard")
    expect(other.locator("#key-dialog")).to_be_visible()
    page.locator("#key-button").click()
    page.get_by_role("button", name="Forget key").click()
    expect(page.locator("#health-text")).to_have_text("Waiting for a key")
    assert page.evaluate("sessionStorage.length") == 0


# roles


@pytest.mark.parametrize(
    ("role", "may_upload", "own", "public"),
    [
        ("user", False, ["Try it"], ["Try it"]),
        ("manager", True, ["Try it", "Pin", "Delete adapter"], ["Try it"]),
        ("admin", True, ["Try it", "Pin", "Delete adapter"], ["Try it", "Pin", "Delete adapter"]),
    ],
)
def test_each_role_is_shown_what_it_may_do(
    open_page: OpenPage,
    keyed_server: Server,
    keys: dict[str, str],
    role: str,
    may_upload: bool,
    own: list[str],
    public: list[str],
) -> None:
    page = signed_in(open_page, keyed_server, keys[role])
    expect(page.locator("#upload-button")).to_be_visible(visible=may_upload)
    for name, buttons in (("acme-notes", own), ("sql", public)):
        drawer = drawer_of(page, name)
        assert button_names(drawer.locator("> .actions")) == buttons
        drawer.get_by_role("button", name="Close").click()
    page.locator("#key-button").click()
    expect(page.locator("#key-dialog")).to_contain_text(f"This key {MAY[role]}.")


MAY = {
    "user": "may use adapters and see the traffic of its own tenant",
    "manager": "may also upload, promote, pin and delete the adapters of its own tenant",
    "admin": "may manage the adapters of every tenant and see all traffic",
}


def test_a_user_who_drops_an_adapter_is_told_which_role_it_takes(
    open_page: OpenPage, keyed_server: Server, keys: dict[str, str], folders: dict[str, Path]
) -> None:
    visit = open_page(of=keyed_server, expected={401}, tab="adapters")
    sign_in(visit.page, keys["user"])
    expect(visit.page.locator("#health-text")).to_contain_text("Ready")
    visit.drop(folders["spare"])
    expect(visit.page.locator(".toast")).to_contain_text("role manager")
    expect(visit.page.locator("#upload")).to_be_hidden()


def test_a_manager_uploads_with_its_key(
    open_page: OpenPage, keyed_server: Server, keys: dict[str, str], folders: dict[str, Path]
) -> None:
    visit = open_page(of=keyed_server, expected={401}, tab="adapters")
    page = visit.page
    sign_in(page, keys["manager"])
    expect(page.locator("#upload-button")).to_be_visible()
    visit.drop(folders["other"])
    page.locator("#upload-name").fill("acme-other")
    page.locator("#upload").get_by_role("button", name="Upload").click()
    expect(page.locator(".good-line")).to_have_text("acme-other@1 is ready and active.")
    expect(page.locator("#adapters-body tr", has_text="acme-other")).to_contain_text("acme")


# colours


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_text_is_readable(open_page: OpenPage, scheme: str) -> None:
    page = open_page(color_scheme=scheme).page
    expect(page.locator("#health-text")).to_contain_text("Ready")
    luminance = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (luminance > 128) == (scheme == "light")
    contrasts = {selector: page.evaluate(CONTRAST, selector) for selector in TEXTS}
    assert {selector: value for selector, value in contrasts.items() if value < 4.5} == {}


def test_chosen_colours_outlast_a_reload(open_page: OpenPage) -> None:
    page = open_page(color_scheme="light").page
    button = page.locator("#theme-button")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    button.click()
    assert page.evaluate(ground) == light
    button.click()
    assert page.evaluate(ground) != light
    page.reload()
    expect(button).to_have_attribute("aria-label", "Colours: dark")
    assert page.evaluate(ground) != light


# phones and keyboards


def overflow(page: Page) -> int:
    """How many pixels the page is wider than the screen."""
    pixels: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return pixels


def test_the_page_fits_a_phone(open_page: OpenPage, folders: dict[str, Path]) -> None:
    visit = open_page(**PHONE)
    page = visit.page
    visit.until("document.querySelector('#chart-ttft canvas')")
    assert overflow(page) == 0
    visit.to("adapters")
    expect(page.locator("#adapters-body tr").first).to_be_visible()
    assert overflow(page) == 0
    table = page.locator(".table-wrap")
    assert table.evaluate("(e) => e.scrollWidth - e.clientWidth") <= 0
    for column in ("name", "tier", "requests", "tokens", "ttft"):
        expect(page.locator(f"th[data-column={column}]")).to_be_visible()
    page.locator("#upload-button").tap()
    expect(page.locator("#upload")).to_be_visible()
    assert overflow(page) == 0
    drawer = drawer_of(page, "sql")
    box = drawer.bounding_box()
    assert box is not None
    assert (box["x"], box["width"]) == (0, PHONE["viewport"]["width"])
    assert overflow(page) == 0


def test_what_a_finger_must_hit_is_large_enough(open_page: OpenPage) -> None:
    page = open_page(tab="adapters", **PHONE).page
    expect(page.locator("#adapters-body tr").first).to_be_visible()
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, input:not([type=checkbox]):not(.sr-only)')]"
        ".filter((e) => e.offsetParent && !e.closest('#slots') && e.getBoundingClientRect().height < 28)"
        ".map((e) => e.outerHTML.slice(0, 80))"
    )
    assert small == []


def test_the_slots_are_walked_with_arrow_keys(open_page: OpenPage) -> None:
    page = open_page().page
    slots = page.locator(".slot")
    expect(slots).to_have_count(12)
    assert page.locator(".slot[data-heat=empty]:visible").count() == 0
    fold = page.locator("#slots-fold")
    expect(fold).to_contain_text("empty slot")
    fold.click()
    expect(page.locator(".slot:visible")).to_have_count(12)
    slots.first.focus()
    page.keyboard.press("ArrowRight")
    expect(slots.nth(1)).to_be_focused()
    expect(page.locator("#slots-note")).to_contain_text("slot 1")
    page.keyboard.press("End")
    expect(slots.last).to_be_focused()
    assert page.locator(".slot[tabindex='0']").count() == 1


def test_every_control_has_a_name(open_page: OpenPage) -> None:
    page = open_page(tab="adapters").page
    expect(page.locator("#adapters-body tr").first).to_be_visible()
    page.locator("#upload-button").click()
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')].filter((e) =>"
        " !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length)))"
        ".map((e) => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []


# what is inside an adapter


def test_the_inside_of_an_adapter_is_drawn(open_page: OpenPage) -> None:
    visit = open_page(tab="adapters")
    page = visit.page
    drawer = drawer_of(page, "sql")
    drawer.get_by_role("button", name="Inspect").click()
    cells = drawer.locator(".heat-cell[data-has=true]")
    report = page.evaluate("fetch('v1/adapters/sql/versions/1/inspection').then((r) => r.json())")
    expect(cells).to_have_count(len(report["modules"]))
    shades = cells.evaluate_all("(all) => all.map((e) => Number(e.style.getPropertyValue('--v')))")
    norms = [module["relative_norm"] for module in report["modules"].values()]
    assert max(shades) == 1
    assert min(shades) == pytest.approx(min(norms) / max(norms), rel=1e-3)
    cells.first.hover()
    note = drawer.locator(".heat-foot .slots-note")
    expect(note).to_contain_text("effective rank")
    shown = (note.inner_text()).split(" · ")[0]
    assert f"effective rank {report['modules'][shown]['effective_rank']:.1f} of 4" in note.inner_text()
    visit.until("document.querySelector('.spectra canvas')")
    drawer.get_by_role("button", name="Use of the rank").click()
    expect(drawer.locator(".heat-scale")).to_contain_text("effective rank / rank")
    drawer.get_by_role("button", name="Inspect").click()
    expect(drawer.locator(".inspection")).to_have_count(0)


def test_the_inside_fits_a_phone(open_page: OpenPage) -> None:
    page = open_page(tab="adapters", **PHONE).page
    drawer = drawer_of(page, "sql")
    drawer.get_by_role("button", name="Inspect").click()
    expect(drawer.locator(".spectra canvas")).to_be_visible()
    assert drawer.evaluate("(e) => e.scrollWidth - e.clientWidth") == 0


def test_what_was_done_is_told_above_the_drawer(open_page: OpenPage) -> None:
    page = open_page(tab="adapters").page
    drawer = drawer_of(page, "support-de")
    drawer.get_by_role("button", name="Pin").click()
    toast = page.locator(".toast")
    expect(toast).to_contain_text("stays on the device")
    # In the browser's top layer, where what was shown last lies above: a dialog that is open, too.
    assert page.locator("#toasts").evaluate("(e) => e.matches(':popover-open')")
    drawer.get_by_role("button", name="Unpin").click()
    expect(drawer.get_by_role("button", name="Pin", exact=True)).to_be_visible()


def test_numbers_without_news_say_how_old_they_are(open_page: OpenPage) -> None:
    page = open_page(tab="adapters").page
    health = page.locator("#health-text")
    expect(health).to_contain_text("Ready")
    page.route("**/v1/stats*", lambda _: None)  # never answered
    expect(health).to_contain_text("No news for ")
    expect(page.locator("#health-dot")).to_have_attribute("data-state", "warn")
    page.unroute("**/v1/stats*")
    page.reload()
    expect(health).to_contain_text("Ready")


def test_an_adapter_has_an_address_that_can_be_sent(open_page: OpenPage) -> None:
    page = open_page(tab="adapters").page
    drawer = drawer_of(page, "support-de")
    page.wait_for_url("**/dashboard#adapters/public/support-de")
    drawer.get_by_role("button", name="Close").click()
    page.wait_for_url("**/dashboard#adapters")
    page.goto(f"{page.url}/public/support-de")
    expect(drawer.locator("h2")).to_have_text("support-de")
    page.reload()
    expect(drawer.locator("h2")).to_have_text("support-de")
    drawer.get_by_role("button", name="Close").click()
    page.get_by_role("navigation", name="Sections").get_by_role("link", name="Try it").click()
    page.wait_for_url("**/dashboard#try")
    expect(page.locator("#try-prompt")).to_be_in_viewport()
