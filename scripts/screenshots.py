"""Pictures of the dashboard for docs/dashboard.md: a real server under a real load, seen by a real browser.

    .venv/bin/python -m scripts.screenshots --out docs/images

Needs the `dev` extra and Chromium. Takes about four minutes on two cores: the charts show the minutes before.
"""

import argparse
import asyncio
import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from manylora.database.database import open_database
from manylora.models import default_model
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from manylora.tenants.limits import TenantStore
from manylora_loadtest.fleet import make_fleet
from manylora_loadtest.runner import run_scenario
from manylora_loadtest.scenario import Scenario
from tests.browser.chromium import DESKTOP, PHONE, launch

ROOT: Final = Path(__file__).parent.parent
MOST_BYTES: Final = 150_000
TENANTS: Final = ("acme", "globex", "initech")
SUBJECTS: Final = (
    "support", "contracts", "claims", "triage", "invoices", "summaries", "product-copy", "faq", "tone", "tickets",
    "returns", "compliance", "onboarding", "alerts",
)  # fmt: skip
LANGUAGES: Final = ("de", "en", "fr")
RANKS: Final = (4, 8, 16)
FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
HISTORY_S: Final = 75.0


@dataclass(frozen=True)
class Stage:
    """A running server, with a key of each of its callers."""

    url: str
    keys: dict[str, str]
    folder: Path

    def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys['ops']}"}
        return httpx.request(method, f"{self.url}{path}", headers=headers, timeout=120, **more).raise_for_status()

    def upload(self, folder: Path, tenant: str, name: str, **fields: str) -> None:
        files = [("files", (part, (folder / part).read_bytes())) for part in FILES]
        self.call("POST", "/v1/adapters", params={"tenant": tenant}, data={"name": name, **fields}, files=files)


def make_keys(data: Path) -> dict[str, str]:
    """An admin's, a manager's for each tenant, and one of each role for the first.

    One tenant has a small quota, so that something is refused.
    """
    data.mkdir(parents=True)
    database = open_database(f"sqlite:///{data / 'registry.sqlite3'}")
    try:
        store = KeyStore(database)
        keys = {"ops": store.create("ops", Role.ADMIN)[1]}
        keys |= {role.value: store.create(TENANTS[0], role)[1] for role in Role}
        keys |= {tenant: store.create(tenant, Role.MANAGER)[1] for tenant in TENANTS}
        TenantStore(database).change("initech", requests_per_minute=20)
    finally:
        database.close()
    return keys


@contextlib.contextmanager
def serving(folder: Path, model: str | None = None, adapters: Path = ROOT / "adapters") -> Iterator[Stage]:
    """`manylora serve`, with the default model and the adapters of this repository if nothing else is said."""
    keys = make_keys(folder / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "manylora", "serve", *([model] if model else []), "--port", str(port)]
    command += ["--data-dir", str(folder / "data"), "--adapters", str(adapters)]
    command += ["--max-slots", "48", "--max-model-len", "512"]
    command += ["--jobs", "1", "--price-prompt", "0.02", "--price-cached", "0.002", "--price-completion", "0.06"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, folder / "server.log")
        yield Stage(url, keys, folder)
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises RuntimeError with the log when the server ends instead."""
    while True:
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.3)


def fill(stage: Stage) -> None:
    """Adapters of three tenants with names as people give them, some with several versions, some pinned."""
    model = default_model.ensure()
    names = [f"{subject}-{language}" for subject in SUBJECTS for language in LANGUAGES]
    folders = make_fleet(model, stage.folder / "fleet", len(names) + 1, RANKS)
    for number, name in enumerate(names):
        stage.upload(folders[number], TENANTS[number % len(TENANTS)], name)
    for number in (0, 4, 8):
        stage.upload(folders[number + 1], TENANTS[number % len(TENANTS)], names[number], activate="false")
        stage.call("PATCH", f"/v1/adapters/{names[number]}?tenant={TENANTS[number % 3]}", json={"pinned": True})


def scenario(duration_s: float, rate: float) -> Scenario:
    """Three tenants, Zipf, a share of chat with a common prefix."""
    popularity = {"kind": "zipf", "s": 1.1}
    return Scenario.model_validate(
        {
            "name": "pictures",
            "seed": 3,
            "arrival": {"process": "poisson", "rate": rate, "duration_s": duration_s},
            "adapters": {"discover": True, "popularity": popularity, "base_share": 0.1},
            "chat": {"share": 0.4, "prefix_tokens": 48, "num_prefixes": 2},
            "requests": {
                "prompt_tokens": {"kind": "lognormal", "median": 24, "sigma": 0.5, "low": 8, "high": 96},
                "output_tokens": {"kind": "lognormal", "median": 40, "sigma": 0.5, "low": 8, "high": 120},
            },
            "tenants": [{"name": tenant, "weight": weight} for tenant, weight in zip(TENANTS, (5, 3, 2), strict=True)],
        }
    )


@contextlib.contextmanager
def load(stage: Stage, duration_s: float, rate: float) -> Iterator[None]:
    """The scenario runs beside the block; the block ends with its last answer."""
    loaded = scenario(duration_s, rate)
    tenants = tuple(t.model_copy(update={"key": stage.keys[t.name]}) for t in loaded.tenants)
    loaded = loaded.model_copy(update={"tenants": tenants})
    thread = threading.Thread(target=lambda: asyncio.run(run_scenario(loaded, stage.url)))
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextlib.contextmanager
def looking(browser: Browser, stage: Stage, tab: str = "now", *, who: str = "ops", **options: Any) -> Iterator[Page]:
    """A tab of the page, signed in."""
    context = browser.new_context(**{**DESKTOP, **options})
    context.add_init_script(f"sessionStorage.setItem('manylora.key', {json.dumps(stage.keys[who])})")
    try:
        page = context.new_page()
        page.goto(f"{stage.url}/dashboard#{tab}")
        page.wait_for_selector("#adapters-body tr", state="attached")
        page.wait_for_timeout(2500)  # two polls
        yield page
    finally:
        context.close()


def idle(browser: Browser, stage: Stage, out: Path) -> None:
    with looking(browser, stage) as page:
        save(page.screenshot(), out / "dashboard-idle.png")


def under_load(browser: Browser, stage: Stage, out: Path) -> None:
    """The page as it was left open beside the load, then the others."""
    tall = {"width": 1440, "height": 900}
    with (
        looking(browser, stage, viewport=tall) as light,
        looking(browser, stage, viewport=tall, color_scheme="dark") as dark,
    ):
        light.wait_for_timeout(HISTORY_S * 1000)
        save(light.screenshot(), out / "dashboard-load.png")
        save(dark.screenshot(), out / "dashboard-dark.png")
    for tab in ("adapters", "usage"):
        with looking(browser, stage, tab) as page:
            save(page.screenshot(), out / f"dashboard-{tab}.png")
    for name, more in (("phone", {}), ("phone-dark", {"color_scheme": "dark", "locale": "zh-CN"})):
        shots = []
        for tab in ("now", "adapters", "usage", "tenants"):
            with looking(browser, stage, tab, **PHONE, **more) as page:
                shots.append(page.screenshot())
        save(side_by_side(*shots), out / f"dashboard-{name}.png")


def running_it(browser: Browser, stage: Stage, out: Path) -> None:
    """What admins and managers do: keys and quotas, a training that waits for a worker and one that has run."""
    rows = "".join(json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(64))
    sent = stage.call("POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("sums.jsonl", rows.encode())})
    base = stage.call("GET", "/v1/stats").json()["server"]["model"]
    body = {
        "model": base,
        "training_file": sent.json()["id"],
        "suffix": "sums",
        "manylora": {"rank": 4, "eval_every": 4},
    }
    body |= {"validation_file": sent.json()["id"], "hyperparameters": {"n_epochs": 4}}
    job = stage.call("POST", "/v1/fine_tuning/jobs", json=body).json()["id"]
    for model, tokens in (("billing-it", 16), ("billing-it", 16), ("sql", 16), ("sql@9", -1), ("sql", 9_000_000)):
        body = {"model": model, "prompt": "Once", "max_tokens": tokens}
        key = {"authorization": f"Bearer {stage.keys['acme']}"}
        answer = httpx.post(f"{stage.url}/v1/completions", json=body, headers=key, timeout=120)
    with looking(browser, stage, f"errors/{answer.headers['x-request-id']}") as page:
        save(page.screenshot(), out / "dashboard-errors.png")
    with looking(browser, stage, "tenants") as page:
        save(page.screenshot(), out / "dashboard-tenants.png")
    with looking(browser, stage, f"jobs/{job}") as page:
        expect(page.locator("#job [data-status]")).to_have_text("succeeded", timeout=600_000)
        page.wait_for_timeout(1000)
        save(page.screenshot(), out / "dashboard-jobs.png")


def trying(browser: Browser, stage: Stage, out: Path) -> None:
    with looking(browser, stage, "try") as page:
        page.locator("#try-adapter").fill("sql")
        page.locator("#try-prompt").fill(
            "Table hotels(city, chain, stars, beds). Show the city of all hotels with more than 3 stars."
        )
        page.get_by_role("button", name="Run both").click()
        expect(page.get_by_role("button", name="Run both")).to_be_enabled(timeout=120_000)
        save(page.locator("#tab-try").screenshot(), out / "dashboard-try.png")


def refused(browser: Browser, stage: Stage, out: Path) -> None:
    """An adapter with six different things wrong."""
    folder = stage.folder / "broken"
    shutil.copytree(stage.folder / "fleet" / "a001", folder)
    config = json.loads((folder / FILES[0]).read_text())
    config |= {"use_dora": True, "r": 128, "lora_rank": 8, "target_modules": [*config["target_modules"], "w_gate"]}
    (folder / FILES[0]).write_text(json.dumps(config))
    with looking(browser, stage, "adapters") as page:
        page.locator("#upload-button").click()
        page.get_by_label("Adapter files").set_input_files([folder / name for name in FILES])
        page.locator("#upload-name").fill("claims-es")
        page.locator("#upload").get_by_role("button", name="Upload").click()
        page.wait_for_selector(".problems li")
        page.wait_for_timeout(300)
        save(page.screenshot(), out / "dashboard-refused.png")


def detail(browser: Browser, stage: Stage, out: Path) -> None:
    with looking(browser, stage, "adapters") as page:
        page.locator("#filter").fill("city-zh")
        page.get_by_role("button", name="city-zh", exact=True).first.click()
        page.locator("#detail").get_by_role("button", name="Inspect").click()
        page.wait_for_selector(".spectra canvas")
        page.locator(".heat-cell[data-has=true]").nth(40).hover()
        page.wait_for_timeout(400)
        save(page.screenshot(), out / "dashboard-inspect.png")


def side_by_side(*shots: bytes) -> bytes:
    """Pictures of one height in a row."""
    images = [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]
    gap = 40
    row = Image.new("RGB", (sum(i.width for i in images) + gap * (len(images) - 1), images[0].height), "#ffffff")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    buffer = io.BytesIO()
    row.save(buffer, "png")
    return buffer.getvalue()


def save(shot: bytes, path: Path) -> None:
    """Write a shot as a PNG with a palette, of fewer colours until it is small enough. Raises ValueError if none is."""
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    for colours in (256, 128, 64, 32):
        palette = image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {colours} colours")  # noqa: T201 - a script's output
            return
    raise ValueError(f"{path} stays above {MOST_BYTES} bytes")


def main() -> None:
    """All pictures, in the order in which the server's state allows them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch)) as stage, sync_playwright() as playwright:
        browser = launch(playwright)
        fill(stage)
        idle(browser, stage, out)
        with load(stage, HISTORY_S + 25, arguments.rate):
            under_load(browser, stage, out)
        trying(browser, stage, out)
        refused(browser, stage, out)
        detail(browser, stage, out)
        running_it(browser, stage, out)
        browser.close()


if __name__ == "__main__":
    main()
