"""A file's rows as they stand there: JSON lines, a JSON list, CSV, parquet or Arrow, in whatever encoding it is said to
be; or those of a folder's files, one after the other.

This module imports no torch and knows nothing of what a row means.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.folders import KINDS, arrow_rows, images_of, parts_of
from manylora.lifecycle.extras import need
from manylora.lifecycle.parameters import InvalidParameter

__all__ = ["AS_IT_IS", "Reading", "bytes_of", "rows_of"]

_SEPARATORS: Final = (",", ";", "\t")
_GUESSED: Final = ("gb18030", "shift_jis", "cp1252")
_UTF8: Final = ("utf-8", "utf8", "utf-8-sig")
_SHOWN: Final = 40  # characters of a line that is read in a guessed encoding

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read. Each of `columns` is FIELD=COLUMN: a field that rows should have, and its name there."""

    encoding: Annotated[str, "The encoding of text files, such as gb18030"] = "utf-8"
    columns: Annotated[tuple[str, ...], "A field by its name in the file, such as prompt=question"] = ()

    def renamed(self, row: Row) -> Row:
        """The row with the fields that it should have."""
        pairs = [_pair(text) for text in self.columns]
        taken = {column for _, column in pairs}
        return {name: value for name, value in row.items() if name not in taken} | {
            field: row[column] for field, column in pairs if column in row
        }


AS_IT_IS: Final = Reading()


def _pair(text: str) -> tuple[str, str]:
    field, sign, column = (part.strip() for part in text.partition("="))
    if not (field and sign and column):
        raise InvalidParameter(f"`columns`: {text!r} is not FIELD=COLUMN, such as prompt=question.")
    return field, column


def rows_of(path: Path, reading: Reading) -> Iterator[tuple[int, Row]]:
    """Each row with its number, which counts from 1 as an editor counts lines, through all files of a folder.

    Raises InvalidRequest.
    """
    for number, image in enumerate(images := images_of(path), start=1):
        yield number, {"image": str(image.relative_to(path)), "label": image.parent.name}
    last = 0
    for part in () if images else parts_of(path):
        before = last
        for number, row in _rows_of_file(part, reading.encoding):
            last = before + number
            yield last, reading.renamed(row)


def bytes_of(path: Path) -> bytes:
    """What is in the files that `rows_of` reads, one after the other; of a folder of images the names of these."""
    if images := images_of(path):
        return "\n".join(image.relative_to(path).as_posix() for image in images).encode()
    return b"".join(part.read_bytes() for part in parts_of(path))


def _rows_of_file(path: Path, encoding: str) -> Iterator[tuple[int, Row]]:
    readers = {".json": _json, ".csv": _csv, ".tsv": _csv}
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise InvalidRequest(
            f"{path.name}: data must be a .jsonl, .csv or .parquet file (or .json, .tsv, .arrow), or a folder of them."
        )
    if not path.is_file():
        raise InvalidRequest(f"{path} does not exist or is not a file.")
    if kind == ".jsonl":
        return _jsonl(path.name, _lines(path, encoding))
    if kind == ".parquet":
        return _parquet(path)
    if kind == ".arrow":
        return enumerate(arrow_rows(path), start=1)
    return readers[kind](path.name, _text(path, encoding))


def _text(path: Path, encoding: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig" if encoding.lower() in _UTF8 else encoding)
    except LookupError as error:
        raise InvalidParameter(f"`encoding`: {encoding!r} is no encoding of text. Python's names are known.") from error
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        end = data.find(b"\n", error.start)
        row = data.count(b"\n", 0, error.start) + 1
        line = data[start : len(data) if end < 0 else end]
        is_utf8 = encoding.lower() in _UTF8
        said = (f"is not {'UTF-8' if is_utf8 else encoding} (byte {error.start - start} of the line). "
                f"Save the file as UTF-8.{_guess(data, line) if is_utf8 else ''}")  # fmt: skip
        raise InvalidRequest(f"{path.name}: row {row} {said}") from error


def _lines(path: Path, encoding: str) -> Iterator[str]:
    """The lines as they are read: those of UTF-8, in which a line's end is nothing else, without the whole file."""
    if encoding.lower() not in _UTF8:
        yield from _text(path, encoding).split("\n")
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                _text(path, encoding)  # which says what is wrong
                raise


def _guess(data: bytes, line: bytes) -> str:
    """What the line says in the encoding that is likeliest, as a sentence; empty where none fits."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return " It begins as UTF-16 does: if it is, give `encoding` utf-16."
    for encoding in _GUESSED:
        try:
            text = line.decode(encoding)
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        shown = "".join(c for c in text if c.isprintable())[:_SHOWN]
        return f" In {encoding} the line begins {shown!r}: if that is right, give `encoding` {encoding}."
    return ""


def _json(name: str, text: str) -> Iterator[tuple[int, Row]]:
    """A list of rows, or one row a line."""
    if not text.lstrip().startswith("["):
        yield from _jsonl(name, text.split("\n"))
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"{name}: {where} is not JSON: {error.msg}.") from error
    except RecursionError as error:
        raise InvalidRequest(f"{name} is nested too deeply.") from error
    for number, row in enumerate(rows, start=1):
        yield number, _object(name, number, row)


def _jsonl(name: str, lines: Iterable[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            where = f"row {number}, column {error.colno}"
            hint = " Each line holds one row; a list over several lines is a .json file." if line.strip() == "[" else ""
            raise InvalidRequest(f"{name}: {where} is not JSON: {error.msg}.{hint}") from error
        except RecursionError as error:
            raise InvalidRequest(f"{name}: row {number} is nested too deeply.") from error
        yield number, _object(name, number, row)


def _object(name: str, number: int, row: object) -> Row:
    if isinstance(row, dict):
        return row
    raise InvalidRequest(
        f"{name}: row {number} is a JSON {type(row).__name__}, not an object. Each row is one, as "
        '{"prompt": "…", "completion": "…"}.'
    )


def _csv(name: str, text: str) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(io.StringIO(text), delimiter=_separator(text), strict=True)
    try:
        for row in reader:
            if None in row:
                raise InvalidRequest(f"{name}: row {reader.line_num} has more columns than the header.")
            yield reader.line_num, row
    except csv.Error as error:
        raise InvalidRequest(f"{name}: row {reader.line_num}: {error}.") from error


def _separator(text: str) -> str:
    """What makes most columns of the header; a comma where none makes more than it."""
    header = text.partition("\n")[0]
    return max(_SEPARATORS, key=lambda one: len(next(csv.reader([header], delimiter=one), [])))


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    need("pyarrow.parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidRequest(f"{path.name} is not a readable parquet file: {error}") from error
    yield from enumerate(table.to_pylist(), start=1)
