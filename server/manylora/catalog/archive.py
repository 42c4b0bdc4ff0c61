"""Archives: an uploaded one is unpacked by rules, a version is packed for its download.

The adapter's two files are unpacked, from the root or from one folder. An archive that breaks one rule is refused as a
whole. Other members are named and not unpacked; the rules hold for them too. Sizes are counted while bytes flow, not
believed from headers.
"""

import gzip
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Final, Protocol, cast

from manylora.catalog.records import VersionRecord
from manylora.errors import InvalidAdapter, Problem, TooLarge
from manylora.faults import file_errors
from manylora.identity import (
    ADAPTER_FILES,
    BROUGHT_FILES,
    CARD_FILE,
    DEFAULTS_FILE,
    OWN_TOKENS_FILE,
    TEMPLATE_FILE,
    Vocabulary,
)
from manylora.lora.format.folder import NEEDED

_MAX_MEMBERS: Final = 1024
# Real weights hardly compress; all-zero ones do, so the ratio only counts from this size on.
_MAX_RATIO: Final = 100
_RATIO_FROM_BYTES: Final = 16 * 2**20
_CHUNK_BYTES: Final = 2**20
_MAX_NAME: Final = 128
# All headers and names of an honest archive together are shorter.
_MAX_HEADER_BYTES: Final = 2**20
_TAR_SLACK_BYTES: Final = 2**20  # headers, padding and end blocks around the members
_SHOWN: Final = 4
_ARCHIVE_SUFFIXES: Final = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")


@dataclass(frozen=True, slots=True)
class Member:
    """One entry, as the rules see it. `kind` is `file`, `folder`, or what it is instead."""

    name: str
    kind: str


# The folder itself, as `tar -C DIR .` names it.
_ROOT: Final = Member("", "folder")


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _HeadersTooLong(Exception):
    """The archive's headers are longer than those of any honest one."""


class _Guarded:
    """A seekable binary file for tarfile and zipfile, which read headers and directories whole into memory.

    Until `listed` is set, all reads together are bounded.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.listed = False
        self._file = file
        self._left = _MAX_HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        if self.listed:
            return self._file.read(size)
        data = self._file.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise _HeadersTooLong
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset < 0:  # of a member whose size is negative
            raise tarfile.ReadError("a size or an offset in it is negative")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def unpack(archive: Path, target: Path, *, max_bytes: int) -> list[str]:
    """Write the adapter's files into the folder `target`, and scratch beside it in its parent.

    Returns the names of the other members, relative to the adapter's folder where they lie in it. `max_bytes` bounds
    what comes out. Raises InvalidAdapter (`unsafe_archive`, with every member that breaks a
    rule), or TooLarge.
    """
    try:
        with archive.open("rb") as file:
            start = file.read(512)
        if start.startswith(b"PK"):
            return _unpack_zip(archive, target, max_bytes)
        if start.startswith(b"\x1f\x8b"):
            return _unpack_tar(
                _gunzip(archive, target.parent / "unzipped.tar", max_bytes + _TAR_SLACK_BYTES), target, max_bytes
            )
        if start[257:262] == b"ustar":
            return _unpack_tar(archive, target, max_bytes)
        raise _refused("This is not a .zip, .tar, .tar.gz or .tgz archive.")
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _refused(f"The archive cannot be read: {error}") from error
    except (NotImplementedError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise _refused(f"The archive uses a form that is not supported: {error}") from error
    except _HeadersTooLong as error:
        raise _refused("The archive's headers are longer than those of any honest one.") from error


def _refused(message: str, where: str = "archive") -> InvalidAdapter:
    return InvalidAdapter([Problem("unsafe_archive", where, message)])


def choose(members: list[Member]) -> tuple[dict[str, str], list[str]]:
    """The adapter's files, as names by member, and the names of the other members.

    Raises InvalidAdapter with everything that is wrong.
    """
    members = [member for member in members if member != _ROOT]
    problems = [p for member in members if (p := _member_problem(member)) is not None]
    files = [m.name for m in members if m.kind == "file"]
    if len(set(files)) < len(files):
        problems.append(Problem("unsafe_archive", "archive", "A member occurs twice: the archive is ambiguous."))
    home = _home(files, problems)
    if problems:
        raise InvalidAdapter(problems)
    wanted = {f"{home}{name}": name for name in BROUGHT_FILES if f"{home}{name}" in files}
    beside = [name.removeprefix(home) for name in files if wanted.get(name) in (None, TEMPLATE_FILE)]
    return wanted, beside  # whether a template is used is known when the defaults are read


def _home(files: list[str], problems: list[Problem]) -> str:
    """The folder of the adapter, with a slash, or "" for the root. What lies deeper is a checkpoint of it."""
    places = {name.removesuffix(file) for name in files for file in NEEDED if name == file or name.endswith(f"/{file}")}
    nearest = min((place.count("/") for place in places), default=0)
    homes = sorted(place for place in places if place.count("/") == nearest)
    if nearest > 1:
        message = "The adapter's files must lie at the archive's root or in one folder."
        problems.extend(Problem("unsafe_archive", ascii(home)[1:-1], message) for home in homes[:_SHOWN])
    elif len(homes) > 1:
        some = ", ".join(ascii(home)[1:-1] for home in homes[:_SHOWN])
        problems.append(Problem("unsafe_archive", "archive", f"It holds several adapters, in {some}: pack one."))
    return homes[0] if homes else ""


def _member_problem(member: Member) -> Problem | None:
    shown = ascii(member.name)[1:-1][:_MAX_NAME]
    parts = member.name.rstrip("/").split("/")
    message = None
    if member.name.startswith(("/", "\\")) or ":" in parts[0]:
        message = "Member names must be relative."
    elif "\\" in member.name:
        message = "Its name has a backslash: pack it with a tool that writes '/' between folder and file."
    elif any(part in {"", "..", "."} or not part.isprintable() for part in parts):
        message = "Member names must be plain: no '..', no empty or odd parts."
    elif max(len(part.encode(errors="replace")) for part in parts) > _MAX_NAME:
        message = f"Member names must be shorter than {_MAX_NAME} bytes."
    elif member.kind not in {"file", "folder"}:
        message = f"Only regular files are unpacked; this is a {member.kind}."
    elif member.kind == "file" and parts[-1].lower().endswith(_ARCHIVE_SUFFIXES):
        message = "An archive in an archive is not unpacked."
    return None if message is None else Problem("unsafe_archive", shown, message)


def _too_many() -> InvalidAdapter:
    return _refused(f"The archive has more than {_MAX_MEMBERS} members.")


class _Budget:
    """Counts what comes out of an archive of `packed` bytes."""

    def __init__(self, max_bytes: int, packed: int) -> None:
        self._max_bytes = max_bytes
        self._packed = max(packed, 1)
        self._out = 0

    def take(self, count: int) -> None:
        """Raises TooLarge over the limit in bytes, InvalidAdapter over the ratio."""
        self._out += count
        if self._out > self._max_bytes:
            raise TooLarge(f"Unpacked, the archive is larger than the limit of {self._max_bytes} bytes.")
        if self._out > _RATIO_FROM_BYTES and self._out > _MAX_RATIO * self._packed:
            raise _refused(f"The archive expands more than {_MAX_RATIO}-fold.")


def _pour(source: _Readable, target: Path, budget: _Budget) -> None:
    with target.open("xb") as out:
        while chunk := source.read(_CHUNK_BYTES):
            budget.take(len(chunk))
            out.write(chunk)


def _gunzip(archive: Path, target: Path, max_bytes: int) -> Path:
    with gzip.open(archive, "rb") as source:
        _pour(source, target, _Budget(max_bytes, archive.stat().st_size))
    return target


def _unpack_tar(archive: Path, target: Path, max_bytes: int) -> list[str]:
    with archive.open("rb") as file:
        guarded = _Guarded(file)
        with tarfile.open(fileobj=cast(IO[bytes], guarded), mode="r:", errorlevel=2) as tar:
            infos = []
            for info in tar:
                infos.append(info)
                if len(infos) > _MAX_MEMBERS:
                    raise _too_many()
            guarded.listed = True
            wanted, others = choose([Member(_plain(info.name), _tar_kind(info)) for info in infos])
            budget = _Budget(max_bytes, archive.stat().st_size)
            for member, name in wanted.items():
                source = tar.extractfile(next(i for i in infos if i.isreg() and _plain(i.name) == member))
                assert source is not None
                with source:
                    _pour(source, target / name, budget)
    return others


def _plain(name: str) -> str:
    """A member's name without the `./` that `tar -C DIR .` and some packers write in front."""
    return "" if name == "." else name.removeprefix("./")


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "sparse file"
    if info.isreg():
        return "file"
    if info.isdir():
        return "folder"
    if info.issym() or info.islnk():
        return "link"
    return "device or another special file"


def _unpack_zip(archive: Path, target: Path, max_bytes: int) -> list[str]:
    with archive.open("rb") as file:
        guarded = _Guarded(file)
        with zipfile.ZipFile(cast(IO[bytes], guarded)) as bundle:
            infos = bundle.infolist()
            if len(infos) > _MAX_MEMBERS:
                raise _too_many()
            guarded.listed = True
            wanted, others = choose([Member(_plain(info.orig_filename), _zip_kind(info)) for info in infos])
            budget = _Budget(max_bytes, archive.stat().st_size)
            for member, name in wanted.items():
                with bundle.open(next(info for info in infos if _plain(info.orig_filename) == member)) as source:
                    _pour(source, target / name, budget)
    return others


def _zip_kind(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & 0x1:
        return "encrypted file"
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        return "file in an unsupported compression"
    mode = info.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFLNK:
        return "link"
    if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
        return "device or another special file"
    return "folder" if info.orig_filename.endswith("/") else "file"


def pack(folder: Path, version: VersionRecord, card: str, vocabulary: str, scratch: Path) -> IO[bytes]:
    """A version's files as a .tar.gz in PEFT layout, byte for byte as they came in, with defaults, card and tokens.

    The result is an open file at its beginning, without a name, which is gone when closed. The same texts always pack
    to the same bytes. Weights hardly compress, so the fastest level is used. Raises StorageFull or StoreUnavailable.
    """
    with file_errors("The download cannot be packed"):
        own = Vocabulary.parse(vocabulary)
        tokens = own.text if own is not None and own.tokens else ""
        texts = {DEFAULTS_FILE: version.defaults, CARD_FILE: card, OWN_TOKENS_FILE: tokens}
        return _pack(folder, version, texts, scratch)


def _pack(folder: Path, version: VersionRecord, texts: Mapping[str, str], scratch: Path) -> IO[bytes]:
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
            for name, text in texts.items():
                if data := text.encode():
                    info = tarfile.TarInfo(name)
                    info.size, info.mtime, info.mode = len(data), created, 0o644
                    tar.addfile(info, BytesIO(data))
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file
