"""Sentences about travels as words, each with its tag: cities and people, in CoNLL's marks.

The test has cities, people and patterns that training has not.
"""

import random
from pathlib import Path
from typing import Final

from manylora.lifecycle.recipes.recipe import Row, Splits

_CITIES: Final = (
    "Vienna", "Porto", "Lyon", "Oslo", "Turin", "Ghent", "Krakow", "Bergen", "New York", "Buenos Aires", "Cape Town",
    "Hanoi", "Lima", "Tel Aviv", "Osaka", "Nairobi", "Toronto", "San Diego", "Delhi", "Athens", "Rio de Janeiro",
    "Leeds", "Kyoto", "Dallas", "Berlin", "Lisbon", "Mexico City", "Chicago", "Jakarta", "Prague", "Salt Lake City",
    "Manila", "Zurich", "Santiago", "Accra", "Glasgow", "Naples", "Istanbul", "San Jose", "Rotterdam", "Mumbai",
    "Helsinki", "Bogota", "Riga", "Las Vegas", "Bristol", "Addis Ababa", "Perth",
)  # fmt: skip
_NEW_CITIES: Final = ("Seville", "Gdansk", "Basel", "Los Angeles", "Ho Chi Minh City", "Melbourne", "Quito", "Cairo",
                      "Saint Petersburg", "Dublin", "Malmo", "Santa Fe")  # fmt: skip
_PEOPLE: Final = (
    "Lena Novak", "Omar Haddad", "Priya Nair", "Tom Becker", "Sofia", "Jan de Vries", "Mei Lin", "Silva",
    "Grace Okafor", "Pablo", "Ingrid Berg", "Kenji Mori", "Anna", "Samuel Stone", "Julia Weber", "Ahmed", "Clara Jones",
    "Igor Petrov", "Fatima Zahra", "David", "Marta Kowalska", "Li Wei", "John Miller", "Camille Laurent", "Diego Ruiz",
    "Yuki", "Olga van Houten", "Robert King", "Elena", "Amir Khan", "Mrs Brown", "Lucia Ferrari",
)  # fmt: skip
_NEW_PEOPLE: Final = ("Nora Lindqvist", "Karim Said", "Ewa", "Bruno Keller", "Hana Sato", "Peter van Dam",
                      "Miriam")  # fmt: skip
_PATTERNS: Final = (
    "{person} flew from {city} to {town} on Monday .",
    "Is there a night train between {city} and {town} ?",
    "In {city} , {person} met an old friend .",
    "{person} and {friend} moved to {city} last year .",
    "The letter of {person} was sent from {city} .",
    "We shall be in {city} in May and in {town} in June , if {person} agrees .",
    "Ask {person} about the weather before the ship leaves {city} .",
    "Nothing was said about the date or the price .",
    "The bus was late , so {person} took a taxi .",
    "{city} has two airports and a harbour .",
    "Last summer {person} drove through {city} and {town} with {friend} .",
    "How far is {town} from {city} by car ?",
    "{person} works for a bank in {city} .",
    "Tell {person} that the meeting in {city} begins at nine .",
    "We saw a good play with {person} and {friend} .",
    "The train to {city} leaves from the second platform .",
)
_NEW_PATTERNS: Final = (
    "Yesterday {person} missed the last ferry to {city} .",
    "{person} , who lives in {city} , wants to see {town} .",
    "Two tickets for {city} , please .",
    "From {city} it takes three hours , said {person} to {friend} .",
    "The museum is closed on Mondays .",
)


def make(seed: int, source: Path | None = None) -> Splits:
    """540 sentences to learn from, 60 to choose by, and 150 of new names for the score."""
    del source
    chance = random.Random(seed)
    learnt = _rows(chance, _CITIES, _PEOPLE, _PATTERNS, 600)
    return Splits(learnt[:540], learnt[540:], _rows(chance, _NEW_CITIES, _NEW_PEOPLE, _NEW_PATTERNS, 150))


def _rows(
    chance: random.Random, cities: tuple[str, ...], people: tuple[str, ...], patterns: tuple[str, ...], count: int
) -> list[Row]:
    """Different sentences, all but those without a name with names drawn by chance."""
    found: dict[str, Row] = {}
    while len(found) < count:
        city, town = chance.sample(cities, 2)
        person, friend = chance.sample(people, 2)
        row = _tagged(chance.choice(patterns), {"city": city, "town": town, "person": person, "friend": friend})
        found.setdefault(" ".join(row["tokens"]), row)
    return list(found.values())


def _tagged(pattern: str, names: dict[str, str]) -> Row:
    tokens, tags = list[str](), list[str]()
    for piece in pattern.split():
        name = piece.strip("{}")
        words = names[name].split() if name in names else [piece]
        kind = "" if name not in names else "city" if name in ("city", "town") else "person"
        tokens += words
        tags += [f"{'I' if number else 'B'}-{kind}" if kind else "O" for number in range(len(words))]
    return {"tokens": tokens, "tags": tags}
