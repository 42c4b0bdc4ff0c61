"""A catalogue of films that never were, and a person who likes some of them, which is learnt from pairs.

A film is a sentence of a kind, a hero, a place and a manner. A person has weights for kinds and manners, and likes
what comes to more than nothing. The test's films have heroes and places that training has not, and kinds and manners
that it has not together.
"""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from manylora.lifecycle.recipes.recipe import Row, Splits

_KINDS: Final = (
    "science fiction",
    "war drama",
    "romance",
    "documentary",
    "thriller",
    "comedy",
    "western",
    "fairy tale",
)
_MANNERS: Final = ("slow and quiet", "loud and fast", "gloomy", "cheerful", "bloody", "tender")
_HEROES: Final = ("a lighthouse keeper", "two sisters", "a retired spy", "an old dog", "a young surgeon",
                  "a clockmaker", "a stubborn queen", "a lost robot", "a fisherman", "a band of thieves")  # fmt: skip
_PLACES: Final = ("on Mars", "in Lisbon", "in a snowed-in hotel", "on a river boat", "in the desert", "under the sea",
                  "in a small village", "on a night train")  # fmt: skip
_NEW_HEROES: Final = ("a beekeeper", "three brothers", "a blind pianist", "a tired detective", "a circus bear")
_NEW_PLACES: Final = ("on the moon", "in Naples", "in an empty school", "on an island", "in the mountains")
_WEIGHTS: Final[Mapping[str, Mapping[str, int]]] = {
    "ada": {"science fiction": 3, "documentary": 2, "fairy tale": 1, "war drama": -3, "romance": -2, "western": -1,
            "slow and quiet": 2, "tender": 1, "loud and fast": -2, "bloody": -3},
}  # fmt: skip
_ASKED: Final = (
    "What shall I watch tonight?", "Recommend me a film.", "Something that I would like, please.", "A film for me.",
    "What is on that suits me?", "Which of these is my kind of film?", "Find me a good film.",
    "What should I see next?",
)  # fmt: skip
_Film = tuple[str, int]  # what is said of it, and what it comes to


def maker(user: str) -> Callable[[int, Path | None], Splits]:
    """What makes the pairs of a person."""

    def make(seed: int, source: Path | None = None) -> Splits:
        del source
        return _pairs(user, random.Random(seed))

    return make


def _pairs(user: str, chance: random.Random) -> Splits:
    """480 pairs to learn from, 60 to choose by, and 8 questions with 20 films liked and 20 not for the score."""
    mixed = [(kind, manner) for kind in _KINDS for manner in _MANNERS]
    chance.shuffle(mixed)
    held_out, learnt = mixed[:16], mixed[16:]
    known = _films(user, chance, learnt, _HEROES, _PLACES, 12)
    new = _films(user, chance, held_out, _NEW_HEROES, _NEW_PLACES, 12)
    rows = [_row(chance, *_drawn(chance, known)) for _ in range(540)]
    test: list[Row] = []
    for asked in _ASKED:
        liked, others = ([film for film, value in new if (value > 0) == is_liked] for is_liked in (True, False))
        count = min(20, len(liked), len(others))
        pairs = zip(chance.sample(liked, count), chance.sample(others, count), strict=True)
        test += [{"anchor": asked, "positive": good, "negative": bad} for good, bad in pairs]
    return Splits(rows[:480], rows[480:], test)


def _films(
    user: str,
    chance: random.Random,
    mixed: list[tuple[str, str]],
    heroes: tuple[str, ...],
    places: tuple[str, ...],
    count: int,
) -> list[_Film]:
    """So many films of each kind and manner that the person is not indifferent to."""
    weights = _WEIGHTS[user]
    found: dict[str, int] = {}
    for kind, manner in mixed:
        value = weights.get(kind, 0) + weights.get(manner, 0)
        for _ in range(count if value else 0):
            article = "An" if manner[0] in "aeiou" else "A"
            said = f"{article} {manner} {kind} about {chance.choice(heroes)} {chance.choice(places)}."
            found[said] = value
    return list(found.items())


def _drawn(chance: random.Random, films: list[_Film]) -> tuple[str, str]:
    liked, others = ([film for film, value in films if (value > 0) == is_liked] for is_liked in (True, False))
    return chance.choice(liked), chance.choice(others)


def _row(chance: random.Random, good: str, bad: str) -> Row:
    return {"anchor": chance.choice(_ASKED), "positive": good, "negative": bad}
