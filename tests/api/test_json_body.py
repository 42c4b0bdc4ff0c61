"""A body is counted before it is parsed: never too little, never more than it holds, whatever stands in its strings."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.api import json_body
from manylora.api.json_body import MAX_CONTAINERS, MAX_DEPTH, MAX_STRINGS, MAX_VALUES, parse_json
from manylora.errors import InvalidRequest

from .conftest import Rig

TEXTS = st.text(alphabet=st.sampled_from('ab"\\[]{},:\n é🙂'), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=25,
)


def census(value: Any, depth: int = 0) -> dict[str, int]:
    """Counted on the parsed value: depth, containers, strings, and commas (the members after a container's first)."""
    total = {"depth": depth, "containers": 0, "strings": 0, "commas": 0}
    if isinstance(value, str):
        total["strings"] = 1
    if isinstance(value, dict | list):
        members = [*value, *value.values()] if isinstance(value, dict) else value
        found = [census(member, depth + 1) for member in members]
        total = {
            "depth": max([depth + 1, *(f["depth"] for f in found)]),
            "containers": 1 + sum(f["containers"] for f in found),
            "strings": sum(f["strings"] for f in found),
            "commas": max(0, len(value) - 1) + sum(f["commas"] for f in found),
        }
    return total


@given(VALUES, st.booleans(), st.integers(2, 9))
def test_the_count_of_the_bytes_is_the_count_of_the_value(value: Any, ascii_only: bool, chunk: int) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    count = json_body._Count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "_CHUNK_BYTES", chunk)  # every cut, in the middle of escapes too
        count.check(body)

    seen = {
        "depth": count._deepest,
        "containers": count._num_containers,
        "strings": count._num_quotes // 2,
        "commas": count._num_commas,
    }
    assert seen == census(orjson.loads(body))


TOO_MUCH = {
    "nesting": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "levels of nesting"),
    "nesting that is never closed": (b'{"a":' * 100_000, "levels of nesting"),
    "objects": (b"[" + b"{}," * MAX_CONTAINERS + b"{}]", "objects and arrays"),
    "arrays": (b"[" + b"[]," * MAX_CONTAINERS + b"[]]", "objects and arrays"),
    "strings": (b"[" + b'"a",' * MAX_STRINGS + b'"a"]', "strings"),
    "keys": (b"{" + b",".join(b'"%x":1' % i for i in range(MAX_STRINGS + 1)) + b"}", "strings"),
    "numbers": (b"[" + b"1," * (MAX_VALUES + 1) + b"1]", "values"),
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_too_much_is_refused_without_being_parsed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, what = TOO_MUCH[kind]
    monkeypatch.setattr(orjson, "loads", None)

    with pytest.raises(InvalidRequest, match=what):
        parse_json(body)


@pytest.mark.parametrize(
    "text", ['",' * 1_100_000, "\\" * 300_001, "[" * 300_000, '\\"' * 200_000, "[{,:" * 300_000], ids=lambda t: t[:3]
)
def test_a_text_may_hold_anything(text: str) -> None:
    body = orjson.dumps({"prompt": [text, text]})

    assert parse_json(body) == {"prompt": [text, text]}


@pytest.mark.parametrize("body", [b"[" + b"1," * MAX_VALUES + b"1]", b"[" * MAX_DEPTH + b"]" * MAX_DEPTH])
def test_what_is_at_the_bound_is_taken(body: bytes) -> None:
    assert parse_json(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "base-model", "messages": [' + b"1," * 500_000 + b"1]}",
        b'{"model": "base-model", "messages": [' + b'{"role":"user","content":"a"},' * 30_000 + b"1]}",
        b'{"model": "base-model", "messages": [{"role": "user", "content": "a",'
        + b",".join(b'"k%d":1' % i for i in range(100_000))
        + b"}]}",
        b'{"model": "base-model", "messages": [{"role": "user", "content": ['
        + b'{"type":"text"},' * 30_000
        + b'{"type":"text"}]}]}',
        b'{"model": "base-model",' + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}",
        b'{"model": "base-model", "messages": [], "logit_bias": {'
        + b",".join(b'"k%d":1' % i for i in range(100_000))
        + b"}}",
        b'{"model": "base-model", "messages": [], "stop_token_ids": [' + b'"a",' * 100_000 + b"1]}",
        b'{"model": "base-model", "messages": [], "metadata": {"' + b"k" * 1_000_000 + b'": 1}}',
        b'{"model": "base-model", "messages": [{"role": "' + b"r" * 1_000_000 + b'", "content": "a"}]}',
        b'{"model": "base-model", "' + b"f" * 1_000_000 + b'": 1}',
        b'{"model": "' + b"m" * 1_000_000 + b'", "messages": [{"role": "user", "content": "a"}]}',
    ],
    ids=range(11),
)
def test_a_body_that_is_wrong_a_million_times_gets_one_short_answer(rig: Rig, body: bytes) -> None:
    rig = Rig(rig.settings.model_copy(update={"max_body": 2**24}))

    answer = rig.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})

    assert answer.status_code in (400, 404)
    assert len(answer.content) < 1000
