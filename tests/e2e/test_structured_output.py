"""docs/structured-output.md against a real server: each example is sent as it stands there, and does what it says."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.e2e.conftest import Server, running
from tests.grammars.schemas import check_conforms, random_schema

PAGE = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text(encoding="utf-8")
BODIES = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)]
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
NAME = "smollm2-135m-instruct"
TRIES = 20  # a model of random weights may write until there is no room


@pytest.fixture(scope="module")
def server(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As the page has it: the base under its usual name."""
    folder = tmp_path_factory.mktemp("structured")
    changes = {"served_name": NAME, "data_dir": str(folder / "data")}
    with running({**settings, **changes}, folder / "log") as server:
        yield server


def whole(server: Server, body: dict[str, Any]) -> str:
    """An answer that was not cut, with whatever seed."""
    route = "chat/completions" if "messages" in body else "completions"
    for seed in range(TRIES):
        response = httpx.post(f"{server.url}/v1/{route}", json={**body, "seed": seed}, timeout=120)
        assert response.status_code == 200, response.text
        [choice] = response.json()["choices"]
        if choice["finish_reason"] == "stop":
            text = choice["message"]["content"] if "messages" in body else choice["text"]
            return str(text)
    pytest.fail("every answer was cut")


def check(body: dict[str, Any], text: str) -> None:
    wanted = body.get("structured_outputs", {})
    if "choice" in wanted:
        assert text in wanted["choice"]
    elif "regex" in wanted:
        assert re.fullmatch(wanted["regex"], text)
    elif "grammar" in wanted:
        assert re.fullmatch("SELECT (name|age) FROM users( WHERE (name|age) > [1-9][0-9]?)?", text)
    else:
        check_conforms(body["response_format"]["json_schema"]["schema"], text)


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_an_example_of_the_page_answers_as_it_says(number: int, server: Server) -> None:
    body = BODIES[number]
    if body.get("response_format", {}).get("type") == "structural_tag":
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
        assert response.status_code == 200, response.text
        return
    check(body, whole(server, body))


def test_the_page_has_an_example_of_each_way() -> None:
    assert len(BODIES) == 5
    assert len(PYTHON) == 1


def test_the_python_of_the_page_gets_an_object_of_its_class(server: Server) -> None:
    found: dict[str, Any] = {}
    source = PYTHON[0].replace("http://127.0.0.1:8000", server.url)
    for seed in range(TRIES):
        try:
            exec(source.replace("response_format=Ticket", f"response_format=Ticket, seed={seed}"), found)
        except openai.LengthFinishReasonError:
            continue
        assert type(found["ticket"]).__name__ == "Ticket"
        assert found["ticket"].topic in ("billing", "delivery", "other")
        return
    pytest.fail("every answer was cut")


class Label(BaseModel):
    """What a classifier says."""

    label: Literal["good", "bad"]


def test_a_stream_says_the_same_as_a_whole_answer(server: Server) -> None:
    client = server.client()
    how: dict[str, Any] = {
        "model": "small",
        "messages": [{"role": "user", "content": "Good or bad?"}],
        "seed": 3,
        "extra_body": {"structured_outputs": {"json": Label.model_json_schema(), "disable_any_whitespace": True}},
    }
    answer = client.chat.completions.create(**how)
    events = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == answer.choices[0].message.content
    assert Label.model_validate_json(text)
    assert events[-2].choices[0].finish_reason == answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert len([e for e in events if e.choices]) < answer.usage.completion_tokens  # what must come came together


def test_many_tenants_of_the_batch_each_with_a_schema_and_an_adapter(server: Server) -> None:
    def ask(number: int) -> tuple[dict[str, Any], str, str]:
        schema = random_schema(number)
        body = {
            "model": [NAME, "small", "middle", "large"][number % 4],
            "prompt": "As JSON: ",
            "max_tokens": 400,
            "seed": number,
            "guided_json": schema,
        }
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=240)
        assert response.status_code == 200, response.text
        [choice] = response.json()["choices"]
        return schema, choice["text"], choice["finish_reason"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(2000, 2032)))
    whole = [(schema, text) for schema, text, reason in answers if reason == "stop"]
    assert len(whole) > 24
    for schema, text in whole:
        check_conforms(schema, text)


def test_hostile_grammars_are_refused_while_others_are_answered(server: Server) -> None:
    hostile: list[dict[str, Any]] = [
        {"guided_regex": "(a?){500}a{500}"},
        {"guided_regex": "a?" * 20_000},
        {"guided_grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(9000)) + 'r9000: "a"'},
        {"guided_json": {"type": "object", "properties": {f"k{i}": {} for i in range(6000)}}},
    ]
    url = f"{server.url}/v1/completions"

    def attack(fields: dict[str, Any]) -> httpx.Response:
        return httpx.post(url, json={"model": NAME, "prompt": "x", **fields}, timeout=240)

    with ThreadPoolExecutor(4) as pool:
        attacks = [pool.submit(attack, fields) for fields in hostile]
        answer = httpx.post(url, json={"model": NAME, "prompt": "x", "max_tokens": 30, "ignore_eos": True}, timeout=240)
    assert answer.json()["usage"]["completion_tokens"] == 30
    for future, fields in zip(attacks, hostile, strict=True):
        error = future.result().json()["error"]
        assert (error["code"], error["param"]) == ("invalid_grammar", next(iter(fields)))
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_requests_with_a_grammar_are_counted(server: Server) -> None:
    body = {"model": NAME, "prompt": "x", "structured_outputs": {"choice": ["counted"]}}

    def counted() -> dict[str, float]:
        text = httpx.get(f"{server.url}/metrics").text
        found = re.findall(r'structured_requests_total\{cache="(\w+)",kind="choice"\} ([\d.]+)', text)
        return {cache: float(number) for cache, number in found}

    before = counted()
    for _ in range(3):
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
        assert response.json()["choices"][0]["text"] == "counted"
    after = counted()
    assert after["miss"] - before.get("miss", 0) == 1
    assert after["hit"] - before.get("hit", 0) == 2
    assert 'grammar_compile_seconds_count{result="ok"}' in httpx.get(f"{server.url}/metrics").text
