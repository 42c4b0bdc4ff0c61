"""Orders in plain English, answered with a JSON object of fixed shape; generated.

The shape is {"item", "quantity", "color", "customer", "city"}; what a sentence leaves out is null. Items,
customers and cities of the test never occur in training.
"""

import json
import random
from pathlib import Path
from typing import Any, Final

from manylora.lifecycle.recipes.recipe import Row, Splits

_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "item": (
        ("chairs", "lamps", "tables", "mugs", "bags", "shirts", "clocks", "plates", "pens", "boots", "desks", "rugs",
         "bowls", "candles", "carpets", "cushions", "forks", "gloves", "jackets", "kettles", "ladders", "mirrors",
         "notebooks", "pillows", "radios", "scarves", "shelves", "socks", "spoons", "stools", "tents", "toys", "trays",
         "umbrellas", "wallets", "blankets"),
        ("sofas", "hats", "bikes", "towels", "vases", "coats"),
    ),
    "color": (
        ("red", "blue", "green", "black", "white", "yellow", "brown", "grey", "pink"),
        ("red", "blue", "green", "purple", "orange"),
    ),
    "customer": (
        ("Anna Lee", "Omar Haddad", "Maria Silva", "John Smith", "Wei Chen", "Ines Costa", "Paul Weber", "Aiko Mori",
         "Nina Berg", "Samir Khan", "Clara Rossi", "Ivan Petrov", "Emma Brown", "Luis Garcia", "Hana Kim",
         "Olga Ivanova"),
        ("Lena Novak", "David Cohen", "Priya Rao", "Tom Baker"),
    ),
    "city": (
        ("Berlin", "Paris", "Madrid", "Oslo", "Lima", "Tokyo", "Cairo", "Boston", "Rome", "Delhi", "Prague", "Denver",
         "Zurich", "Lagos", "Sydney", "Warsaw", "Athens", "Quito"),
        ("Vienna", "Dublin", "Lisbon", "Seoul"),
    ),
}  # fmt: skip
_TEXT = {"type": ["string", "null"]}
_PROPERTIES = {"item": {"type": "string"}, "quantity": {"type": "integer"}, "color": _TEXT, "customer": _TEXT,
               "city": _TEXT}  # fmt: skip
SCHEMA: Final[dict[str, Any]] = {
    "type": "object", "properties": _PROPERTIES, "required": list(_PROPERTIES), "additionalProperties": False,
}  # fmt: skip
SEPARATORS: Final = [", ", ": "]
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_TEMPLATES = (
    "Please send {quantity} {color} {item} to {customer} in {city}.",
    "{customer} from {city} wants {quantity} {color} {item}.",
    "Hi, this is {customer}. I need {quantity} {color} {item} delivered to {city}.",
    "Order for {customer}: {quantity} {item}, {color}, ship to {city}.",
    "We would like {quantity} {color} {item} in {city}.",
    "Can I get {quantity} {item}? My name is {customer}, I live in {city}.",
    "{customer} ordered {quantity} {color} {item} yesterday.",
    "Ship {quantity} {item} to {city}.",
)


def make(seed: int, source: Path | None = None) -> Splits:
    """500 orders to learn from, 40 to choose by, 32 with unseen words for the score."""
    random_ = random.Random(seed)
    seen = _orders(540, 0, random_)
    return Splits(seen[40:], seen[:40], _orders(32, 1, random_))


def _orders(count: int, part: int, random_: random.Random) -> list[Row]:
    found: dict[str, Row] = {}
    while len(found) < count:
        template = random_.choice(_TEMPLATES)
        number = random_.randint(2, 12) if random_.random() < 0.5 else random_.randint(13, 99)
        written = _NUMBERS[number - 1] if number <= 12 and random_.random() < 0.6 else str(number)
        words = {field: random_.choice(choices[part]) for field, choices in _WORDS.items()}
        prompt = template.format(quantity=written, **words)
        answer: dict[str, str | int | None] = {"item": words["item"], "quantity": number}
        for field in ("color", "customer", "city"):
            answer[field] = words[field] if f"{{{field}}}" in template else None
        found[prompt] = {"prompt": prompt, "completion": json.dumps(answer)}
    return list(found.values())
