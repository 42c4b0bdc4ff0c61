"""Data in several files: what `datasets` saves to disk, and the files of a data set's repository."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from manylora.cli.main import build
from manylora.client.server import connect
from manylora.errors import InvalidRequest
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.data.files import Reading, bytes_of
from manylora.lifecycle.data.upload import upload_data
from tests.lifecycle.helpers import write_rows

ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "six", "ten", "我")]


def stream(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As `datasets` writes a file: a stream of batches."""
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def saved(folder: Path, rows: list[dict[str, Any]], *, parts: int = 2) -> Path:
    """As `Dataset.save_to_disk` does it; the files' names come in no order that says anything."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{parts:05}.arrow" for n in range(parts)]
    for number, name in enumerate(names):
        stream(folder / name, rows[number * len(rows) // parts : (number + 1) * len(rows) // parts])
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def questions(path: Path) -> list[tuple[int, str]]:
    return [(example.row, example.answer) for example in read_dataset(path).examples]


WANTED = [(n, row["completion"]) for n, row in enumerate(ROWS, start=1)]


def test_what_datasets_saved_is_read_in_its_order_through_all_files(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", ROWS)
    assert questions(one) == WANTED
    assert bytes_of(one) == b"".join(part.read_bytes() for part in sorted(one.glob("*.arrow")))
    saved(tmp_path / "both" / "train", ROWS)
    saved(tmp_path / "both" / "test", ROWS[:1])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert questions(tmp_path / "both" / "train") == WANTED
    with pytest.raises(InvalidRequest, match=r"several splits \(test, train\): give one, as .*both/test"):
        read_dataset(tmp_path / "both")
    with pytest.raises(InvalidRequest, match=r"row 3: missing completion"):
        read_dataset(saved(tmp_path / "bad", [*ROWS[:2], {"prompt": "x", "completion": None}]))


def test_files_of_a_repository_are_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, part in enumerate((ROWS[:2], ROWS[2:])):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(part), tmp_path / "data" / f"train-{number:05}-of-00002.parquet"
        )
    assert questions(tmp_path) == questions(tmp_path / "train") == WANTED
    write_rows(tmp_path / "data" / "test.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("A card.")
    assert questions(tmp_path / "test") == WANTED[:1]
    with pytest.raises(InvalidRequest, match="several splits"):
        read_dataset(tmp_path)
    with pytest.raises(InvalidRequest, match=r"must be a \.jsonl"):
        read_dataset(tmp_path / "valid")


def test_a_split_without_all_of_its_files_or_in_two_kinds_of_them_is_refused(tmp_path: Path) -> None:
    for name in ("part-00000-of-00003.jsonl", "part-00002-of-00003.jsonl", "both.jsonl", "both.json"):
        write_rows(tmp_path / name, ROWS)
    for split in ("part", "both"):
        with pytest.raises(InvalidRequest, match=rf"{split} is not one whole set of files \({split}"):
            read_dataset(tmp_path / split)
    write_rows(tmp_path / "part-00001-of-00003.jsonl", ROWS)
    assert len(read_dataset(tmp_path / "part")) == 3 * len(ROWS)


def test_a_row_that_no_file_can_hold_is_named_before_anything_goes_to_a_server(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"q": "a", "completion": "b"}\n{"q": "\\ud800", "completion": "b"}\n')
    with (
        connect("http://127.0.0.1:9", "") as server,
        pytest.raises(InvalidRequest, match=r"x\.jsonl: row 2 holds half a"),
    ):
        upload_data(server, tmp_path / "x.jsonl", None, Reading(columns=("prompt=q",)))


def test_a_folder_that_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="is a folder without rows"):
        read_dataset(tmp_path)
    for state in ('{"_data_files": [{"filename": "../x.arrow"}]}', '{"_data_files": []}', "[]", "no"):
        (tmp_path / "state.json").write_text(state)
        with pytest.raises(InvalidRequest, match=r"state\.json"):
            read_dataset(tmp_path)
    for content in (b"", b"ARROW1\0\0", stream(tmp_path / "x", ROWS).read_bytes()[:-300]):
        (tmp_path / "x.arrow").write_bytes(content)
        with pytest.raises(InvalidRequest, match=r"x\.arrow is not a readable Arrow file"):
            read_dataset(tmp_path / "x.arrow")


def test_the_look_before_training_takes_folders(tmp_path: Path) -> None:
    data = saved(tmp_path / "both" / "train", ROWS)
    held_out = saved(tmp_path / "both" / "test", ROWS[1:2], parts=1)
    found = CliRunner().invoke(build(), ["data", "check", str(data), "--eval", str(held_out), "--json"])
    assert found.exit_code == 0, found.output
    learnt, tested = json.loads(found.output)
    assert (learnt["rows"]["used"], tested["shared"]) == (5, {"count": 1, "rows": [1]})
