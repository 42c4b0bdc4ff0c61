"""What is to be known of a file's rows before anything learns from them: `manylora data check`, and an event of a job.

Numbers and row numbers, of everything; labels and the words of faults, which quote rows, are for who has the file.
This module imports no torch and no numpy.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from manylora.lifecycle.data.data import AS_IT_IS, Example, Reading, RowFault, rows_as_examples
from manylora.lifecycle.data.look import odd_rows

__all__ = ["MAX_ROWS_NAMED", "DataReport", "Found", "of_examples", "personal_kinds", "report_of"]

MAX_ROWS_NAMED: Final = 20
_LABELS_NAMED: Final = 50
_FAULTS_NAMED: Final = 10
_LONGEST_FAULT: Final = 200


@dataclass(frozen=True, slots=True)
class Found:
    """So many rows, and the first of them by number."""

    count: int = 0
    rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[int]) -> "Found":
        every = sorted(set(rows))
        return cls(len(every), tuple(every[:MAX_ROWS_NAMED]))

    def as_dict(self) -> dict[str, Any]:
        return {"count": self.count, "rows": list(self.rows)}


@dataclass(frozen=True, slots=True)
class DataReport:
    """One file. `used` rows can be learnt from; `refused` ones cannot, and their file is taken by nobody as it is.

    `lengths` are of characters. `shared` are rows that another file, to be learnt from, has too; None without one.
    `personal`: by kind, rows in which something looks like a person's data or a secret.
    """

    file: str
    shape: str
    used: int
    refused: Found
    faults: tuple[str, ...]
    repeated: Found
    contrary: Found
    empty: Found
    lengths: Mapping[str, int]
    labels: Mapping[str, int] = field(default_factory=dict)
    num_labels: int = 0
    shared: Found | None = None
    personal: Mapping[str, Found] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """All but what quotes rows: labels are told by how many rows the rarest and the most frequent have."""
        counts = self.labels.values()
        return {
            "shape": self.shape,
            "rows": {"used": self.used, "refused": self.refused.as_dict()},
            "repeated": self.repeated.as_dict(),
            "contrary": self.contrary.as_dict(),
            "empty": self.empty.as_dict(),
            "lengths": dict(self.lengths),
            "labels": {"count": self.num_labels, "fewest": min(counts), "most": max(counts)} if counts else None,
            "shared": None if self.shared is None else self.shared.as_dict(),
            "personal": {kind: found.as_dict() for kind, found in self.personal.items()},
        }

    def as_dict(self) -> dict[str, Any]:
        told = Counter(self.labels).most_common(_LABELS_NAMED)
        return {"file": self.file, **self.numbers(), "faults": list(self.faults), "label_counts": dict(told)}


def report_of(
    path: Path, *, reading: Reading = AS_IT_IS, learnt: Iterable[Example] = ()
) -> tuple[DataReport, tuple[Example, ...]]:
    """The report of a file and its sound rows. `learnt` are the rows of the file that is learnt from.

    Raises InvalidRequest where it cannot be read at all, or its first row is of no known shape.
    """
    shape, examples, faulty, faults = "", list[Example](), list[int](), list[str]()
    for number, found, example in rows_as_examples(path, reading):
        shape = found
        if isinstance(example, RowFault):
            faulty.append(number)
            faults += [f"row {number}: {example}"[:_LONGEST_FAULT]] if len(faults) < _FAULTS_NAMED else []
        else:
            examples.append(example)
    return _report(path.name, shape, examples, learnt, faulty, faults), tuple(examples)


def of_examples(name: str, shape: str, examples: Iterable[Example], learnt: Iterable[Example] = ()) -> DataReport:
    """The report of rows that were read already, all of them sound."""
    return _report(name, shape, list(examples), learnt, [], [])


def _report(
    name: str,
    shape: str,
    examples: list[Example],
    learnt: Iterable[Example],
    faulty: list[int],
    faults: list[str],
) -> DataReport:
    odd = odd_rows(examples, shape)
    labels = Counter(example.label for example in examples if example.label is not None)
    known = {example.messages for example in learnt}
    return DataReport(
        file=name,
        shape=shape,
        used=len(examples),
        refused=Found.of(faulty),
        faults=tuple(faults),
        repeated=Found.of(odd.repeated),
        contrary=Found.of(odd.contrary),
        empty=Found.of(odd.empty),
        lengths=_lengths(examples),
        labels=dict(labels),
        num_labels=len(labels),
        shared=Found.of(e.row for e in examples if e.messages in known) if known else None,
        personal=_personal(examples),
    )


def _lengths(examples: list[Example]) -> dict[str, int]:
    if not examples:
        return {}
    whole = sorted((sum(len(message.content) for message in example.messages), example.row) for example in examples)
    answers = sorted(len(example.answer) for example in examples)
    return {
        "median": whole[len(whole) // 2][0],
        "p95": whole[len(whole) * 95 // 100][0],
        "longest": whole[-1][0],
        "longest_row": whole[-1][1],
        "answer_median": answers[len(answers) // 2],
        "answer_longest": answers[-1],
    }


# personal data


def _personal(examples: list[Example]) -> dict[str, Found]:
    rows: dict[str, list[int]] = {}
    for example in examples:
        for message in (*example.messages, *([example.rejected] if example.rejected is not None else [])):
            # base64 in a data URL says nothing
            for kind in () if message.content.startswith("data:") else personal_kinds(message.content):
                rows.setdefault(kind, []).append(example.row)
    return {kind: Found.of(numbers) for kind, numbers in sorted(rows.items())}


def personal_kinds(text: str) -> Iterator[str]:
    """What in a text looks like a person's data or a secret, by kind.

    By its form alone: names and addresses have none. Where a number has check digits, they are checked.
    """
    for kind, (mark, pattern, holds) in _KINDS.items():
        if mark.search(text) and any(holds(match[0]) for match in pattern.finditer(text)):
            yield kind


def _digits(text: str) -> list[int]:
    return [int(c) for c in text if c.isdigit()]


def _is_card(text: str) -> bool:
    """Luhn's check, of a number that does not repeat one digit."""
    digits = _digits(text)
    doubled = [d if n % 2 == 0 else d * 2 - 9 * (d > 4) for n, d in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _is_iban(text: str) -> bool:
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _is_resident_id(text: str) -> bool:
    """The last character of a Chinese resident's number checks the others (ISO 7064, MOD 11-2)."""
    weights = [2 ** (17 - n) % 11 for n in range(17)]
    remainder = sum(int(c) * w for c, w in zip(text[:17], weights, strict=True)) % 11
    return "10X98765432"[remainder] == text[17].upper()


def _any(_text: str) -> bool:
    return True


_DIGIT: Final = re.compile(r"[0-9]")
# By kind: what a text has to have to be looked at, the form, and its check. Each form is bounded, so that no text takes
# long.
_KINDS: Final[Mapping[str, tuple[re.Pattern[str], re.Pattern[str], Callable[[str], bool]]]] = {
    "email": (
        re.compile("@"),
        re.compile(r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}"),
        _any,
    ),
    "phone": (
        _DIGIT,
        re.compile(r"(?<![0-9A-Za-z])(?:\+[1-9][0-9]{0,2}(?:[ ./-]?\(?[0-9]{2,4}\)?){3,5}|1[3-9][0-9]{9})(?![0-9])"),
        _any,
    ),
    "card": (_DIGIT, re.compile(r"(?<![0-9A-Za-z])[0-9](?:[ -]?[0-9]){12,18}(?![0-9])"), _is_card),
    "iban": (
        _DIGIT,
        re.compile(r"(?<![0-9A-Za-z])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![0-9A-Za-z])"),
        _is_iban,
    ),
    "resident_id": (_DIGIT, re.compile(r"(?<![0-9A-Za-z])[0-9]{17}[0-9Xx](?![0-9A-Za-z])"), _is_resident_id),
    "social_security": (re.compile("-"), re.compile(r"(?<![0-9-])[0-8][0-9]{2}-[0-9]{2}-[0-9]{4}(?![0-9-])"), _any),
    "secret": (
        re.compile(r"sk-|ghp_|AKIA|xox[bp]-|ml_|BEGIN"),
        re.compile(
            r"(?<![0-9A-Za-z])(?:(?:sk-|ghp_|xox[bp]-|ml_)[0-9A-Za-z_-]{16,200}|AKIA[0-9A-Z]{16})"
            r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
        ),
        _any,
    ),
}
