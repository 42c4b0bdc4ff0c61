"""Local copies of blobs that live in an object store: bounded, safe to lose."""

import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from manylora.faults import file_errors
from manylora.files import clear_folder, remove_entry, remove_tree, tree_bytes

_MAX_BYTES: Final = 16 * 2**30
# Whoever was given a folder reads it at once; this long it is left alone, whatever the budget says.
_IN_USE_S: Final = 300.0


class DownloadCache:
    """Folders by blob, the least recently handed out removed first once they exceed `max_bytes`. Thread-safe.

    Two threads that want the same blob download it once.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int = _MAX_BYTES,
        in_use_s: float = _IN_USE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._incoming = root / "incoming"
        self._max_bytes = max_bytes
        self._in_use_s = in_use_s
        self._clock = clock
        self._lock = threading.Lock()
        self._downloading: dict[str, threading.Lock] = {}
        self._sizes: dict[str, int] = {}
        self._handed_out: dict[str, float] = {}  # least recent first
        self.sweep()

    def folder(self, blob: str, download: Callable[[str, Path], None]) -> Path:
        """The blob's folder, filled by `download(blob, folder)` if it is not here yet."""
        with self._lock:
            guard = self._downloading.setdefault(blob, threading.Lock())
        with guard:
            target = self._root / blob
            if not target.is_dir():
                self._fetch(blob, target, download)
            self._note_use(blob, target)
        return target

    def _fetch(self, blob: str, target: Path, download: Callable[[str, Path], None]) -> None:
        staging = self._incoming / secrets.token_hex(8)
        try:
            with file_errors("The adapter's files cannot be kept here"):
                staging.mkdir(parents=True)
                download(blob, staging)
                remove_entry(target)  # a file that somebody put there
                staging.rename(target)
        finally:
            remove_tree(staging)

    def _note_use(self, blob: str, target: Path) -> None:
        size = tree_bytes(target)
        with self._lock:
            self._downloading.pop(blob, None)
            self._sizes[blob] = size
            self._handed_out.pop(blob, None)
            self._handed_out[blob] = self._clock()
            for old in self._over_budget():
                self._drop(old)

    def _over_budget(self) -> list[str]:
        total, oldest = sum(self._sizes.values()), []
        for blob, used in self._handed_out.items():
            if total <= self._max_bytes or self._clock() - used < self._in_use_s:
                break
            total -= self._sizes[blob]
            oldest.append(blob)
        return oldest

    def _drop(self, blob: str) -> None:
        self._sizes.pop(blob, None)
        self._handed_out.pop(blob, None)
        remove_entry(self._root / blob)

    def remove(self, blob: str) -> None:
        with self._lock:
            self._drop(blob)

    def sweep(self) -> None:
        """Forget interrupted downloads, and take stock of whole ones."""
        with file_errors("The folder for copies of the store cannot be used"), self._lock:
            clear_folder(self._incoming)
            for folder in self._root.iterdir():
                if folder != self._incoming and folder.name not in self._sizes:
                    self._sizes[folder.name] = tree_bytes(folder)
                    self._handed_out[folder.name] = self._clock() - self._in_use_s

    def check_integrity(self) -> None:
        with self._lock:
            assert self._sizes.keys() == self._handed_out.keys()
            assert {f.name for f in self._root.iterdir() if f != self._incoming} == self._sizes.keys()
