"""`--adapters DIR`: finding PEFT folders, knowing at the next start which have not changed, registering the rest."""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manylora.catalog.defaults import not_used
from manylora.catalog.records import Folder, Published
from manylora.errors import InvalidAdapter, ManyloraError, StartupError
from manylora.identity import ADAPTER_FILES, CONFIG_FILE, OPTIONAL_FILES
from manylora.lora.format.folder import left_aside, names_in, warning_of

_TELL_EVERY: Final = 25
_CHECKPOINT: Final = re.compile(r"checkpoint-[0-9]+")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundFolder:
    """A PEFT folder. The stamp's fingerprint changes whenever a file is replaced or written to."""

    path: Path
    stamp: Folder

    @property
    def name(self) -> str:
        return self.path.name


def discover(root: Path, base: str) -> list[FoundFolder]:
    """Every folder at or below `root` with an adapter_config.json, by path; a Trainer's checkpoints of one are none.

    Raises StartupError without `root`. `base` goes into the fingerprints: for another base model every folder has to
    be looked at again.
    """
    if not root.is_dir():
        raise StartupError(f"--adapters {root} is not a folder.")
    found = sorted(config.parent for config in root.resolve().rglob(CONFIG_FILE))
    adapters = set(found)
    found = [folder for folder in found if not (_CHECKPOINT.fullmatch(folder.name) and folder.parent in adapters)]
    return [FoundFolder(folder, Folder(str(folder), f"{base[:16]}/{_fingerprint(folder)}")) for folder in found]


def _fingerprint(folder: Path) -> str:
    parts = []
    for name in ADAPTER_FILES:
        try:
            info = (folder / name).stat()
            parts.append(f"{info.st_size}:{info.st_mtime_ns}:{info.st_ino}")
        except FileNotFoundError:
            parts.append("missing")
    for name in OPTIONAL_FILES:
        with suppress(FileNotFoundError):  # of a folder without one the fingerprint is as it has always been
            info = (folder / name).stat()
            parts.append(f"{info.st_size}:{info.st_mtime_ns}:{info.st_ino}")
    return "/".join(parts)


async def register(
    root: Path,
    base: str,
    known: Callable[[], Mapping[str, tuple[Folder, bool]]],
    add: Callable[[FoundFolder], Awaitable[Published | None]],
) -> list[Published]:
    """Hand every new or changed folder to `add`; one that is refused is logged with all its problems."""
    found = await asyncio.to_thread(discover, root, base)
    before = await asyncio.to_thread(known)
    times = Counter(folder.name for folder in found)
    done = []
    wanted = sum(before.get(folder.stamp.path) != (folder.stamp, True) for folder in found)
    if wanted:
        _log.info("Looking at %d new or changed folders below %s: each is checked and tried on the base", wanted, root)
    num_looked_at = 0
    for folder in found:
        if times[folder.name] > 1:
            _log.error("Not registered: %s: another folder below %s has the same name", folder.path, root)
        elif before.get(folder.stamp.path) != (folder.stamp, True):
            try:
                added = await add(folder)
                done += [added] if added is not None else []
                _warn(folder)
            except ManyloraError as error:
                _log.error("Not registered: %s: %s", folder.path, error.message)
                for problem in error.problems if isinstance(error, InvalidAdapter) else []:
                    _log.error("  %s %s: %s", problem.code, problem.where, problem.message)
            num_looked_at += 1
            if num_looked_at % _TELL_EVERY == 0:
                _log.info("Looked at %d of %d folders", num_looked_at, wanted)
    return done


def _warn(folder: FoundFolder) -> None:
    """Log a report's warnings, since nobody reads reports at start."""
    said = warning_of(left_aside(not_used(folder.path, names_in(folder.path))))
    if said is not None:
        _log.warning("%s: %s", folder.path, said)


def say_kept(found: FoundFolder, known: Published | None) -> None:
    """A folder holds what was registered before: say so where another version is active."""
    if known is None:
        _log.warning(
            "Not registered: %s: '%s' had this content before, and that version was deleted. Upload it to have it back",
            found.path, found.name,
        )  # fmt: skip
    elif known.adapter.active_version != known.version.ref.version:
        _log.warning(
            "Not made active: %s holds what %s had, and version %s of it is active. To go back: "
            "manylora adapters promote %s",
            found.path, known.version.ref.label, known.adapter.active_version, known.version.ref.label,
        )  # fmt: skip
