"""Writes that survive a power cut, and folders that are removed."""

import os
import shutil
import time
from pathlib import Path
from typing import Final

_CHUNK_BYTES: Final = 2**20


def copy_durably(source: Path, target: Path) -> None:
    """Copy a regular file and push it to the disk."""
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
        writer.flush()
        os.fsync(writer.fileno())


def sync_folder(folder: Path) -> None:
    """Push a folder's entries (created, renamed, removed names) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(target: Path, data: bytes) -> None:
    """A new file with these bytes, on the disk."""
    with target.open("xb") as writer:
        writer.write(data)
        writer.flush()
        os.fsync(writer.fileno())


def remove_tree(folder: Path) -> None:
    """Remove a folder and what is in it; one that is gone already is fine."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_entry(entry: Path) -> None:
    """Remove a folder with what is in it, or whatever else has its name; what is gone already is fine."""
    if entry.is_dir() and not entry.is_symlink():
        remove_tree(entry)
    else:
        entry.unlink(missing_ok=True)


def clear_folder(folder: Path, *, older_than_s: float = 0.0) -> None:
    """Leave the folder in place and empty, but for what was changed within `older_than_s`."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        try:
            is_young = time.time() - entry.lstat().st_mtime < older_than_s
        except FileNotFoundError:  # another server's, and done with
            continue
        if is_young:
            continue
        remove_entry(entry)


def tree_bytes(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())
