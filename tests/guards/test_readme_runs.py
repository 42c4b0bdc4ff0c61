"""The README's quick start, typed in against a real server on the default model and the shipped adapters."""

import os
import re
import subprocess
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"


def curls() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block.strip() for block in blocks if block.startswith("curl ")]


def type_in(command: str, server: str) -> httpx.Response:
    """Run a curl of the README; its status goes where `-w` says."""
    done = subprocess.run(
        ["bash", "-c", f"{command.replace(ADDRESS, server)} -w '\\n%{{http_code}}'"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "no_proxy": "127.0.0.1"},
    )
    body, _, status = done.stdout.rpartition("\n")
    return httpx.Response(int(status), text=body)


def test_the_readme_shows_a_question_and_an_upload() -> None:
    assert [re.findall(r"/v1/[\w/]+", curl)[0] for curl in curls()] == ["/v1/chat/completions", "/v1/adapters"]


@pytest.mark.slow
def test_the_first_curl_is_answered_by_the_adapter(server: str) -> None:
    answer = type_in(curls()[0], server)

    body = answer.json()
    assert answer.status_code == 200, body
    assert body["manylora"]["adapter"]["name"] == "sql"
    assert body["choices"][0]["message"]["content"].startswith("SELECT")


@pytest.mark.slow
def test_the_upload_makes_an_adapter_that_answers(server: str) -> None:
    uploaded = type_in(curls()[1], server)

    assert uploaded.status_code == 201, uploaded.text
    name = uploaded.json()["name"]
    answer = type_in(curls()[0].replace('"model": "sql"', f'"model": "{name}"'), server)
    assert answer.json()["choices"][0]["message"]["content"].startswith("SELECT")


@pytest.mark.slow
def test_the_pages_named_in_the_readme_are_there(server: str) -> None:
    for path in ("/dashboard", "/docs", "/metrics"):
        assert httpx.get(f"{server}{path}").status_code == 200, path
