"""Small things about files: the two files of an adapter, hashes of bytes, and writes that survive a power cut."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manylora.identity import ADAPTER_FILES

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
