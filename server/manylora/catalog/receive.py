"""An adapter's upload: a multipart body into a folder, under a size limit, without holding it in memory."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from manylora.catalog.multipart import Form, read_form
from manylora.errors import InvalidAdapter, InvalidRequest, Problem, TooLarge
from manylora.identity import BROUGHT_FILES

ARCHIVE_PART: Final = "archive"
FILES_PART: Final = "files"
FIELDS: Final = frozenset({"name", "description", "pinned", "activate", "note"})
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}(?<!\.)")


@dataclass(slots=True)
class Received:
    """What came in: text fields by name; either `archive`, or files in `adapter_folder`."""

    folder: Path
    fields: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    left_aside: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    has_archive: bool = False

    @property
    def archive(self) -> Path:
        return self.folder / "archive"

    @property
    def adapter_folder(self) -> Path:
        return self.folder / "adapter"


async def receive_form(
    body: AsyncIterator[bytes], content_type: str, folder: Path, *, max_bytes: int, content_length: int | None
) -> Received:
    """Read the form. Raises InvalidRequest, UnsupportedField, TooLarge, or InvalidAdapter (`unexpected_file`).

    A file's name is taken from the client only if it is a plain one. Files are written by a worker thread.
    """
    form = _AdapterForm(folder)
    await read_form(
        body,
        content_type,
        form,
        max_bytes=max_bytes,
        content_length=content_length,
        too_large=lambda: TooLarge(
            f"The upload is larger than the limit of {max_bytes} bytes (the setting max_adapter_size)."
        ),
    )
    form.received.fields = form.fields
    if form.received.problems:
        raise InvalidAdapter(form.received.problems)
    return form.received


class _AdapterForm(Form):
    """The parts of an adapter's upload."""

    def __init__(self, folder: Path) -> None:
        super().__init__(FIELDS)
        self.received = Received(folder)
        self.received.adapter_folder.mkdir()

    def open_part(self, name: str, filename: str) -> None:
        if name == ARCHIVE_PART:
            self._open_archive()
        elif name == FILES_PART:
            self._open_file(filename)
        else:
            super().open_part(name, filename)

    def _open_archive(self) -> None:
        if self.received.has_archive:
            self.refuse(InvalidRequest("The archive is sent twice.", param=ARCHIVE_PART))
        else:
            self.received.has_archive = True
            self._start(self.received.archive)

    def _open_file(self, name: str) -> None:
        if name not in BROUGHT_FILES and all(map(_PLAIN_NAME.fullmatch, name.split("/"))):
            self.received.left_aside.append(name)  # its bytes are passed over
        elif not _PLAIN_NAME.fullmatch(name):
            message = "A 'files' part needs the plain name of an adapter's file."
            self.received.problems.append(Problem("unexpected_file", ascii(name)[1:-1][:128] or "(no name)", message))
        elif name in self.received.files:
            self.refuse(InvalidRequest(f"The file '{name}' is sent twice.", param=FILES_PART))
        else:
            self.received.files.add(name)
            self._start(self.received.adapter_folder / name)

    def _start(self, path: Path) -> None:
        if self.received.has_archive and self.received.files:
            self.refuse(InvalidRequest("Send either 'files' parts or one 'archive' part, not both."))
            return
        self.write_to(path)
