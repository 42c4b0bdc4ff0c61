"""Training and evaluation data: a whole file read and checked, every fault named by its row.

`files` reads rows, `rows` says what a row means; all rows of a file have one shape. This module imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from manylora.errors import InvalidImage, InvalidRequest
from manylora.images.urls import SCHEME, data_of
from manylora.lifecycle.data.files import AS_IT_IS, Reading, bytes_of, rows_of
from manylora.lifecycle.data.rows import FILES, LABELLED, Example, Message, RowFault, Shape, example_of, shape_of

__all__ = [
    "AS_IT_IS",
    "Dataset",
    "Example",
    "Facts",
    "Message",
    "Reading",
    "RowFault",
    "Shape",
    "examine",
    "read_dataset",
    "rows_as_examples",
]

MAX_LABELS_TOLD: Final = 1000
MAX_LABEL_CHARS_TOLD: Final = 65_536  # of all labels together
_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Dataset:
    """A checked file. `labels` is sorted, and empty unless the shape is `label`, `image` or `tags`."""

    path: Path
    shape: Shape
    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> tuple[str, ...]:
        whole = {e.label for e in self.examples if e.label is not None}
        return tuple(sorted(whole.union(*(e.tags for e in self.examples))))

    def file_of(self, example: Example) -> bytes:
        """What is in the file, or data URL, that a row of one of the shapes `FILES` names. Raises InvalidRequest."""
        named = example.messages[0].content
        try:
            return data_of(named) if _is_url(named) else Path(named).read_bytes()
        except InvalidImage as error:
            raise InvalidRequest(f"{self.path.name}: row {example.row}: {error.message}") from error
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise InvalidRequest(
                f"{self.path.name}: row {example.row}: {Path(named).name} cannot be read: {said}."
            ) from error

    def contents(self) -> Iterator[bytes]:
        """All that is learnt from: the file's bytes, then those of each file that a row names, in their order.

        Raises InvalidRequest.
        """
        yield bytes_of(self.path)
        for example in self.examples if self.shape in FILES else ():
            yield self.file_of(example)


def read_dataset(path: Path, *, min_labels: int = 1, reading: Reading = AS_IT_IS) -> Dataset:
    """Read and check a whole file.

    Raises InvalidRequest that names the file and every faulty row (the first ten), or that says that the
    file is missing, empty, not in its encoding, of an unknown kind, or has fewer than `min_labels` different labels.
    """
    found = list(_examined(path, reading, otherwise=" `columns` says which field is which."))
    shape = found[0][0]
    examples = [example for _, example in found]
    dataset = Dataset(path, shape, tuple(examples))
    if shape in LABELLED and len(dataset.labels) < min_labels:
        raise InvalidRequest(
            f"{path.name} has only the label {dataset.labels[0]!r}: a classifier needs at least {min_labels}."
        )
    return dataset


@dataclass(frozen=True, slots=True)
class Facts:
    """What a sound file holds.

    `labels` is sorted, and None where there are more than `MAX_LABELS_TOLD` of them or all together have more than
    `MAX_LABEL_CHARS_TOLD` characters: whoever keeps the facts keeps something small.
    """

    num_rows: int
    shape: Shape
    labels: tuple[str, ...] | None


def examine(path: Path) -> Facts:
    """Read and check a file as `read_dataset` does; no row is kept. Raises InvalidRequest."""
    num_rows, num_chars, labels, are_few = 0, 0, set[str](), True
    shape: Shape = "chat"
    for found, example in _examined(path, AS_IT_IS):
        num_rows, shape = num_rows + 1, found
        if are_few and example.label is not None and example.label not in labels:
            labels.add(example.label)
            num_chars += len(example.label)
            are_few = len(labels) <= MAX_LABELS_TOLD and num_chars <= MAX_LABEL_CHARS_TOLD
    return Facts(num_rows, shape, tuple(sorted(labels)) if are_few else None)


def rows_as_examples(
    path: Path, reading: Reading, *, otherwise: str = ""
) -> Iterator[tuple[int, Shape, Example | RowFault]]:
    """Every row by number, as an example or with what is wrong with it; all have the shape of the first one.

    Raises InvalidRequest where the file cannot be read or is empty, or its first row is of no known shape; `otherwise`
    is what can then be done beside changing the file.
    """
    shape: Shape | None = None
    for number, row in rows_of(path, reading):
        if shape is None:
            try:
                shape = shape_of(row)
            except RowFault as fault:
                raise InvalidRequest(f"{path.name}: the first row {fault}.{otherwise}") from None
        try:
            found: Example | RowFault = _placed(example_of(number, row, shape), shape, path)
        except RowFault as fault:
            found = fault
        yield number, shape, found
    if shape is None:
        raise InvalidRequest(f"{path.name} is empty: there is no row to work with.")


def _placed(example: Example, shape: Shape, path: Path) -> Example:
    """The example with the whole path of the file that its row names, so that those of two folders are apart.

    The path begins where the data lies.
    """
    first, *rest = example.messages
    if shape not in FILES or _is_url(first.content):
        return example
    place = (path if path.is_dir() else path.parent) / first.content
    return replace(example, messages=(replace(first, content=str(place.absolute())), *rest))


def _is_url(named: str) -> bool:
    return named[: len(SCHEME)].lower() == SCHEME


def _examined(path: Path, reading: Reading, *, otherwise: str = "") -> Iterator[tuple[Shape, Example]]:
    """The sound rows with their shape, one at least. Raises InvalidRequest, for faulty rows once all were read."""
    problems: list[str] = []
    num_faulty = 0
    for number, shape, found in rows_as_examples(path, reading, otherwise=otherwise):
        if isinstance(found, RowFault):
            num_faulty += 1
            problems += [f"row {number}: {found}"] if num_faulty <= _SHOWN else []
        else:
            yield shape, found
    if problems:
        more = f"; and {num_faulty - _SHOWN} more rows" if num_faulty > _SHOWN else ""
        raise InvalidRequest(f"{path.name}: {'; '.join(problems)}{more}.")
