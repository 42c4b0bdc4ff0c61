"""Asking on the page: two answers side by side, conversations, and requests to copy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Request, expect

from tests.e2e.conftest import Server

from .conftest import OpenPage, complete, upload

pytestmark = pytest.mark.slow
PROMPT = "The quick brown"


def test_the_base_answers_beside_the_adapter(open_page: OpenPage, server: Server) -> None:
    page = open_page(tab="try").page
    page.locator("#try-adapter").fill("sql")
    page.locator("#try-mode").select_option("completion")
    page.locator("#try-tokens").fill("24")
    page.locator("#try-prompt").fill(PROMPT)
    page.get_by_role("button", name="Run both").click()
    feet = page.locator(".answer-foot")
    for foot in (feet.first, feet.last):
        expect(foot).to_contain_text("24 tokens")
    texts = [pane.text_content() for pane in page.locator(".pane .answer").all()]
    assert texts == [complete(server.url, model, PROMPT) for model in ("sql", "tiny")]


def test_a_chat_with_a_missing_adapter_says_why(open_page: OpenPage) -> None:
    page = open_page(expected={404}, tab="try").page
    page.locator("#try-adapter").fill("nobody")
    page.locator("#try-prompt").fill(PROMPT)
    page.get_by_role("button", name="Run both").click()
    expect(page.locator(".pane").first.locator(".answer-foot")).to_contain_text("does not exist")
    expect(page.locator(".pane").last.locator(".answer-foot")).to_contain_text("tokens")


def test_two_versions_hold_a_conversation_that_can_be_copied(
    open_page: OpenPage, server: Server, folders: dict[str, Path]
) -> None:
    upload(server.url, folders["spare"], "talker")
    upload(server.url, folders["other"], "talker", activate="false")
    visit = open_page(permissions=["clipboard-read", "clipboard-write"], tab="try")
    page = visit.page
    expect(page.locator("#try-other")).to_have_value("tiny")
    expect(page.locator("#try-names option[value='talker@2']")).to_have_count(1)
    bodies: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/chat/completions"):
            bodies.append(json.loads(request.post_data or ""))

    page.on("request", note)
    page.locator("#try-adapter").fill("talker")
    page.locator("#try-other").fill("talker@2")
    page.locator("#try-system").fill("Be it's own.")
    page.locator("#try-tokens").fill("8")
    page.locator("#try-seed").fill("7")
    page.locator("#try-talk").check()
    for number, prompt in enumerate((PROMPT, "And 'then'?")):
        page.locator("#try-prompt").fill(prompt)
        page.locator("#try-prompt").press("Control+Enter")
        expect(page.locator(".asked")).to_have_count(2 * (number + 1))
        expect(page.locator("#try-form button[type=submit]")).to_be_enabled()
    expect(page.locator(".pane h3")).to_have_text(["Adapter: talker", "Adapter: talker@2"])
    for body, pane in zip(sorted(bodies[2:], key=lambda b: b["model"]), page.locator(".pane").all(), strict=True):
        first = pane.locator(".said").first.text_content()
        turns = [("system", "Be it's own."), ("user", PROMPT), ("assistant", first), ("user", "And 'then'?")]
        assert [(m["role"], m["content"]) for m in body["messages"]] == turns
        assert (body["seed"], body["max_tokens"], "top_p" in body) == (7, 8, False)
    page.locator("#try-prompt").fill("And 'then'?")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".asked")).to_have_count(0)
    page.locator("#try-adapter").fill("nobody")
    page.locator("#try-other").fill("")
    visit.expected = {404}
    page.locator("#try-prompt").press("Control+Enter")
    expect(page.locator(".answer-foot").first).to_contain_text("does not exist")
    expect(page.locator("#try-form button[type=submit]")).to_be_enabled()
    expect(page.locator("#try-prompt")).to_have_value("And 'then'?")
    page.locator("#try-adapter").fill("talker")
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator(".toast").last).to_contain_text("Copied")
    command: str = page.evaluate("navigator.clipboard.readText()")
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    answer = json.loads(ran.stdout)
    assert answer["model"] == "talker"
    page.get_by_role("button", name="Copy as Python").click()
    expect(page.locator(".toast").last).to_contain_text("Copied as Python")
    program: str = page.evaluate("navigator.clipboard.readText()")
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == answer["choices"][0]["message"]["content"].strip()


def test_a_copied_request_takes_the_key_from_the_environment(
    open_page: OpenPage, keyed_server: Server, keys: dict[str, str]
) -> None:
    visit = open_page(keyed_server, {401}, tab="try", permissions=["clipboard-read", "clipboard-write"])
    page = visit.page
    page.locator("#key-input").fill(keys["user"])
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#try-other")).to_have_value("tiny")
    page.locator("#try-prompt").fill(PROMPT)
    for kind, wanted in (("curl", "Bearer $MANYLORA_KEY"), ("Python", 'os.environ.get("MANYLORA_KEY"')):
        page.get_by_role("button", name=f"Copy as {kind}").click()
        expect(page.locator(".toast").last).to_contain_text(f"Copied as {kind}")
        text: str = page.evaluate("navigator.clipboard.readText()")
        assert wanted in text
        assert keys["user"] not in text
