"""Usage that the database has not taken yet, in a file of this machine, so that a kill takes nothing off a bill.

    <data_dir>/usage/<writer>.jsonl     one file for each process, one line for each batch, each synced to the disk

A batch has a number, and the database knows each writer's last one (`UsageStore`), so reading a batch again that had
been taken after all changes nothing.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from manylora.files import sync_folder
from manylora.usage.store import Batch

__all__ = ["Journal", "Numbered", "journal_of", "journals_of_others", "read_journal"]

Numbered = tuple[int, Batch]
_SUFFIX: Final = ".jsonl"
_log = logging.getLogger(__name__)


class Journal:
    """One process's file. Methods block and raise OSError; used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self.last = 0  # number of the last batch in it; 0 while it is empty

    def append(self, batches: Iterable[Numbered]) -> None:
        """Write a batch, durable on return. After an error the file holds what it held before."""
        batches = list(batches)
        is_new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            lines = b"".join(_line(batch) for batch in batches)
            try:
                _write(descriptor, lines)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, self.size_bytes)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            sync_folder(self.path.parent)
        self.size_bytes += len(lines)
        self.last = batches[-1][0]

    def replace(self, batches: Iterable[Numbered]) -> None:
        """Put `batches`, which sum up the file's usage in fewer lines, in the file's place, in one step."""
        fresh = Journal(self.path.with_suffix(".new"))
        fresh.path.unlink(missing_ok=True)
        fresh.append(batches)
        fresh.path.rename(self.path)
        sync_folder(self.path.parent)
        self.size_bytes, self.last = fresh.size_bytes, fresh.last

    def clear(self) -> None:
        """Remove the file, all of which the database has."""
        self.path.unlink(missing_ok=True)
        self.size_bytes = self.last = 0


def journal_of(folder: Path, writer: str) -> Journal:
    return Journal(folder / f"{writer}{_SUFFIX}")


def journals_of_others(folder: Path, writer: str) -> list[Path]:
    """What earlier processes on this data folder left, by name."""
    return sorted(path for path in folder.glob(f"*{_SUFFIX}") if path.stem != writer)


def read_journal(path: Path) -> list[Numbered]:
    """A journal's batches. A last line that was cut off is left out, since nobody was promised it."""
    found: list[Numbered] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                found.append(_parsed(line))
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                _log.error("Line %d of the usage journal %s cannot be read, and is left out: %s", number, path, error)
    return found


def _line(numbered: Numbered) -> bytes:
    number, batch = numbered
    usage = [[*key, *counts] for key, counts in batch.usage.items()]
    slots = [[*key, time_us] for key, time_us in batch.slots.items()]
    canaries = [[*key, *counts] for key, counts in batch.canaries.items()]
    return json.dumps({"batch": number, "usage": usage, "slots": slots, "canaries": canaries}).encode() + b"\n"


def _parsed(line: bytes) -> Numbered:
    entry: dict[str, Any] = json.loads(line)
    batch = Batch()
    for quarter, tenant, owner, adapter, outcome, *counts in entry["usage"]:
        batch.usage[quarter, tenant, owner, adapter, outcome] = [int(count) for count in counts]
    for quarter, tenant, adapter, time_us in entry["slots"]:
        batch.slots[quarter, tenant, adapter] = int(time_us)
    for canary, version, outcome, *counts in entry.get("canaries", ()):  # which earlier releases did not write
        batch.canaries[canary, version, outcome] = [int(count) for count in counts]
    return int(entry["batch"]), batch


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
