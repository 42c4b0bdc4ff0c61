"""Every tab of the dashboard in every state, looked at by a machine and put together for people to look at.

    .venv/bin/python -m scripts.views --out build/views

Each tab at 1440 and at 390 pixels, light and dark, in both languages, with no adapter, with 300 and under load, as
user, manager and admin: contact sheets, a row for each colour and language. In each, nothing may be wider than the
window, nothing may be said on the console, and axe-core may find nothing that is serious or moderate. Exits with 1
where something is wrong. Needs the `dev` extra and Chromium; takes some minutes, and the sheets stay out of the
repository.
"""

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from manylora_loadtest.fleet import make_fleet
from scripts.screenshots import Stage, serving
from tests.browser.chromium import DESKTOP, PHONE, launch
from tests.tiny_models import make_tiny_model

TABS: Final = ("now", "adapters", "try", "usage", "tenants", "jobs", "errors")
SIZES: Final = {"1440": DESKTOP, "390": {**PHONE, "device_scale_factor": 1}}
COLOURS: Final = ("light", "dark")
LANGUAGES: Final = ("en-GB", "zh-CN")
ROLES: Final = ("user", "manager", "admin")
NUM_ADAPTERS: Final = 300
SHEET_WIDTHS: Final = {"1440": 640, "390": 260}  # of one picture on a sheet
SETTLE_MS: Final = 400


@dataclass
class Looker:
    """Goes through all views of a server. `wrong` is what it came upon."""

    browser: Browser
    out: Path
    wrong: list[str] = field(default_factory=list)

    def look(self, stage: Stage, state: str, roles: tuple[str, ...]) -> None:
        for role, size in itertools.product(roles, SIZES):
            rows = [
                self._row(stage, f"{state}, {role}, {size}, {colour}, {language}", role, size, colour, language)
                for colour, language in itertools.product(COLOURS, LANGUAGES)
            ]
            sheet(rows, SHEET_WIDTHS[size]).save(self.out / f"{state}-{role}-{size}.png", optimize=True)

    def _row(self, stage: Stage, where: str, role: str, size: str, colour: str, language: str) -> list[bytes]:
        options: dict[str, Any] = {**SIZES[size], "color_scheme": colour, "locale": language}
        context = self.browser.new_context(**options, reduced_motion="reduce")
        context.add_init_script(f"sessionStorage.setItem('manylora.key', {json.dumps(stage.keys[role])})")
        try:
            page = context.new_page()
            page.on("console", lambda message: self._hear(where, message.type, message.text))
            page.on("pageerror", lambda error: self.wrong.append(f"{where}: {error}"))
            page.goto(f"{stage.url}/dashboard")
            expect(page.locator("#health-text")).not_to_be_empty(timeout=60_000)
            expect(page.locator("body")).to_have_attribute("data-heard", "", timeout=60_000)
            return [self._view(page, f"{where}, {tab}", tab) for tab in TABS if self._can_go_to(page, tab)]
        finally:
            context.close()

    def _can_go_to(self, page: Page, tab: str) -> bool:
        return page.locator(f"#sections a[href='#{tab}']").is_visible()

    def _view(self, page: Page, where: str, tab: str) -> bytes:
        page.locator(f"#sections a[href='#{tab}']").click()
        expect(page.locator(f"#tab-{tab} .skeleton:visible")).to_have_count(0, timeout=60_000)
        page.wait_for_timeout(SETTLE_MS)
        wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wider:
            self.wrong.append(f"{where}: {wider} px wider than the window")
        for found in Axe().run(page).response["violations"]:
            if found["impact"] != "minor":
                self.wrong.append(f"{where}: {found['impact']} {found['id']}: {found['nodes'][0]['html'][:120]}")
        return page.screenshot()

    def _hear(self, where: str, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.wrong.append(f"{where}: {kind} {text}")


def sheet(rows: list[list[bytes]], width: int) -> Image.Image:
    """The pictures in rows, each this many pixels wide."""
    shrunk = [[shrink(shot, width) for shot in row] for row in rows]
    height = max(image.height for row in shrunk for image in row)
    gap = 12
    most = max(map(len, shrunk))
    whole = Image.new("RGB", (most * (width + gap), len(shrunk) * (height + gap)), "#888888")
    for number, row in enumerate(shrunk):
        for place, image in enumerate(row):
            whole.paste(image, (place * (width + gap), number * (height + gap)))
    return whole


def shrink(shot: bytes, width: int) -> Image.Image:
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    return image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)


@contextlib.contextmanager
def load(stage: Stage, names: list[str]) -> Iterator[None]:
    """Four callers of the tenant's key ask one adapter after the other, until the block ends."""
    ended = threading.Event()

    def ask(first: int) -> None:
        headers = {"authorization": f"Bearer {stage.keys['manager']}"}
        with httpx.Client(base_url=stage.url, headers=headers, timeout=120) as client:
            for name in itertools.cycle(names[first::4]):
                if ended.is_set():
                    return
                client.post("/v1/completions", json={"model": name, "prompt": "The quick", "max_tokens": 32})

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def main() -> None:
    """All states, in order; what is wrong goes to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/views"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder = Path(scratch)
        model = make_tiny_model("llama", folder / "tiny-llama")
        fleet = folder / "fleet"
        names = [made.name for made in make_fleet(model, fleet, NUM_ADAPTERS, (4, 8))]
        (folder / "none").mkdir()
        looker = Looker(launch(playwright), out)
        with serving(folder / "empty", model=str(model), adapters=folder / "none") as stage:
            looker.look(stage, "none", ("admin",))
        with serving(folder / "full", model=str(model), adapters=fleet) as stage:
            looker.look(stage, "idle", ROLES)
            with load(stage, names):
                looker.look(stage, "loaded", ROLES)
        looker.browser.close()
    sys.stdout.writelines(f"{each}\n" for each in looker.wrong)
    sys.exit(bool(looker.wrong))


if __name__ == "__main__":
    main()
