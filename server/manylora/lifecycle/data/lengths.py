"""How long the examples of a file are, said before any work: what is cut, and what is padded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.progress import Listener, Progress


@dataclass(frozen=True, slots=True)
class LengthStatistics:
    """Lengths in tokens, of whole examples and of answers."""

    num_examples: int
    num_tokens: int
    median: int
    p95: int
    longest: int
    longest_row: int
    answer_median: int
    answer_longest: int
    num_truncated: int


def length_statistics(encoded: Sequence[Encoded]) -> LengthStatistics:
    lengths = np.array([len(e) for e in encoded])
    answers = np.array([e.num_answer_tokens for e in encoded])
    return LengthStatistics(
        num_examples=len(encoded),
        num_tokens=int(lengths.sum()),
        median=int(np.median(lengths)),
        p95=int(np.percentile(lengths, 95)),
        longest=int(lengths.max()),
        longest_row=encoded[int(lengths.argmax())].example.row,
        answer_median=int(np.median(answers)),
        answer_longest=int(answers.max()),
        num_truncated=sum(e.num_cut > 0 for e in encoded),
    )


def tell_lengths(flag: str, encoded: Sequence[Encoded], listen: Listener, more: str = "") -> None:
    """Say how long the examples of one file are, and warn of those that were cut."""
    found = length_statistics(encoded)
    message = (
        f"{flag}: {found.num_examples} examples, {found.num_tokens} tokens; lengths: median {found.median}, "
        f"95% {found.p95}, longest {found.longest} (row {found.longest_row}); answers: median {found.answer_median}, "
        f"longest {found.answer_longest}{more}"
    )
    listen(Progress("data", message=message))
    cut = [e for e in encoded if e.num_cut]
    if cut:
        rows = ", ".join(str(e.example.row) for e in cut[:5])
        worst = max(e.num_cut for e in cut)
        listen(
            Progress(
                "warning",
                message=f"{flag}: {len(cut)} prompts lose up to {worst} tokens on the left to fit --max-length "
                f"(rows {rows}{', …' if len(cut) > 5 else ''}).",
            )
        )
