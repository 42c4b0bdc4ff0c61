"""A page of another site in a real browser: it chats where it is allowed to, and can do nothing where it is not."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from tests.e2e.conftest import Server, running

from .chromium import launch_with

pytestmark = pytest.mark.slow

PAGE = """<!doctype html><meta charset="utf-8"><title>elsewhere</title>
<form method="post" enctype="multipart/form-data" target="answer">
<input name="name" value="sql"><input type="file" name="files" multiple></form><iframe name="answer"></iframe>"""
CHAT = """async ({url, key, stream}) => {
  const headers = {"content-type": "application/json", "x-stainless-lang": "js", "x-stainless-retry-count": "0"};
  if (key) headers.authorization = `Bearer ${key}`;
  const body = JSON.stringify({model: "sql", stream, max_tokens: 6, messages: [{role: "user", content: "hi"}]});
  const answer = await fetch(`${url}/v1/chat/completions`, {method: "POST", headers, body});
  return {status: answer.status, text: await answer.text(), id: answer.headers.get("x-request-id"),
          adapter: answer.headers.get("x-manylora-adapter")};
}"""


class _Site(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args: object) -> None:
        pass


@contextmanager
def site(folder: Path) -> Iterator[str]:
    """Another origin, with one page."""
    (folder / "index.html").write_text(PAGE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Site, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_address[1]}"
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with site(tmp_path_factory.mktemp("site")) as url:
        yield url


@pytest.fixture
def elsewhere(browser: Browser, origin: str) -> Iterator[Page]:
    context = browser.new_context()
    page = context.new_page()
    page.goto(origin)
    yield page
    context.close()


@pytest.fixture(scope="module", params=["open", "keyed"])
def friendly(
    request: pytest.FixtureRequest,
    settings: dict[str, Any],
    keys: dict[str, str],
    origin: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, str | None]]:
    """A server that allows the site, and the key that it wants."""
    folder = tmp_path_factory.mktemp("friendly")
    is_keyed = request.param == "keyed"
    data = keys["folder"] if is_keyed else str(folder / "data")
    changes = {"data_dir": data, "allowed_origins": [origin]}
    with running(settings | changes, folder / "log") as server:
        yield server, keys["user"] if is_keyed else None


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_of_an_allowed_site_chats(elsewhere: Page, friendly: tuple[Server, str | None], stream: bool) -> None:
    server, key = friendly
    answer = elsewhere.evaluate(CHAT, {"url": server.url, "key": key, "stream": stream})
    assert answer["status"] == 200
    assert ("data: [DONE]" in answer["text"]) == stream
    assert answer["adapter"] == "sql@1"
    assert answer["id"]


def test_it_reads_errors_too(elsewhere: Page, friendly: tuple[Server, str | None]) -> None:
    server, key = friendly
    if key is not None:
        answer = elsewhere.evaluate(CHAT, {"url": server.url, "key": "wrong", "stream": False})
        assert answer["status"] == 401
        assert "invalid_api_key" in answer["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_of_any_other_site_gets_no_answer(elsewhere: Page, server: Server, stream: bool) -> None:
    before = server.stats()["totals"]["requests"]
    result = elsewhere.evaluate(
        f"async (a) => {{ try {{ return await ({CHAT})(a) }} catch (e) {{ return e.name }} }}",
        {"url": server.url, "key": None, "stream": stream},
    )
    assert result == "TypeError"
    assert server.stats()["totals"]["requests"] == before


def test_a_form_of_another_site_replaces_no_adapter(elsewhere: Page, server: Server, folders: dict[str, Path]) -> None:
    before = httpx.get(f"{server.url}/v1/adapters/sql").json()
    names = ("adapter_config.json", "adapter_model.safetensors")
    elsewhere.set_input_files("input[type=file]", [folders["spare"] / name for name in names])
    with elsewhere.expect_response(f"{server.url}/v1/adapters") as answered:
        elsewhere.evaluate(
            "url => { const f = document.forms[0]; f.action = url; f.submit() }", f"{server.url}/v1/adapters"
        )
    assert answered.value.status == 403
    assert httpx.get(f"{server.url}/v1/adapters/sql").json() == before


def test_a_host_name_that_was_made_to_lead_here_is_refused(browser: Browser, server: Server) -> None:
    rebound = launch_with(browser.browser_type, "MAP evil.example 127.0.0.1")
    port = server.url.rpartition(":")[2]
    page = rebound.new_page()
    for path in ("dashboard", "v1/adapters", "v1/adapters/sql/versions/1/download"):
        answer = page.goto(f"http://evil.example:{port}/{path}")
        assert answer is not None
        assert answer.status == 403
        assert "cross_site" in page.content()
    rebound.close()
