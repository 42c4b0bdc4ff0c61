"""Which tokens may come next in a transcript, against a plain reading of the rules, token by token."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from manylora.engine.speech_rules import SpeechRules
from manylora.engine.token_rules import Bits, clear_range, open_bits
from manylora.sound.tokens import SpeechForm, SpeechTokens


def ids_of(bits: Bits) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())


def may_come(form: SpeechForm, vocab_size: int, output: Sequence[int]) -> set[int]:
    """What the rules say of each token, one by one."""
    tokens = form.tokens
    if len(output) < len(form.first):
        return set(form.first[len(output)])
    text = output[len(form.first) :]
    open_ids = set(range(vocab_size)) - set(tokens.suppressed)
    if not text:
        open_ids -= set(tokens.suppressed_first)
    if not form.has_timestamps:
        return open_ids
    first = tokens.first_timestamp
    open_ids.discard(tokens.no_timestamps)
    if not text:
        last = vocab_size if tokens.max_first_timestamp is None else first + tokens.max_first_timestamp
        return {each for each in open_ids if first <= each <= last}
    times = [each for each in text if each >= first]
    is_behind_time = text[-1] >= first
    if is_behind_time and (len(text) == 1 or text[-2] >= first):
        return {each for each in open_ids if each < first}
    if is_behind_time:
        return {each for each in open_ids if each >= tokens.end and not first <= each < times[-1]}
    return {each for each in open_ids if not (times and first <= each <= times[-1])}


@pytest.mark.parametrize("has_timestamps", [False, True])
def test_rules_are_as_a_plain_reading_of_them_says(has_timestamps: bool) -> None:
    draw = random.Random(3)
    for _ in range(60):
        vocab_size = draw.choice([64, 70, 97, 200])
        end = draw.randint(5, vocab_size - 12)
        first = draw.randint(end + 2, vocab_size - 1)
        tokens = SpeechTokens(
            begin=end + 1,
            end=end,
            no_timestamps=first - 1,
            first_timestamp=first,
            suppressed=tuple(draw.sample(range(vocab_size + 5), 3)),
            suppressed_first=tuple(draw.sample(range(vocab_size), 2)),
            max_first_timestamp=draw.choice([None, 0, 3, 500]),
            languages={"en": 1},
        )
        form = SpeechForm(tokens, draw.choice([(), ((3, 4), (5,))]), has_timestamps=has_timestamps)
        said = [draw.randrange(first if draw.random() < 0.5 else 0, vocab_size) for _ in range(20)]
        rules = SpeechRules(form, vocab_size)
        for count in range(len(said) + 1):
            found = rules.allowed([7, 7, *said[:count]], count)
            assert found is not None
            assert ids_of(found) == may_come(form, vocab_size, said[:count])


def test_a_range_is_cleared_and_nothing_beside_it() -> None:
    draw = random.Random(4)
    for _ in range(500):
        size = draw.randint(1, 150)
        begin, end = draw.randint(0, size), draw.randint(0, size)
        bits = open_bits(size)
        clear_range(bits, begin, end)
        assert ids_of(bits) == {each for each in range(size) if not begin <= each < end}
