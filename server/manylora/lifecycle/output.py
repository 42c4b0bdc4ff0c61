"""Results that are either whole or absent: written beside their place, then renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from manylora.errors import InvalidRequest, ManyloraError


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raises InvalidRequest when `out` exists and may not be replaced, or its parent cannot be written."""
    if out.exists() and not overwrite:
        raise InvalidRequest(f"{out} exists. Choose another --out, or give --overwrite to replace it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise InvalidRequest(f"{out.parent} cannot be written.")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder to fill; it takes the name `out` when the block ends well, and goes when it does not.

    A full disk or any other failure to write becomes a ManyloraError.
    """
    draft = out.parent / f".{out.name}.{os.getpid()}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in sorted(draft.rglob("*")):
            if path.is_file():
                _sync(path)
        if out.is_dir():
            shutil.rmtree(out)
        draft.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise write_failed(out, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write one file whole or not at all. Raises ManyloraError when it cannot be written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        _sync(draft)
        draft.replace(path)
    except OSError as error:
        raise write_failed(path, error) from error
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


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
