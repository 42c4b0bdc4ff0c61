"""`manylora ask` against a running server, and in a terminal."""

import json
import os
import pty
import subprocess
import sys
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from manylora.cli.main import build
from tests.e2e.conftest import Server

pytestmark = pytest.mark.slow

HOW = ["--temperature", "0", "--max-tokens", "8"]


def ask(server: Server, *words: str, typed: str | None = None) -> Result:
    env = {"MANYLORA_URL": server.url, "MANYLORA_KEY": "", "COLUMNS": "200"}
    return CliRunner().invoke(build(), ["ask", *words, *HOW], env=env, input=typed)


def answer(server: Server, model: str, *said: str) -> str:
    """What the API itself answers to messages of user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8}
    text = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    return str(text)


def test_an_adapter_answers_as_over_http(server: Server) -> None:
    for name in ("small", "small@1"):
        found = ask(server, name, "What is it?")
        assert (found.exit_code, found.stdout) == (0, answer(server, "small", "What is it?") + "\n")


def test_base_is_the_base_and_the_question_may_come_from_a_pipe(server: Server) -> None:
    found = ask(server, "base", typed="What is it?")
    assert (found.exit_code, found.stdout) == (0, answer(server, "tiny", "What is it?") + "\n")


def test_several_are_compared(server: Server) -> None:
    found = ask(server, "small", "What is it?", "--compare", "large", "--compare", "base")
    parts = [
        f"{n}:\n{answer(server, m, 'What is it?')}\n"
        for n, m in (("small", "small"), ("large", "large"), ("base", "tiny"))
    ]
    assert found.stdout == "\n".join(parts)
    as_json = json.loads(ask(server, "small", "What is it?", "--compare", "base", "--json").stdout)
    assert [each["answer"] for each in as_json] == [answer(server, m, "What is it?") for m in ("small", "tiny")]
    assert [each["adapter"] and each["adapter"]["name"] for each in as_json] == ["small", None]
    assert all(each["usage"]["completion_tokens"] <= 8 and each["finish_reason"] for each in as_json)


def test_text_is_gone_on_with(server: Server) -> None:
    body = {"model": "small", "prompt": "Once", "temperature": 0, "max_tokens": 8}
    text = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
    assert ask(server, "small", "Once", "--raw").stdout == text + "\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nobody", "What?"], 4, "nobody"),
        (["small", "  "], 2, "no question"),
        (["small", "What?", "--raw", "--system", "Be brief."], 2, "--raw"),
        (["small", "What?", "--seed", str(10**30)], 2, "seed"),
    ],
)
def test_what_cannot_be_asked_ends_with_a_line_and_a_code(
    words: list[str], code: int, said: str, server: Server
) -> None:
    found = ask(server, *words)
    assert found.exit_code == code
    assert said in found.stderr
    assert "Traceback" not in found.output


def test_no_server_is_said_so(server: Server) -> None:
    env = {"MANYLORA_URL": "http://127.0.0.1:9"}
    found = CliRunner().invoke(build(), ["ask", "small", "What?"], env=env)
    assert found.exit_code == 8
    assert "MANYLORA_URL" in found.stderr


def test_a_terminal_holds_a_conversation(server: Server) -> None:
    """Each question comes with what was said before it; an empty line ends."""
    first = answer(server, "small", "One?")
    second = answer(server, "small", "One?", first, "Two?")
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "manylora", "ask", "small", *HOW]
    env: dict[str, Any] = {**os.environ, "MANYLORA_URL": server.url, "TERM": "dumb", "COLUMNS": "200"}
    with subprocess.Popen(words, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        os.write(ours, b"One?\nTwo?\n\n")
        said, _ = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0
    text = said.decode()
    assert first in text
    assert second in text.split(first, 1)[1]
