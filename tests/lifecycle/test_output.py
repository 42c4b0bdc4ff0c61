import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.output import (
    atomic_folder,
    recover,
    refuse_existing,
    report_folder,
    result_and_report,
    safetensors_as_os_errors,
    write_json,
)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def _write(out: Path, text: str, *, fails: bool = False) -> None:
    with atomic_folder(out) as draft:
        (draft / "a.json").write_text(text)
        if fails:
            raise OSError


def _write_both(out: Path, *, fails: Exception | None) -> None:
    with result_and_report(out) as (result, report), safetensors_as_os_errors("the weights"):
        (result / "a").write_text("x")
        (report / "b").write_text("x")
        if fails:
            raise fails


def _dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


def test_failed_block_leaves_nothing_and_what_was_there(tmp_path: Path) -> None:
    _write(tmp_path / "out", "first")

    with pytest.raises(ManyloraError, match="could not be written"):
        _write(tmp_path / "out", "second", fails=True)

    assert _names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a.json").read_text() == "first"


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    _write(tmp_path / "out", "first")
    (tmp_path / "out" / "b.json").write_text("old")

    _write(tmp_path / "out", "second")

    assert _names(tmp_path) == ["out"]
    assert _names(tmp_path / "out") == ["a.json"]


def test_full_disk_is_told_from_other_failures_and_the_result_is_named(tmp_path: Path) -> None:
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(ManyloraError, match=r"/out could not be written: no space left"):
        _write_both(tmp_path / "out", fails=full)
    with pytest.raises(ManyloraError, match=r"/out could not be written: the weights: broken"):
        _write_both(tmp_path / "out", fails=SafetensorError("broken"))
    assert _names(tmp_path) == []


def test_result_exists_only_with_its_report(tmp_path: Path) -> None:
    out = tmp_path / "out"

    with pytest.raises(ManyloraError):
        _write_both(out, fails=OSError())
    assert _names(tmp_path) == []
    _write_both(out, fails=None)
    assert _names(tmp_path) == ["out", "out.report"]


def test_what_a_killed_process_moved_aside_comes_back_and_its_drafts_go(tmp_path: Path) -> None:
    pid = _dead_pid()
    (tmp_path / f".out.{pid}.old").mkdir()
    (tmp_path / f".out.{pid}.old" / "a.json").write_text("precious")
    (tmp_path / f".out.{pid}.draft").mkdir()

    with pytest.raises(InvalidRequest, match="exists"):
        refuse_existing(tmp_path / "out", overwrite=False)

    assert _names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a.json").read_text() == "precious"


def test_drafts_of_a_living_process_stay(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as draft:
        recover(tmp_path / "out")
        (draft / "a.json").write_text("x")

    assert _names(tmp_path / "out") == ["a.json"]


@pytest.mark.parametrize("name", ["notes.odt", "folder"])
def test_folder_with_foreign_files_is_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "home" / name).mkdir(parents=True)

    with pytest.raises(InvalidRequest, match=f"holds {name}, which no command of manylora wrote"):
        refuse_existing(tmp_path / "home", overwrite=True)


def test_report_folder_with_foreign_files_is_never_replaced(tmp_path: Path) -> None:
    (report_folder(tmp_path / "out") / "thesis.tex").mkdir(parents=True)

    with pytest.raises(InvalidRequest, match=r"holds thesis.tex"):
        refuse_existing(tmp_path / "out", overwrite=False)


def test_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")

    with pytest.raises(InvalidRequest, match="is a file"):
        refuse_existing(tmp_path / "out", overwrite=True)
    with pytest.raises(InvalidRequest, match="cannot be made"):
        refuse_existing(tmp_path / "out" / "below", overwrite=False)


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_place_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="no name for a new folder"):
        refuse_existing(Path(name), overwrite=True)


def test_number_that_json_lacks_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert _names(tmp_path) == []
    write_json(tmp_path / "a.json", {"loss": 1.0})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.0}
