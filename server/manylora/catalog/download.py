"""A version's files as a .tar.gz in PEFT layout, byte for byte as they came in."""

import gzip
import tarfile
import tempfile
from pathlib import Path
from typing import IO

from manylora.catalog.records import VersionRecord
from manylora.faults import file_errors
from manylora.identity import ADAPTER_FILES


def pack(folder: Path, version: VersionRecord, scratch: Path) -> IO[bytes]:
    """The archive as an open file at its beginning, without a name: it is gone when closed.

    The same version always packs to the same bytes. Weights hardly compress, so the fastest level is used. Raises
    StorageFull or StoreUnavailable.
    """
    with file_errors("The download cannot be packed"):
        return _pack(folder, version, scratch)


def _pack(folder: Path, version: VersionRecord, scratch: Path) -> IO[bytes]:
    created = version.created_s
    file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  the caller closes it, after sending
    try:
        with (
            gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=1, mtime=created) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name in ADAPTER_FILES:
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.mode = (folder / name).stat().st_size, created, 0o644
                with (folder / name).open("rb") as source:
                    tar.addfile(info, source)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file
