"""Reading a multipart body as it comes, its files written to disk by a worker thread, nothing held in memory.

Written on the streaming parser of `python-multipart` rather than on Starlette's form, which spools to the
system's temporary folder and knows no limit on files.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from manylora.errors import InvalidRequest, ManyloraError, UnsupportedField, quoted

__all__ = ["Form", "read_form"]

_MAX_FIELD_BYTES: Final = 64 * 1024
_MAX_HEADER_BYTES: Final = 16 * 1024
_MAX_PARTS: Final = 1024
_FLUSH_BYTES: Final = 2**20
_FORM_SLACK_BYTES: Final = 2**20  # boundaries, headers and fields around the files


async def read_form(
    body: AsyncIterator[bytes],
    content_type: str,
    form: "Form",
    *,
    max_bytes: int,
    content_length: int | None,
    too_large: Callable[[], ManyloraError],
) -> None:
    """Feed the body to the form. Raises InvalidRequest, UnsupportedField, or `too_large()` beyond `max_bytes`."""
    limit = max_bytes + _FORM_SLACK_BYTES
    if content_length is not None and content_length > limit:
        raise too_large()
    parser = _parser_for(content_type, form)
    total = 0
    try:
        async for chunk in body:
            total += len(chunk)
            if total > limit:
                raise too_large()
            _feed(parser, form, chunk)
            if form.buffered >= _FLUSH_BYTES:
                await asyncio.to_thread(form.flush)
        if not form.is_complete:
            raise InvalidRequest("The multipart body ends too early.")
        await asyncio.to_thread(form.flush)
    finally:
        form.close()


def _parser_for(content_type: str, form: "Form") -> MultipartParser:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("The body must be multipart/form-data with a boundary, or application/json.")
    try:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": form.on_part_begin,
                "on_header_field": form.on_header_field,
                "on_header_value": form.on_header_value,
                "on_header_end": form.on_header_end,
                "on_headers_finished": form.on_headers_finished,
                "on_part_data": form.on_part_data,
                "on_part_end": form.on_part_end,
                "on_end": form.on_end,
            },
        )
    except FormParserError as error:
        raise InvalidRequest(f"The multipart boundary is not usable: {error}") from error


def _feed(parser: MultipartParser, form: "Form", chunk: bytes) -> None:
    try:
        parser.write(chunk)
    except FormParserError as error:
        raise InvalidRequest(f"The multipart body is malformed: {error}") from error
    if form.error is not None:
        raise form.error


class Form:
    """Takes the parser's events; text goes to `fields`, file bytes are buffered until `flush`.

    `known` are the names of text fields. What a part with another name is, `open_part` says, which a form overrides.
    Errors are kept in `error` instead of raised through the parser. Once there is one, the rest is ignored.
    """

    def __init__(self, known: frozenset[str]) -> None:
        self.fields: dict[str, str] = {}
        self.error: InvalidRequest | None = None
        self.is_complete = False
        self.buffered = 0
        self._known = known
        self._chunks: list[tuple[IO[bytes], bytes]] = []
        self._open: list[IO[bytes]] = []
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value = bytearray(), bytearray()
        self._num_parts = 0
        self._name = ""
        self._text: bytearray | None = None
        self._file: IO[bytes] | None = None

    def open_part(self, name: str, filename: str) -> None:
        """A part that is no known field: `write_to` a file, or `refuse`; else its bytes are passed over."""
        self.refuse(
            UnsupportedField(f"The field '{quoted(name)}' is not supported by this server. Leave it out.", param=name)
        )

    def write_to(self, path: Path) -> None:
        """Write the part that begins to a new file."""
        self.write_into(path.open("xb"))

    def write_into(self, file: IO[bytes]) -> None:
        """Write the part that begins into an open file, which is closed with the form."""
        self._file = file
        self._open.append(self._file)

    def refuse(self, error: InvalidRequest) -> None:
        """What is wrong with the form; the first is told."""
        if self.error is None:
            self.error = error

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
            self.refuse(InvalidRequest(f"The form has more than {_MAX_PARTS} parts."))

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._extend(self._field, data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._extend(self._value, data[start:end])

    def _extend(self, target: bytearray, data: bytes) -> None:
        target += data
        if len(target) > _MAX_HEADER_BYTES:
            target.clear()
            self.refuse(InvalidRequest("A part's header is too long."))

    def on_header_end(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        if self.error is not None:
            return
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name not in self._known:
            self.open_part(self._name, options.get(b"filename", b"").decode(errors="replace"))
            return
        if self._name in self.fields:
            self.refuse(InvalidRequest(f"The field '{self._name}' is given twice.", param=self._name))
        self._text = bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._text is not None:
            self._text += data[start:end]
            if len(self._text) > _MAX_FIELD_BYTES:
                self._text.clear()
                self.refuse(InvalidRequest(f"The field '{self._name}' is too long.", param=self._name))
        elif self._file is not None:
            self._chunks.append((self._file, data[start:end]))
            self.buffered += end - start

    def on_part_end(self) -> None:
        if self._text is None or self.error is not None:
            return
        try:
            self.fields[self._name] = self._text.decode()
        except UnicodeDecodeError:
            self.refuse(InvalidRequest(f"The field '{self._name}' is not UTF-8.", param=self._name))

    def on_end(self) -> None:
        self.is_complete = True
