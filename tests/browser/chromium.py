"""Chromium for the browser tests: found on this machine, kept off the network, watched while it shows the page."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, BrowserType, ConsoleMessage, Page, Playwright, Response

DESKTOP: dict[str, Any] = {"viewport": {"width": 1440, "height": 900}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
PATIENCE_S = 20.0
_NAMES = ("chromium", "chromium-browser", "google-chrome")
# What Chromium itself writes to the console of a refused request; the status is judged by `Visit.check`.
_REFUSED = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")


def launch(playwright: Playwright) -> Browser:
    """The system's Chromium, or else the one that `playwright install chromium` fetched. It resolves no name."""
    return launch_with(playwright.chromium, "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


def launch_with(kind: BrowserType, resolver_rules: str) -> Browser:
    """As `launch`, with rules of its own for what names lead to."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    arguments = ["--no-sandbox", f"--host-resolver-rules={resolver_rules}"]
    return kind.launch(executable_path=found, args=arguments)


@dataclass
class Visit:
    """One visitor: a page, and everything that went wrong in it. `expected` are refusals that the test provokes."""

    page: Page
    url: str
    expected: set[int] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("response", self._on_response)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not _REFUSED.match(message.text):
            self.complaints.append(f"{message.type}: {message.text}")

    def _on_response(self, response: Response) -> None:
        if response.status >= 400 and response.status not in self.expected:
            self.complaints.append(f"{response.status}: {response.request.method} {response.url}")

    def open(self, tab: str = "") -> "Visit":
        """Show the page, at a tab's address or at none."""
        self.page.goto(f"{self.url}/dashboard{tab and f'#{tab}'}")
        return self

    def to(self, tab: str) -> None:
        """Go to a tab by its link."""
        self.page.locator(f"#sections a[href='#{tab}']").click()

    def until(self, expression: str, argument: Any = None) -> None:
        """Wait until a JavaScript expression or function gives something true."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.page.evaluate(expression, argument):
            assert time.monotonic() < deadline, f"never true: {expression} {argument}"
            self.page.wait_for_timeout(50)

    def drop(self, *paths: Path) -> None:
        """Drop files or folders from the desktop into the middle of what is seen, as the browser itself delivers it."""
        width, height = self.page.evaluate("[innerWidth, innerHeight]")
        session = self.page.context.new_cdp_session(self.page)
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, "x": width // 2, "y": height // 2, "data": data})
        session.detach()

    def check(self) -> None:
        """Nothing was complained of and nothing was asked of anybody else."""
        assert self.complaints == []
        assert self.requests
        assert [url for url in self.requests if not url.startswith((f"{self.url}/", f"blob:{self.url}/"))] == []


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    context: BrowserContext = browser.new_context(**{**DESKTOP, **options})
    try:
        visit = Visit(context.new_page(), url)
        visit.page.set_default_timeout(PATIENCE_S * 1000)
        visit.watch()
        yield visit
    finally:
        context.close()
