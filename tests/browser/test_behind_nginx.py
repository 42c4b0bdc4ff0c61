"""The whole server under a path of a real nginx: API, streams, uploads, pages; the path taken off, or passed on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.conftest import running

from .chromium import Visit, visiting
from .conftest import complete, upload
from .nginx import nginx_before, program

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["path taken off", "path passed on"])
def proxied(
    request: pytest.FixtureRequest, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The server's address behind nginx. Its streams show that they live all the time."""
    program()
    folder = tmp_path_factory.mktemp("proxied")
    passes_path_on = request.param == "path passed on"
    changes = {"data_dir": str(folder / "data"), "stream_keep_alive_s": 0.001}
    if passes_path_on:
        changes["root_path"] = "/llm"
    with (
        running(settings | changes, folder / "log") as server,
        nginx_before(server.url, folder / "nginx", passes_path_on=passes_path_on) as url,
    ):
        yield url


@pytest.fixture
def visit(browser: Browser, proxied: str) -> Iterator[Visit]:
    with visiting(browser, proxied) as visit:
        yield visit
        visit.check()


def test_openais_client_gets_whole_answers_streams_and_errors(proxied: str) -> None:
    client = openai.OpenAI(base_url=f"{proxied}/v1", api_key="unused", max_retries=0)
    body: dict[str, Any] = {"model": "sql", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**body).choices[0].message.content
    streamed = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**body, stream=True)]
    assert "".join(streamed) == whole
    assert {model.id for model in client.models.list()} >= {"tiny", "sql"}
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gone", prompt="hi")


def test_comments_of_a_silent_stream_come_through(proxied: str) -> None:
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 32, "stream": True}
    answer = httpx.post(f"{proxied}/v1/completions", json=body)
    assert ": keep-alive" in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_an_upload_and_a_download(proxied: str, folders: dict[str, Path]) -> None:
    version = upload(proxied, folders["other"], "through-nginx")
    answer = httpx.get(f"{proxied}/v1/adapters/through-nginx/versions/{version['version']}/download")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/gzip")
    assert httpx.delete(f"{proxied}/v1/adapters/through-nginx").status_code == 204


@pytest.mark.parametrize("start", ["", "/", "/dashboard", "/dashboard/"])
def test_the_dashboard_opens_from_wherever_one_begins(visit: Visit, start: str) -> None:
    visit.page.goto(f"{visit.url}{start}")
    expect(visit.page.locator("#health-text")).to_contain_text("Ready")
    visit.to("adapters")
    expect(visit.page.get_by_role("button", name="sql", exact=True).first).to_be_visible()
    visit.requests[:] = [url for url in visit.requests if url != visit.url]  # what was typed, without the slash


def test_the_dashboard_uploads_and_asks(visit: Visit, folders: dict[str, Path]) -> None:
    page = visit.open("adapters").page
    expect(page.locator("#upload-button")).to_be_visible()
    visit.drop(folders["spare"])
    page.get_by_role("button", name="Upload", exact=True).click()
    expect(page.locator("#upload")).to_contain_text("is ready and active")
    assert complete(visit.url, "sales-notes", "The quick") != ""
    visit.to("try")
    page.get_by_label("Prompt", exact=True).fill("The quick")
    page.locator("#try-form button[type=submit]").click()
    expect(page.locator("#try-panes")).to_contain_text("tokens")


@pytest.mark.parametrize("start", ["/docs", "/docs/"])
def test_the_documentation_asks_the_server(visit: Visit, start: str) -> None:
    page = visit.page
    page.goto(f"{visit.url}{start}")
    block = page.locator("#operations-operations-version_version_get")
    block.click()
    block.get_by_role("button", name="Try it out").click()
    block.get_by_role("button", name="Execute").click()
    expect(block.locator(".live-responses-table td.response-col_status:not(.col_header)").first).to_contain_text("200")
    assert f"{visit.url}/version" in visit.requests
