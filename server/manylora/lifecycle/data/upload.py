"""Rows go up to a server, each set of them as one file, whatever they lie in here."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Final

from manylora.client.jobs import upload_rows
from manylora.client.server import Caller
from manylora.errors import InvalidRequest
from manylora.lifecycle.data.files import AS_IT_IS, Reading, rows_of
from manylora.lifecycle.data.folders import parts_of

__all__ = ["upload_data"]

_ARROW: Final = ".arrow"


def upload_data(
    server: Caller, data: Path, held_out: Path | None, reading: Reading = AS_IT_IS
) -> tuple[str, str | None]:
    """The ids of both files on the server. Raises InvalidRequest for what cannot be read, before anything is sent."""
    with ExitStack() as stack:
        opened = [stack.enter_context(_as_one_file(path, reading)) for path in (data, held_out) if path is not None]
        first, *second = [upload_rows(server, name, file) for name, file in opened]
    return first, next(iter(second), None)


@contextmanager
def _as_one_file(path: Path, reading: Reading) -> Iterator[tuple[str, IO[bytes]]]:
    """A name and the open file behind it: the file itself where a server reads it as it is.

    A folder, Arrow's files, which servers do not take from strangers, and what is to be read in another encoding or
    with other names of columns become JSON lines. Raises InvalidRequest.
    """
    parts = parts_of(path)
    if not parts[0].is_file():
        raise InvalidRequest(f"{path} is not a file.")
    if parts == [path] and path.suffix != _ARROW and reading == AS_IT_IS:
        with path.open("rb") as file:
            yield path.name, file
        return
    with tempfile.TemporaryFile() as file:
        for number, row in rows_of(path, reading):
            try:
                file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
            except UnicodeEncodeError:
                raise InvalidRequest(f"{path.name}: row {number} holds half a character (a lone surrogate).") from None
        file.seek(0)
        yield f"{path.stem}.jsonl", file
