"""axe-core finds nothing serious and nothing moderate, in every tab, in both colours, from 320 to 1,920 pixels."""

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from .conftest import OpenPage
from .test_tabs import TABS

pytestmark = pytest.mark.slow
NARROW: dict[str, Any] = {"viewport": {"width": 320, "height": 700}, "color_scheme": "light"}
WIDE: dict[str, Any] = {"viewport": {"width": 1920, "height": 1080}, "color_scheme": "dark"}


def findings(page: Page) -> list[str]:
    """What axe complains of beyond trifles: the rule, and where."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['impact']} {one['id']}: {[node['html'][:160] for node in one['nodes']][:4]}"
        for one in found
        if one["impact"] != "minor"
    ]


@pytest.mark.parametrize("options", [NARROW, WIDE], ids=["narrow-light", "wide-dark"])
def test_every_tab_is_accessible(open_page: OpenPage, options: dict[str, Any]) -> None:
    visit = open_page(reduced_motion="reduce", **options)
    page = visit.page
    expect(page.locator("#health-text")).to_contain_text("Ready")
    found = {}
    for tab in TABS:
        visit.to(tab)
        expect(page.locator(f"#tab-{tab} .skeleton:visible")).to_have_count(0)
        if tab == "adapters":
            page.locator("#upload-button").click()
        found[tab] = findings(page)
        wider: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wider == 0, tab
    visit.to("adapters")
    page.get_by_role("button", name="sql", exact=True).first.click()
    page.locator("#detail").get_by_role("button", name="Inspect").click()
    expect(page.locator(".spectra canvas")).to_be_visible()
    found["drawer"] = findings(page)
    assert {place: each for place, each in found.items() if each} == {}


def test_every_tab_is_reached_by_keyboard_alone(open_page: OpenPage) -> None:
    page = open_page().page
    expect(page.locator("#health-text")).to_contain_text("Ready")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    reached = []
    for _ in range(len(TABS) + 6):
        page.keyboard.press("Tab")
        target = page.evaluate("document.activeElement.closest('#sections') && document.activeElement.hash.slice(1)")
        if target:
            page.keyboard.press("Enter")
            expect(page.locator(f"#tab-{target}")).to_be_visible()
            reached += page.locator(".tab:visible").evaluate_all("(all) => all.map((e) => e.id.slice(4))")
    assert reached == list(TABS)
