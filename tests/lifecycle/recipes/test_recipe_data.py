"""What the recipes' scripts make."""

import gzip
import json
import shutil
import sqlite3
from collections import Counter
from pathlib import Path

import jsonschema
import pytest

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.recipes import RECIPES, calls, city, devil, order_json, sentiment, sql, write_splits
from tests.lifecycle.recipes.conftest import EXCERPT, SplitsOf

NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name == "sentiment-en" else []) for name in RECIPES]


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_the_same_rows_and_another_seed_others(name: str, splits_of: SplitsOf) -> None:
    assert splits_of(name, 1) == splits_of(name, 1)
    assert splits_of(name, 1).train != splits_of(name, 2).train


@pytest.mark.parametrize("name", NAMES)
def test_no_question_is_in_two_splits(name: str, splits_of: SplitsOf) -> None:
    splits = splits_of(name)
    rows = [row for each in (splits.train, splits.valid, splits.test) for row in each]
    questions = [row.get("prompt") or row.get("text") or json.dumps(row["messages"][:2]) for row in rows]

    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("name", NAMES)
def test_written_splits_can_be_trained_and_scored_on(name: str, splits_of: SplitsOf, tmp_path: Path) -> None:
    splits = splits_of(name)

    write_splits(splits, tmp_path / "data")

    train, valid, test = (read_dataset(tmp_path / "data" / f"{part}.jsonl") for part in ("train", "valid", "test"))
    assert (len(train), len(valid), len(test)) == (len(splits.train), len(splits.valid), len(splits.test))
    assert set(valid.labels) <= set(train.labels) == set(test.labels)


def test_the_two_example_sentences_are_held_out_with_their_cities() -> None:
    splits = city.make(0)

    assert {"text": "我爱北京天安门", "label": "北京"} in splits.test
    assert {"text": "我爱上海东方明珠", "label": "上海"} in splits.test


def test_there_are_a_few_hundred_sentences_over_ten_cities() -> None:
    splits = city.make(0)
    counts = Counter(row["label"] for row in splits.train)

    assert len(counts) == 10
    assert 500 < len(splits.train) < 800
    assert len(splits.test) >= 200
    assert min(counts.values()) >= 60


def test_some_sights_of_the_test_never_occur_in_training() -> None:
    splits = city.make(0)
    seen = "".join(row["text"] for row in splits.train)

    assert any("小雁塔" in row["text"] for row in splits.test)
    assert "小雁塔" not in seen


def test_orders_say_what_their_answer_says() -> None:
    for row in order_json.make(0).test:
        answer = json.loads(row["completion"])

        assert list(answer) == ["item", "quantity", "color", "customer", "city"]
        for field in ("item", "color", "customer", "city"):
            assert answer[field] is None or answer[field] in row["prompt"]


def test_items_customers_and_cities_of_the_test_are_new() -> None:
    splits = order_json.make(0)

    for field in ("item", "customer", "city"):
        seen, asked = ({json.loads(row["completion"])[field] for row in rows} for rows in (splits.train, splits.test))
        assert seen & asked <= {None}


def test_functions_of_the_test_are_new_and_calls_are_of_functions_that_are_offered() -> None:
    assert {each.name for each in calls.TRAINED}.isdisjoint(each.name for each in calls.HELD_OUT)
    splits = calls.make(0)
    for rows, functions in ((splits.train, calls.TRAINED), (splits.test, calls.HELD_OUT)):
        by_name = {each.name: each.described()["function"]["parameters"] for each in functions}
        num_calls = 0
        for row in rows:
            system, _, answer, *rest = row["messages"]
            if answer["content"] == calls.NO_CALL:
                assert not rest
                continue
            called = json.loads(answer["content"].removeprefix("<tool_call>").removesuffix("</tool_call>"))
            assert f'"name": "{called["name"]}"' in system["content"]
            jsonschema.validate(called["arguments"], by_name[called["name"]])
            num_calls += 1
            if rest:
                result, said = rest
                assert said["content"].removeprefix("The answer: ") in result["content"]
        assert num_calls > len(rows) / 2


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_statement_runs_on_its_table(part: str) -> None:
    database = sqlite3.connect(":memory:")
    for table in sql.TRAIN_TABLES + sql.TEST_TABLES:
        database.execute(f"CREATE TABLE {table.name} ({', '.join((*table.texts, *table.numbers))})")

    for row in getattr(sql.make(0), part):
        database.execute(row["completion"])
    database.close()


def test_tables_of_the_test_are_new() -> None:
    assert {t.name for t in sql.TEST_TABLES}.isdisjoint(t.name for t in sql.TRAIN_TABLES)
    asked = {row["prompt"].split("(")[0].removeprefix("Table ") for row in sql.make(0).test}
    assert asked == {t.name for t in sql.TEST_TABLES}


def test_definitions_are_short_prose_without_marks_verse_and_references() -> None:
    found = devil.definitions(EXCERPT)

    assert list(found) == ["ACADEME", "ACADEMY", "ABDICATION", "ACCORDION"]
    assert found["ACADEMY"] == "Academy, n. A modern school where football is taught."


def test_another_file_is_not_taken_for_the_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "devil.txt"
    path.write_text(EXCERPT)

    with pytest.raises(InvalidRequest, match="not the dictionary file of dict-devil"):
        devil.make(0, path)


def test_dictionary_without_enough_definitions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "devil.dict.dz"
    path.write_bytes(gzip.compress(EXCERPT.encode()))

    with pytest.raises(InvalidRequest, match="holds 4 definitions"):
        devil.make(0, path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="the package comes through apt-get")
def test_debians_package_holds_the_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "devil.dict.dz"
    path.write_bytes(devil.download())

    splits = devil.make(0, path)

    assert len(splits.train) > 400
    assert len(splits.test) == 40


def test_another_archive_is_not_taken_for_the_ratings(tmp_path: Path) -> None:
    path = tmp_path / "vader.tar.gz"
    path.write_bytes(b"something else")

    with pytest.raises(InvalidRequest, match=r"not the source package of vaderSentiment==3\.3\.2"):
        sentiment.make(0, path)


@pytest.mark.slow
def test_sentiments_are_balanced_in_the_test(splits_of: SplitsOf) -> None:
    counts = Counter(row["label"] for row in splits_of("sentiment-en").test)

    assert counts == {"negative": 80, "neutral": 80, "positive": 80}
