"""Sentences out of reviews, each with its tone: positive, negative or neutral.

The test has things, judgements and patterns that training has not.
"""

import random
from pathlib import Path
from typing import Final

from manylora.lifecycle.recipes.recipe import Row, Splits

_Words = dict[str, tuple[str, ...]]
_THINGS: Final = ("the lamp", "the coat", "this kettle", "the hotel room", "the app", "their delivery", "the soup",
                  "the bicycle", "this guide book", "the concert", "the keyboard", "our waiter", "the tent",
                  "the course")  # fmt: skip
_NEW_THINGS: Final = ("the printer", "this backpack", "the ferry", "the museum shop", "the headset", "their hotline",
                      "the cake", "the garden hose")  # fmt: skip
_LEARNT: Final[_Words] = {
    "positive": (
        "works exactly as it should", "is better than we had hoped", "made everybody smile", "was worth every cent",
        "is a joy each morning", "could not be better", "is the best that I have had", "is wonderfully quiet",
        "surprised us in the best way", "is lovely and well made", "has never let me down", "was a real pleasure",
        "gets my warmest praise", "is fast, clean and friendly", "makes my life easier", "was simply delightful",
    ),
    "negative": (
        "broke after two days", "was late and nobody said sorry", "smells of burnt plastic", "is a waste of money",
        "was the worst of the whole trip", "never did what it should", "made me regret the choice", "is ugly and loud",
        "left all of us angry", "fell apart at once", "is much worse than promised", "was cold, slow and rude",
        "is not worth half its price", "ruined our evening", "stopped working in the first week", "was a bitter joke",
    ),
    "neutral": (
        "comes in a box of brown cardboard", "is blue on one side", "has three buttons", "was ordered on a Tuesday",
        "weighs about two kilos", "is next to the station", "was shown in the catalogue of May", "has a number on it",
        "is made in two sizes", "was built in 1998", "is for four people", "starts at half past seven",
        "belongs to my neighbour", "is listed on page twelve", "can be paid by card", "comes from the north",
    ),
}  # fmt: skip
_NEW: Final[_Words] = {
    "positive": (
        "is excellent", "runs like a charm", "was a great success with the children", "deserves all of its stars",
        "is the kindest and quickest I know", "turned out beautiful", "is good value and I am very happy",
        "was perfect from the first day",
    ),
    "negative": (
        "is terrible", "was dirty and far too small", "does not work and they refuse to pay me back",
        "is the biggest disappointment of the year", "kept failing", "was awful from the first day",
        "made us wait for hours for nothing", "is cheap rubbish",
    ),
    "neutral": (
        "is on the second floor", "has a cable of one metre", "was sent to the office", "opens at nine",
        "is sold in packs of six", "was photographed from above", "uses two batteries", "is between bank and park",
    ),
}  # fmt: skip
_PATTERNS: Final = ("{thing} {said}.", "After a month: {thing} {said}.", "For my sister: {thing} {said}.",
                    "{thing} {said}, as far as I can tell.", "We wrote it down: {thing} {said}.")  # fmt: skip
_NEW_PATTERNS: Final = ("{thing} {said}, that is all.", "Since you ask, {thing} {said}.",
                        "My review: {thing} {said}.")  # fmt: skip


def make(seed: int, source: Path | None = None) -> Splits:
    """405 sentences to learn from, 45 to choose by, and 150 of new words for the score."""
    del source
    chance = random.Random(seed)
    learnt = _rows(chance, _LEARNT, _THINGS, _PATTERNS, 450)
    return Splits(learnt[:405], learnt[405:], _rows(chance, _NEW, _NEW_THINGS, _NEW_PATTERNS, 150))


def _rows(
    chance: random.Random, words: _Words, things: tuple[str, ...], patterns: tuple[str, ...], count: int
) -> list[Row]:
    """Different sentences, as many of each tone."""
    rows: list[Row] = []
    for tone, judgements in words.items():
        every = [(pattern, thing, said) for pattern in patterns for thing in things for said in judgements]
        for pattern, thing, said in chance.sample(every, count // len(words)):
            text = pattern.format(thing=thing, said=said)
            rows.append({"text": text[0].upper() + text[1:], "label": tone})
    chance.shuffle(rows)
    return rows
