"""Reading training and evaluation data: JSON lines, CSV or parquet, every fault named by its row.

A file holds one of three shapes, the same in all rows:

    {"prompt": str, "completion": str}      one question, one answer
    {"messages": [{"role", "content"}, …]}  a chat whose last message is the assistant's
    {"text": str, "label": str}             classification; the answer is the label

CSV and parquet use the same names as columns (CSV cannot hold `messages`). This module imports no torch.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manylora.errors import InvalidRequest
from manylora.lifecycle.extras import need

Shape = Literal["completion", "chat", "label"]
_FIELDS: dict[Shape, tuple[str, ...]] = {
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "label": ("text", "label"),
}
_ROLES = ("system", "user", "assistant", "tool")
_MAX_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a chat whose last message is the answer wanted. `row` is 1-based, as an editor counts lines."""

    row: int
    messages: tuple[Message, ...]
    label: str | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Dataset:
    """A checked file. `labels` is sorted, and empty unless the shape is `label`."""

    path: Path
    shape: Shape
    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({e.label for e in self.examples if e.label is not None}))


def read_dataset(path: Path, *, min_labels: int = 1) -> Dataset:
    """Read and check a whole file.

    Raises InvalidRequest that names the file and every faulty row (the first ten), or that says that the
    file is missing, empty, not UTF-8, of an unknown kind, or has fewer than `min_labels` different labels.
    """
    rows = list(_rows(path))
    if not rows:
        raise InvalidRequest(f"{path.name} is empty: there is no row to work with.")
    shape = _shape_of(rows[0][1], path)
    examples: list[Example] = []
    problems: list[str] = []
    for number, row in rows:
        found = _problems(row, shape)
        if found:
            problems.append(f"row {number}: {found}")
        else:
            examples.append(_example(number, row, shape))
    if problems:
        more = f"; and {len(problems) - _MAX_SHOWN} more rows" if len(problems) > _MAX_SHOWN else ""
        raise InvalidRequest(f"{path.name}: {'; '.join(problems[:_MAX_SHOWN])}{more}.")
    dataset = Dataset(path, shape, tuple(examples))
    if shape == "label" and len(dataset.labels) < min_labels:
        raise InvalidRequest(
            f"{path.name} has only the label {dataset.labels[0]!r}: a classifier needs at least {min_labels}."
        )
    return dataset


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InvalidRequest(f"{path.name}: data must be a .jsonl, .csv or .parquet file.")
    if not path.is_file():
        raise InvalidRequest(f"{path} does not exist or is not a file.")
    return reader(path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InvalidRequest(
                    f"{path.name}: row {number} is not UTF-8 (byte {error.start} of the line). Save the file as UTF-8."
                ) from error
            yield number, text


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, text in _lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text.rstrip())
        except json.JSONDecodeError as error:
            where = f"row {number}, column {error.colno}"
            hint = " Each line holds one row; a list over several lines is not read." if text.strip() == "[" else ""
            raise InvalidRequest(f"{path.name}: {where} is not JSON: {error.msg}.{hint}") from error
        except RecursionError as error:
            raise InvalidRequest(f"{path.name}: row {number} is nested too deeply.") from error
        if not isinstance(row, dict):
            raise InvalidRequest(
                f"{path.name}: row {number} is a JSON {type(row).__name__}, not an object. Each line holds one row, as "
                '{"prompt": "…", "completion": "…"}.'
            )
        yield number, row


def _csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text = "".join(line for _, line in _lines(path))
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            if None in row:
                raise InvalidRequest(f"{path.name}: row {reader.line_num} has more columns than the header.")
            yield reader.line_num, row
    except csv.Error as error:
        raise InvalidRequest(f"{path.name}: row {reader.line_num}: {error}.") from error


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    need("pyarrow.parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidRequest(f"{path.name} is not a readable parquet file: {error}") from error
    yield from enumerate(table.to_pylist(), start=1)


def _shape_of(row: Mapping[str, Any], path: Path) -> Shape:
    for shape, fields in _FIELDS.items():
        if all(field in row for field in fields):
            return shape
    have = ", ".join(sorted(row)) or "nothing"
    raise InvalidRequest(
        f"{path.name}: the first row has the fields {have}; needed are prompt and completion, or messages, "
        "or text and label."
    )


def _problems(row: Mapping[str, Any], shape: Shape) -> str:
    """What is wrong with a row, or an empty string."""
    missing = [field for field in _FIELDS[shape] if row.get(field) is None]
    if missing:
        return f"missing {' and '.join(missing)}"
    if shape == "chat":
        return _chat_problems(row["messages"])
    for field in _FIELDS[shape]:
        if not isinstance(row[field], str):
            return f"{field} must be a string, not {type(row[field]).__name__}"
        if not _is_text(row[field]):
            return f"{field} holds half a character (a lone surrogate)"
    for field in ("completion", "label", "text"):
        if field in _FIELDS[shape] and not row[field].strip():
            return f"{field} is empty"
    return ""


def _is_text(value: str) -> bool:
    """JSON can spell halves of characters, which no UTF-8 and no tokenizer has."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def _chat_problems(messages: object) -> str:
    if not isinstance(messages, list) or len(messages) < 2:
        return "messages must be a list of at least two: a question and the assistant's answer"
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f"messages[{index}] must be an object with role and content, both strings"
        if not _is_text(message["content"]):
            return f"messages[{index}].content holds half a character (a lone surrogate)"
        if message.get("role") not in _ROLES:
            return f"messages[{index}].role must be one of {', '.join(_ROLES)}"
    if messages[-1]["role"] != "assistant":
        return "the last message must be the assistant's: it is the answer to learn"
    return "" if messages[-1]["content"].strip() else "the assistant's last message is empty"


def _example(number: int, row: Mapping[str, Any], shape: Shape) -> Example:
    if shape == "chat":
        return Example(number, tuple(Message(m["role"], m["content"]) for m in row["messages"]))
    question, answer = (row[field] for field in _FIELDS[shape])
    if shape == "label":
        answer = answer.strip()  # "good " and "good" are one class
    messages = (Message("user", question), Message("assistant", answer))
    return Example(number, messages, label=answer if shape == "label" else None)
