"""Converted models in the user's cache: each folder is there as a whole or not at all, and checked at each use."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from manylora.errors import ModelUnusable

__all__ = ["ModelCache", "default_cache"]

MANIFEST = "manifest.json"
_PARTIAL = ".partial-"
_SAMPLES, _SAMPLE_BYTES = 32, 64 * 1024


def default_cache() -> "ModelCache":
    return ModelCache(Path(platformdirs.user_cache_dir("manylora")) / "models")


class ModelCache:
    """Folders under `root`, written by `build` once and found again by name.

    A folder is filled under another name, flushed to disk and then renamed, so a kill at any moment leaves
    nothing under its name. A lock keeps two starts from building the same one at once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, name: str, build: Callable[[Path], None], *, on_wait: Callable[[], None] = lambda: None) -> Path:
        """The folder `name`; where it is missing or damaged, `build` fills an empty one.

        `on_wait` is called once if another process is building it. Raises ModelUnusable where the cache
        cannot be written, and whatever `build` raises.
        """
        folder = self.root / name
        if is_whole(folder):
            return folder
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._alone(name, on_wait):
                if not is_whole(folder):
                    self._fill(folder, build)
        except OSError as error:
            raise ModelUnusable(
                f"The model cannot be saved in {self.root}: {error}. "
                "Make room or make the folder writable, or choose another one with XDG_CACHE_HOME."
            ) from error
        return folder

    @contextmanager
    def _alone(self, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
        lock = FileLock(self.root / f"{name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _fill(self, folder: Path, build: Callable[[Path], None]) -> None:
        for left_over in self.root.glob(f"{_PARTIAL}{folder.name}-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{folder.name}-", dir=self.root))
        try:
            build(partial)
            (partial / MANIFEST).write_text(json.dumps({"files": _digests(partial)}, indent=1), encoding="utf-8")
            for path in partial.rglob("*"):
                _flush(path)
            _flush(partial)
            if folder.exists():  # damaged
                shutil.rmtree(folder)
            partial.rename(folder)
            _flush(self.root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether the folder holds the files it was saved with. Reads samples of large files, so it takes milliseconds."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["files"] == _digests(folder))
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    """Of every file below the folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): sampled_digest(path) for path in files}


def sampled_digest(path: Path) -> str:
    """SHA-256 of a file's size and of 32 evenly spread pieces of 64 KiB, which is all of a file up to 2 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for n in range(_SAMPLES):
                file.seek(n * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of the whole file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
