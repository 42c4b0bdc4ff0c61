"""The first level of a stranger's JSON, without the rest being built."""

import json
import random
import tracemalloc
from io import BytesIO
from typing import Any

import pytest

from manylora.lora.format import outline
from manylora.lora.format.outline import NoOutline, members_of, outline_of

MOST = 2**16
TEXTS = ("", "a", '"', "\\", '\\"', "[{", "}]", "\\\\", "你", "\n", ":", ",")


def anything(random_: random.Random, depth: int) -> Any:
    kind = random_.randrange(6 if depth else 4)
    if kind == 4:
        return [anything(random_, depth - 1) for _ in range(random_.randrange(4))]
    if kind == 5:
        names = ["".join(random_.choices(TEXTS, k=2)) for _ in range(random_.randrange(4))]
        return {name: anything(random_, depth - 1) for name in names}
    return (None, random_.random(), -7, "".join(random_.choices(TEXTS, k=4)))[kind]


@pytest.mark.parametrize("chunk", [1, 7, 2**16])
def test_members_are_those_of_a_parser(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outline, "_CHUNK_BYTES", chunk)
    random_, num_inner = random.Random(chunk), 0
    for number in range(200):
        whole = {f'k{index}"\\': anything(random_, 4) for index in range(random_.randrange(6))}
        text = json.dumps(whole, ensure_ascii=bool(number % 2), indent=(None, 2)[number % 3 == 0]).encode()
        found = members_of(outline_of(BytesIO(text), MOST))
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            if isinstance(value, list | dict):
                begin, end = found[name]
                assert json.loads(text[begin:end]) == value
                num_inner += 1
            else:
                assert found[name] == value
    assert num_inner > 100


def test_of_a_name_that_occurs_twice_the_last_counts() -> None:
    assert members_of(outline_of(BytesIO(b'{"a": [1], "b": {}, "a": [2]}'), MOST)) == {"a": (25, 28), "b": (16, 18)}


@pytest.mark.parametrize(
    "text",
    [b"", b"3", b"[]", b'[["a", 1]]', b"{", b'{"a": [}', b'{"a": [{]}}', b'{"a": 1}]', b"{} {}", b'{"a": "\\"}',
     b'{"a": \xff}', b'"' * 9, b"{" * 99, b"\xef\xbb\xbf{}", b"\\"],
)  # fmt: skip
def test_what_is_no_object_is_a_value_error(text: bytes) -> None:
    with pytest.raises((NoOutline, json.JSONDecodeError, UnicodeDecodeError)):
        members_of(outline_of(BytesIO(text), MOST))


def test_what_lies_deeper_is_never_built_and_the_first_level_is_bounded() -> None:
    deep = BytesIO(b'{"a": [' + b",".join([b"[]"] * 1_000_000) + b'], "b": 3}')
    tracemalloc.start()
    try:
        assert members_of(outline_of(deep, MOST)) == {"a": (6, 3_000_007), "b": 3}
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20  # a million lists take fifteen times as much
    finally:
        tracemalloc.stop()
    with pytest.raises(NoOutline, match="first level"):
        outline_of(BytesIO(b'{"a": 1' + b',"a":[]' * MOST), MOST)
