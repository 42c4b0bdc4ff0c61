"""Training and evaluation data: a whole file read and checked, every fault named by its row.

`files` reads rows, `rows` says what a row means; all rows of a file have one shape. This module imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.files import AS_IT_IS, Reading, rows_of
from manylora.lifecycle.data.rows import Example, Message, RowFault, Shape, example_of, shape_of

__all__ = ["Dataset", "Example", "Message", "Reading", "Shape", "read_dataset"]

_SHOWN: Final = 10


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


def read_dataset(path: Path, *, min_labels: int = 1, reading: Reading = AS_IT_IS) -> Dataset:
    """Read and check a whole file.

    Raises InvalidRequest that names the file and every faulty row (the first ten), or that says that the
    file is missing, empty, not in its encoding, of an unknown kind, or has fewer than `min_labels` different labels.
    """
    rows = list(rows_of(path, reading))
    if not rows:
        raise InvalidRequest(f"{path.name} is empty: there is no row to work with.")
    try:
        shape = shape_of(rows[0][1])
    except RowFault as fault:
        raise InvalidRequest(f"{path.name}: the first row {fault}.") from None
    examples: list[Example] = []
    problems: list[str] = []
    for number, row in rows:
        try:
            examples.append(example_of(number, row, shape))
        except RowFault as fault:
            problems.append(f"row {number}: {fault}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more rows" if len(problems) > _SHOWN else ""
        raise InvalidRequest(f"{path.name}: {'; '.join(problems[:_SHOWN])}{more}.")
    dataset = Dataset(path, shape, tuple(examples))
    if shape == "label" and len(dataset.labels) < min_labels:
        raise InvalidRequest(
            f"{path.name} has only the label {dataset.labels[0]!r}: a classifier needs at least {min_labels}."
        )
    return dataset
