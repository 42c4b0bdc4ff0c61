"""Labels on the page: of an image that is chosen, before a server of an encoder of images."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.e2e.conftest import running
from tests.images.tiny import file_of, make_image_adapter, make_image_model, part_of, picture

from .conftest import OpenPage

pytestmark = pytest.mark.slow


def test_an_image_that_is_chosen_gets_the_labels_of_two_adapters(open_page: OpenPage, tmp_path: Path) -> None:
    base = make_image_model("vit", tmp_path / "base")
    for seed, (name, labels) in enumerate({"animals": ["cat", "dog", "owl"], "moods": ["bad", "good"]}.items()):
        make_image_adapter(base, tmp_path / "adapters" / name, labels, seed=seed)
    shown = file_of(picture(3))
    settings = {
        "model": str(base), "adapters": str(tmp_path / "adapters"), "served_name": "vit", "port": 0, "dtype": "float32",
        "num_threads": 1, "data_dir": str(tmp_path / "data"),
    }  # fmt: skip
    with running(settings, tmp_path / "log") as server:
        page = open_page(server, tab="try", permissions=["clipboard-read", "clipboard-write"]).page
        page.locator("#try-mode").select_option("labels")
        expect(page.locator("#try-tokens")).to_be_hidden()
        page.locator("#try-image").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": shown})
        page.locator("#try-adapter").fill("animals")
        page.locator("#try-other").fill("moods")
        page.get_by_role("button", name="Run both").click()
        for pane, model, count in zip(page.locator(".pane").all(), ("animals", "moods"), (3, 2), strict=True):
            expect(pane.locator(".labels li")).to_have_count(count)
            expect(pane.locator(".answer-foot")).to_contain_text("17 tokens read")
            body = {"model": model, "input": [part_of(shown)]}
            found = httpx.post(f"{server.url}/v1/classify", json=body, timeout=60).json()["data"][0]["labels"]
            wanted = [f"{each['label']}{each['score']:.3f}" for each in found]
            assert pane.locator(".labels li").all_text_contents() == wanted
        page.get_by_role("button", name="Copy as curl").click()
        expect(page.locator(".toast").last).to_contain_text("Copied as curl")
        command: str = page.evaluate("navigator.clipboard.readText()")
        sent = json.loads(command.partition("-d '")[2].rpartition("'")[0])
        assert sent == {"model": "animals", "input": [part_of(shown)]}
        page.get_by_role("button", name="Copy as Python").click()
        expect(page.locator(".toast").last).to_contain_text("Copied as Python")
        program: str = page.evaluate("navigator.clipboard.readText()")
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
        assert (
            ast.literal_eval(ran.stdout)["data"][0]["labels"][0]["label"]
            == page.locator(".pane .labels li span").first.text_content()
        )
