"""Small things about files: the two files of an adapter, hashes of bytes, and writes that survive a power cut."""

import hashlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
ADAPTER_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE)
BLOB: Final = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class Orphan:
    """A blob that was set aside at `since`, in Unix seconds."""

    blob: str
    size_bytes: int
    since: float


def hash_file(path: Path) -> bytes:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def blob_of_folder(folder: Path) -> str:
    """The address of an adapter's bytes: the sha256 over the sha256 of its config and of its weights.

    Not the adapter's digest, which is that of the content: two files can hold the same tensors in other bytes,
    and a download must give back the bytes that came in.
    """
    return combine([hash_file(folder / name) for name in ADAPTER_FILES])


def combine(hashes: list[bytes]) -> str:
    return hashlib.sha256(b"".join(hashes)).hexdigest()


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


def folder_fault(folder: Path, blob: str) -> str | None:
    """What is wrong with the blob's two files in `folder`; None if they are those that the address was made from.

    Raises OSError where they are there and cannot be read.
    """
    # Looked at before they are opened: opening a pipe would wait for a writer.
    gone = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    try:
        found = "" if gone else blob_of_folder(folder)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        gone = ["a file"]  # until a moment ago it was there
    if gone:
        return f"{' and '.join(gone)} {'is' if len(gone) == 1 else 'are'} missing"
    return None if found == blob else "the bytes are not those that were stored"


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
