"""Pictures of a load test's report for docs/loadtest.md.

    .venv/bin/python -m scripts.report_pictures results/report.html --out docs/images --prefix loadtest

Needs the `dev` extra and Chromium.
"""

import argparse
from pathlib import Path
from typing import Final

from playwright.sync_api import Page, sync_playwright

from scripts.pictures import save
from tests.browser.chromium import launch

ROOT: Final = Path(__file__).parent.parent
SECTIONS: Final = {
    "latency": "Latency",
    "rate": "Objective against load",
    "timeline": "Timeline",
    "adapters": "Adapters over time",
    "run": "The run itself",
}
WIDTH: Final = 1120


def top(page: Page) -> bytes:
    """From the title to the thresholds."""
    box = page.locator("main > .card").first.bounding_box()
    assert box is not None
    return page.screenshot(
        full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 16}
    )


def main() -> None:
    """One picture for each part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--prefix", default="loadtest")
    parser.add_argument("--parts", default="top,latency,timeline,adapters,run", help="of top, " + ", ".join(SECTIONS))
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.goto(arguments.report.resolve().as_uri())
        for part in arguments.parts.split(","):
            heading = page.get_by_role("heading", name=SECTIONS.get(part, ""), exact=True).first
            shot = top(page) if part == "top" else heading.locator("xpath=following-sibling::*[1]").screenshot()
            save(shot, arguments.out / f"{arguments.prefix}-{part}.png")
        browser.close()


if __name__ == "__main__":
    main()
