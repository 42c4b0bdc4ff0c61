"""A SQLite file that was put beside a journal that is not its own, found before SQLite replays the one onto the other.

SQLite keeps the newest changes in `NAME-wal` and writes them into the file now and then. Nothing in either says that
they belong together: a journal that a killed server left is replayed, page by page, onto whatever file is beside it, a
restored backup too, and makes a mixture of both. What can be seen is that the file came later than the journal's last
change, and lacks it. A backup that is restored within seconds of the kill looks like a file of its own.
"""

import struct
from pathlib import Path
from typing import BinaryIO, Final

from manylora.errors import StartupError

__all__ = ["check_journal"]

# A file of its own is written just after its journal, when changes are taken over; this is far beyond any such delay.
_LATER_S: Final = 30.0
_HEADER: Final = struct.Struct(">4s2I4s8s8s")  # magic, version, page size, number of checkpoints, salts, checksum
_FRAME: Final = struct.Struct(">2I8s8s")  # page, pages of the file after a commit (0: no commit), salts, checksum


def check_journal(database: Path) -> None:
    """Raises StartupError where the journal is of another file than the one that lies there now. Changes nothing."""
    journal = database.with_name(f"{database.name}-wal")
    try:
        later_s = database.stat().st_ctime - journal.stat().st_ctime
        if later_s <= _LATER_S or not _has_changes(journal, database):
            return
    except OSError:  # there is none, or SQLite will say what is wrong with it
        return
    raise StartupError(
        f"{journal} holds changes that {database.name} lacks, and {database.name} was put there {later_s:.0f} s after "
        f"they were made: they seem to be of another database, and would be mixed into this one. If {database.name} is "
        f"a restored backup, delete {journal.name} and {database.name}-shm and start again. If it is not, run: "
        f"touch {journal}"
    )


def _has_changes(journal: Path, database: Path) -> bool:
    """Whether a committed page of the journal is another one in the file."""
    with journal.open("rb") as changes, database.open("rb") as pages:
        head = changes.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return False
        _, _, size, _, salts, _ = _HEADER.unpack(head)
        for number, offset in _committed(changes, size, salts).items():
            changes.seek(offset)
            pages.seek((number - 1) * size)
            if changes.read(size) != pages.read(size):
                return True
    return False


def _committed(changes: BinaryIO, size: int, salts: bytes) -> dict[int, int]:
    """Where the newest committed state of each page begins, by its number."""
    found: dict[int, int] = {}
    pending: dict[int, int] = {}
    place = _HEADER.size
    while True:
        changes.seek(place)
        head = changes.read(_FRAME.size)
        if len(head) < _FRAME.size:
            return found
        number, num_pages, of, _ = _FRAME.unpack(head)
        if of != salts:  # left from before the journal was begun again
            return found
        pending[number] = place + _FRAME.size
        if num_pages:
            found |= pending
            pending.clear()
        place += _FRAME.size + size
