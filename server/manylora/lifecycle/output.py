"""Results that are either whole or absent: written beside their place, then renamed."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.parameters import InvalidParameter

# What is written here. `overwrite` replaces a folder of these and no other: a home as `out` would be lost.
_OURS = frozenset({".json", ".jsonl", ".safetensors", ".md", ".png", ".jinja", ".model", ".txt"})


def refuse_existing(out: Path, *, overwrite: bool, ours: frozenset[str] = _OURS) -> None:
    """Raises InvalidParameter when `out` exists and may not be replaced, or its parent cannot be written.

    A folder with files of other kinds than `ours` is never replaced. Also clears up what a killed command left.
    """
    if out.name in ("", ".."):
        raise InvalidParameter(f"`out` {out} is no name for a new folder. Give one, as in adapters/mine.")
    recover(out)
    recover(report_folder(out))
    if out.exists() and not overwrite:
        raise InvalidParameter(f"{out} exists. Choose another `out`, or give `overwrite` to replace it.")
    for folder in (out, report_folder(out)):
        if folder.exists():
            _refuse_foreign(folder, ours)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{out.parent} cannot be made: {error.strerror}.") from error
    if not os.access(out.parent, os.W_OK):
        raise InvalidRequest(f"{out.parent} cannot be written.")


def _refuse_foreign(out: Path, ours: frozenset[str]) -> None:
    if not out.is_dir():
        raise InvalidParameter(f"{out} is a file, and only folders are replaced. Choose another `out`.")
    foreign = sorted(p.name for p in out.iterdir() if p.is_dir() or p.suffix not in ours)
    if foreign:
        raise InvalidParameter(
            f"{out} holds {', '.join(foreign[:3])}, which no command of manylora wrote: it is not replaced. "
            "Choose another `out`."
        )


def recover(out: Path) -> None:
    """Undo what a killed process began: its drafts go, and what it had moved aside comes back."""
    for left in out.parent.glob(f".{out.name}.*.*"):
        pid, _, kind = left.name.removeprefix(f".{out.name}.").partition(".")
        if not pid.isdigit() or kind not in ("draft", "old") or psutil.pid_exists(int(pid)):
            continue
        if kind == "old" and not out.exists():
            left.rename(out)
        else:
            _remove(left)


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder to fill; it takes the name `out` when the block ends well, and goes when it does not.

    A full disk or any other failure to write becomes a ManyloraError. What had the name before is there until
    the new one is complete, whatever happens; see `recover`.
    """
    try:
        with _drafted(out) as draft:
            yield draft
    except OSError as error:
        raise write_failed(out, error) from error


@contextmanager
def _drafted(out: Path) -> Iterator[Path]:
    draft = out.parent / f".{out.name}.{os.getpid()}.draft"
    _remove(draft)
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in sorted(draft.rglob("*")):
            if path.is_file():
                _sync(path)
        _put(draft, out)
    finally:
        _remove(draft)


def _put(draft: Path, out: Path) -> None:
    aside = out.parent / f".{out.name}.{os.getpid()}.old"
    if out.is_dir():
        out.rename(aside)
    try:
        draft.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    _sync(out.parent)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file to write; it replaces `path` when the block ends well. Raises ManyloraError when it cannot."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        _sync(draft)
        draft.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise write_failed(path, error) from error
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write one file whole or not at all. Raises ManyloraError when it cannot be written."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Raises ManyloraError when it cannot be written, ValueError for a number that JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n")


def report_folder(out: Path) -> Path:
    """Beside the result, not in it: a folder in PEFT layout holds nothing that a strict reader would refuse."""
    return out.parent / f"{out.name}.report"


def runs_folder(out: Path) -> Path:
    """Beside the result: what other programs show of trainings, a run for each beginning, which no later one drops."""
    return out.parent / f"{out.name}.runs"


def checkpoint_path(out: Path) -> Path:
    """Of a training: beside its result, hidden, so that an interrupted one leaves nothing under the result's name."""
    return out.parent / f".{out.name}.checkpoint.safetensors"


@contextmanager
def result_and_report(out: Path) -> Iterator[tuple[Path, Path]]:
    """Drafts of the result and of its report, as `atomic_folder`. The report is put first, so no result lacks one."""
    try:
        with _drafted(out) as result, _drafted(report_folder(out)) as report:
            yield result, report
    except OSError as error:
        raise write_failed(out, error) from error


@contextmanager
def safetensors_as_os_errors(what: str) -> Iterator[None]:
    """The safetensors library's failures to write as OSErrors, with the number that its message ends in."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else None, f"{what}: {error}") from error


def write_failed(path: Path, error: OSError) -> ManyloraError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ManyloraError(f"{path} could not be written: no space left. Free some and run the command again.")
    return ManyloraError(f"{path} could not be written: {error.strerror or error}.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
