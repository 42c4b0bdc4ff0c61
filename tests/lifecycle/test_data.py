import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.data import read_dataset
from tests.lifecycle.helpers import write_rows

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_three_shapes_become_the_same_kind_of_example(tmp_path: Path) -> None:
    completion = read_dataset(write_rows(tmp_path / "a.jsonl", [{"prompt": "hi", "completion": "hello"}]))
    chat = read_dataset(write_rows(tmp_path / "b.jsonl", [{"messages": CHAT}]))
    label = read_dataset(write_rows(tmp_path / "c.jsonl", [{"text": "hi", "label": "hello"}]))

    assert completion.examples[0].messages == chat.examples[0].messages == label.examples[0].messages
    assert label.labels == ("hello",)
    assert completion.labels == ()


def test_csv_and_parquet_hold_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "我爱北京", "label": "北京"}, {"text": 'a "quoted", one', "label": "x"}]
    (tmp_path / "a.csv").write_text('text,label\n我爱北京,北京\n"a ""quoted"", one",x\n', encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    wanted = [e.messages for e in read_dataset(write_rows(tmp_path / "a.jsonl", rows)).examples]

    assert [e.messages for e in read_dataset(tmp_path / "a.csv").examples] == wanted
    assert [e.messages for e in read_dataset(tmp_path / "a.parquet").examples] == wanted


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x"}, "row 2: missing completion"),
        ({"prompt": "x", "completion": " "}, "row 2: completion is empty"),
        ({"prompt": 3, "completion": "y"}, "row 2: prompt must be a string, not int"),
        ({"prompt": None, "completion": None}, "row 2: missing prompt and completion"),
    ],
)
def test_faulty_row_is_named_with_its_fault(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}, row])

    with pytest.raises(InvalidRequest, match=words):
        read_dataset(path)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("no list", "must be a list"),
        (CHAT[:1], "must be a list of at least two"),
        ([*CHAT, {"role": "user", "content": "again"}], "last message must be the assistant's"),
        ([{"role": "king", "content": "x"}, CHAT[1]], r"messages\[0\].role must be one of"),
        ([{"role": "user"}, CHAT[1]], r"messages\[0\] must be an object"),
    ],
)
def test_faulty_chat_is_named_with_its_fault(tmp_path: Path, messages: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_dataset(write_rows(tmp_path / "a.jsonl", [{"messages": messages}]))


def test_every_faulty_row_is_named_up_to_ten(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}] + [{"prompt": "p"}] * 12)

    with pytest.raises(InvalidRequest) as caught:
        read_dataset(path)

    assert caught.value.message.count("missing completion") == 10
    assert "and 2 more rows" in caught.value.message


def test_row_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"}).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b'\n{"prompt": "\xff", "completion": "b"}\n')

    with pytest.raises(InvalidRequest, match="row 2 is not UTF-8"):
        read_dataset(tmp_path / "a.jsonl")


def test_row_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n', encoding="utf-8")

    with pytest.raises(InvalidRequest, match="row 2, column"):
        read_dataset(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("", encoding="utf-8")

    with pytest.raises(InvalidRequest, match="is empty"):
        read_dataset(tmp_path / name)


def test_unknown_fields_are_answered_with_those_that_are_needed(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="has the fields answer, question; needed are prompt and completion"):
        read_dataset(write_rows(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}]))


def test_one_class_only_is_refused_where_two_are_needed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": "same"}, {"text": "b", "label": "same"}])

    with pytest.raises(InvalidRequest, match="only the label 'same'"):
        read_dataset(path, min_labels=2)
    assert len(read_dataset(path)) == 2


def test_missing_file_unknown_kind_and_broken_parquet_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet")

    with pytest.raises(InvalidRequest, match="does not exist"):
        read_dataset(tmp_path / "missing.jsonl")
    with pytest.raises(InvalidRequest, match=r"must be a .jsonl, .csv or .parquet file"):
        read_dataset(tmp_path / "a.xlsx")
    with pytest.raises(InvalidRequest, match="not a readable parquet file"):
        read_dataset(tmp_path / "a.parquet")


def test_csv_row_with_too_many_columns_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,b\nc,d,e\n", encoding="utf-8")

    with pytest.raises(InvalidRequest, match="row 3 has more columns"):
        read_dataset(tmp_path / "a.csv")
