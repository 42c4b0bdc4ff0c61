"""Streaming a multipart body into a folder, under a size limit, without holding it in memory.

Written on the streaming parser of `python-multipart` rather than on Starlette's form, which spools to the
system's temporary folder and knows no limit on files.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from manylora.errors import InvalidAdapter, InvalidRequest, Problem, TooLarge, UnsupportedField, quoted
from manylora.identity import BROUGHT_FILES

ARCHIVE_PART: Final = "archive"
FILES_PART: Final = "files"
FIELDS: Final = frozenset({"name", "description", "pinned", "activate", "note"})
_MAX_FIELD_BYTES: Final = 64 * 1024
_MAX_HEADER_BYTES: Final = 16 * 1024
_MAX_PARTS: Final = 1024
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}(?<!\.)")
_FLUSH_BYTES: Final = 2**20
_FORM_SLACK_BYTES: Final = 2**20  # boundaries, headers and fields around the files


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
    limit = max_bytes + _FORM_SLACK_BYTES
    if content_length is not None and content_length > limit:
        raise _too_large(max_bytes)
    sink = _Sink(folder)
    parser = _parser_for(content_type, sink)
    total = 0
    try:
        async for chunk in body:
            total += len(chunk)
            if total > limit:
                raise _too_large(max_bytes)
            _feed(parser, sink, chunk)
            if sink.buffered >= _FLUSH_BYTES:
                await asyncio.to_thread(sink.flush)
        if not sink.is_complete:
            raise InvalidRequest("The multipart body ends too early.")
        await asyncio.to_thread(sink.flush)
    finally:
        sink.close()
    if sink.received.problems:
        raise InvalidAdapter(sink.received.problems)
    return sink.received


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"The upload is larger than the limit of {max_bytes} bytes (the setting max_adapter_size).")


def _parser_for(content_type: str, sink: "_Sink") -> MultipartParser:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("The body must be multipart/form-data with a boundary, or application/json.")
    try:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": sink.on_part_begin,
                "on_header_field": sink.on_header_field,
                "on_header_value": sink.on_header_value,
                "on_header_end": sink.on_header_end,
                "on_headers_finished": sink.on_headers_finished,
                "on_part_data": sink.on_part_data,
                "on_part_end": sink.on_part_end,
                "on_end": sink.on_end,
            },
        )
    except FormParserError as error:
        raise InvalidRequest(f"The multipart boundary is not usable: {error}") from error


def _feed(parser: MultipartParser, sink: "_Sink", chunk: bytes) -> None:
    try:
        parser.write(chunk)
    except FormParserError as error:
        raise InvalidRequest(f"The multipart body is malformed: {error}") from error
    if sink.error is not None:
        raise sink.error


class _Sink:
    """Takes the parser's events; text goes to `received.fields`, file bytes are buffered until `flush`.

    Errors are kept in `error` instead of raised through the parser. Once there is one, the rest is ignored.
    """

    def __init__(self, folder: Path) -> None:
        self.received = Received(folder)
        self.received.adapter_folder.mkdir()
        self.error: InvalidRequest | None = None
        self.is_complete = False
        self.buffered = 0
        self._chunks: list[tuple[IO[bytes], bytes]] = []
        self._open: list[IO[bytes]] = []
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value = bytearray(), bytearray()
        self._num_parts = 0
        self._name = ""
        self._text: bytearray | None = None
        self._file: IO[bytes] | None = None

    def flush(self) -> None:
        """Write what is buffered. Runs on a worker thread while nothing else touches the sink."""
        for file, data in self._chunks:
            file.write(data)
        self._chunks.clear()
        self.buffered = 0

    def close(self) -> None:
        with ExitStack() as stack:  # each of them, though one has something left to write and cannot
            for file in self._open:
                stack.callback(file.close)

    # the parser's events

    def on_part_begin(self) -> None:
        self._num_parts += 1
        self._headers = {}
        self._text = self._file = None
        if self._num_parts > _MAX_PARTS:
            self._fail(InvalidRequest(f"The form has more than {_MAX_PARTS} parts."))

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._extend(self._field, data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._extend(self._value, data[start:end])

    def _extend(self, target: bytearray, data: bytes) -> None:
        target += data
        if len(target) > _MAX_HEADER_BYTES:
            target.clear()
            self._fail(InvalidRequest("A part's header is too long."))

    def on_header_end(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        if self.error is not None:
            return
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name in FIELDS:
            if self._name in self.received.fields:
                self._fail(InvalidRequest(f"The field '{self._name}' is given twice.", param=self._name))
            self._text = bytearray()
        elif self._name == ARCHIVE_PART:
            self._open_archive()
        elif self._name == FILES_PART:
            self._open_file(options.get(b"filename", b"").decode(errors="replace"))
        else:
            message = f"The field '{quoted(self._name)}' is not supported by this server. Leave it out."
            self._fail(UnsupportedField(message, param=self._name))

    def _open_archive(self) -> None:
        if self.received.has_archive:
            self._fail(InvalidRequest("The archive is sent twice.", param=ARCHIVE_PART))
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
            self._fail(InvalidRequest(f"The file '{name}' is sent twice.", param=FILES_PART))
        else:
            self.received.files.add(name)
            self._start(self.received.adapter_folder / name)

    def _start(self, path: Path) -> None:
        if self.received.has_archive and self.received.files:
            self._fail(InvalidRequest("Send either 'files' parts or one 'archive' part, not both."))
            return
        self._file = path.open("xb")
        self._open.append(self._file)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._text is not None:
            self._text += data[start:end]
            if len(self._text) > _MAX_FIELD_BYTES:
                self._text.clear()
                self._fail(InvalidRequest(f"The field '{self._name}' is too long.", param=self._name))
        elif self._file is not None:
            self._chunks.append((self._file, data[start:end]))
            self.buffered += end - start

    def on_part_end(self) -> None:
        if self._text is None or self.error is not None:
            return
        try:
            self.received.fields[self._name] = self._text.decode()
        except UnicodeDecodeError:
            self._fail(InvalidRequest(f"The field '{self._name}' is not UTF-8.", param=self._name))

    def on_end(self) -> None:
        self.is_complete = True

    def _fail(self, error: InvalidRequest) -> None:
        if self.error is None:
            self.error = error
