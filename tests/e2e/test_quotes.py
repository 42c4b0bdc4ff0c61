"""No answer and no log line gives back more of what was sent than a quote: tried over all routes and all places."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from manylora.errors import MAX_QUOTED

from .conftest import Server

pytestmark = pytest.mark.slow

# Sent in one piece, and in words that look quoted. What comes back is counted by its letter.
MARK = "ж"
SHAPES = {"piece": MARK * 4000, "words": f"{MARK} '{MARK}' " * 1000}
MOST_SAID = 1200
NAME = "adapter_config.json"
FILES = [("files", (NAME, b"{}")), ("files", ("adapter_model.safetensors", b"x"))]


def marked_headers(text: str) -> Iterator[dict[str, str]]:
    ascii_text = text.replace(MARK, "q")
    for name in (
        "authorization",
        "x-api-key",
        "content-type",
        "content-encoding",
        "origin",
        "x-request-id",
        "host",
        "cookie",
    ):
        yield {name: f"Bearer {ascii_text}".strip() if name == "authorization" else ascii_text.strip()}


def json_bodies(fields: list[str], text: str) -> Iterator[Any]:
    yield from (text, [text], {text: 1}, {text: text}, {text: {text: [text]}})
    for field in fields:
        for value in (text, [text], {text: text}, [{text: text}], {"type": text}, [{"role": text, "content": text}]):
            yield {"model": "tiny", field: value}
        yield {"model": "tiny", "prompt": "a", "messages": [{"role": "user", "content": "a"}], field: text}
    yield {"messages": [{"role": "user", "content": [{"type": text, "text": text}]}]}
    yield {"messages": [{"role": "user", "content": "a", text: text}]}


def forms(text: str) -> Iterator[dict[str, Any]]:
    for field in ("name", "description", "pinned", "activate", text):
        yield {"data": {"name": "fine", field: text}, "files": FILES}
    yield {"data": {"name": "fine"}, "files": [(text, ("a", b"x"))]}
    yield {"data": {"name": "fine"}, "files": [("files", (text, b"x"))]}
    yield {"data": {"name": "fine"}, "files": [("archive", (text, text.encode()))]}
    configs = (
        {text: text},
        {"peft_type": text},
        {"target_modules": [text]},
        {"rank_pattern": {text: text}},
        {"r": text},
    )
    for config in configs:
        yield {"data": {"name": "fine"}, "files": [("files", (NAME, json.dumps(config).encode())), FILES[1]]}


def requests_of(schema: dict[str, Any], text: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    schemas = schema["components"]["schemas"]
    fields = sorted({*schemas["CompletionRequest"]["properties"], *schemas["ChatRequest"]["properties"]})
    fields += ["source", "name", "lora_name", "lora_path", "description", "active_version", "pinned", "tools"]
    yield "GET", f"/{text}", {}
    yield "POST", "/", {"params": {text: text}}
    for path, methods in schema["paths"].items():
        for method in (name.upper() for name in methods):
            known = path.replace("{n}", "1")
            for part in ("{name}", "{model_id}"):
                known = known.replace(part, "small")
            for part in ("{name}", "{n}", "{model_id}"):
                if part in path:
                    yield method, path.replace(part, text).replace("{name}", "small").replace("{n}", "1"), {}
            for name in ("tenant", "limit", "after", "from", "to", "group_by", "timeline", text):
                if method != "DELETE":
                    yield method, known, {"params": {name: text}}
            yield "PUT", known, {"content": text.encode()}
            if method in ("POST", "PATCH"):
                yield method, known, {"content": text.encode(), "headers": {"content-type": "application/json"}}
                for body in json_bodies(fields if "completions" in path else fields[-8:], text):
                    yield method, known, {"json": body}
            if path == "/v1/adapters" and method == "POST":
                for form in forms(text):
                    yield method, known, form


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *strings_of(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner)


def most_marks(text: str) -> int:
    return max(text.count(MARK), text.count("\\u0436"), text.count("%D0%B6"))


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_quote_little(server: Server, shape: str) -> None:
    text, num_errors = SHAPES[shape], 0
    with httpx.Client(base_url=server.url, timeout=120) as client:
        schema = client.get("/openapi.json").json()
        for method, path, options in requests_of(schema, text):
            answer = client.request(method, path.replace(" ", "%20"), **options)
            assert answer.status_code < 500, (method, path[:80], answer.text[:500])
            if answer.status_code < 400:
                continue
            num_errors += 1
            error = answer.json()["error"]
            for said in strings_of(error):
                assert most_marks(said) <= MAX_QUOTED, (method, path[:80], str(options)[:200], said)
                assert len(said) <= MOST_SAID
        for headers in marked_headers(text):
            answer = client.get("/v1/models", headers=headers)
            assert answer.content.count(b"q") <= MAX_QUOTED + 40
            assert answer.headers["x-request-id"].count("q") == 0
    assert num_errors > 300


def test_log_lines_quote_little_too(server: Server) -> None:
    """After what the tests above sent."""
    log = Path(server.stderr).read_text(encoding="utf-8", errors="replace")
    for line in log.splitlines():
        assert most_marks(line) <= 2 * MAX_QUOTED, line[:500]
