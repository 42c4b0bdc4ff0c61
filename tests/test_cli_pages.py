"""The command line shows what comes in pages for whole."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner

from manylora.cli.main import build

COUNTS = {
    "requests": 1, "outcomes": {"ok": 1}, "prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0,
    "slot_seconds": 0.0, "stored_bytes": 0, "stored_byte_hours": 0.0,
}  # fmt: skip
USAGE_PAGES = {"": ["ann", "bob"], "2": ["cid", "dan"], "4": ["eve"]}
VERSION_PAGES: dict[str, tuple[list[int], int | None]] = {"": ([1, 5, 6], 5), "5": ([3, 4], 3), "3": ([1, 2], None)}


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(asked.query).items()}
        body = json.dumps(_usage(query) if asked.path == "/v1/usage" else _adapter(query)).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


def _usage(query: dict[str, str]) -> dict[str, Any]:
    after = query.get("after", "")
    rows = [{"tenant": name, **COUNTS} for name in USAGE_PAGES[after]]
    last = str(int(after or 0) + len(rows))
    return {"group_by": ["tenant"], "data": rows, "total": COUNTS, "last_id": last, "has_more": last in USAGE_PAGES}


def _adapter(query: dict[str, str]) -> dict[str, Any]:
    numbers, next_before = VERSION_PAGES[query.get("before", "")]
    facts = {"rank": 8, "size_bytes": 1, "tier": "disk", "digest": "0" * 64, "created": 0, "status": "ready"}
    report = {"base_model_differs": False, "base_model": None}
    versions = [{"version": number, "active": number == 1, "report": report, **facts} for number in numbers]
    named = {"name": "x", "tenant": query["tenant"], "description": ""}
    return {**named, "versions": versions, "next_before": next_before}


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def run(url: str, *words: str) -> str:
    result = CliRunner().invoke(build(), list(words), env={"MANYLORA_URL": url, "MANYLORA_KEY": "", "COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_usage_has_the_rows_of_every_page(url: str) -> None:
    answer = json.loads(run(url, "usage", "--group-by", "tenant", "--json"))
    assert [row["tenant"] for row in answer["data"]] == ["ann", "bob", "cid", "dan", "eve"]
    csv = run(url, "usage", "--group-by", "tenant", "--csv").splitlines()
    assert [line.partition(",")[0] for line in csv] == ["tenant", "ann", "bob", "cid", "dan", "eve"]


def test_an_adapter_is_shown_with_the_versions_of_every_page(url: str) -> None:
    answer = json.loads(run(url, "adapters", "show", "x", "--tenant", "acme", "--json"))
    assert [version["version"] for version in answer["versions"]] == [1, 2, 3, 4, 5, 6]
    assert "next_before" not in answer
    shown = run(url, "adapters", "show", "x", "--tenant", "acme")
    assert [line.split()[0] for line in shown.splitlines() if line[:1].isdigit()] == list("123456")
