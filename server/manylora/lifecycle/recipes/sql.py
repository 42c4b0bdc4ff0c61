"""Questions about one table, answered with one SQL statement; schemas and questions are generated.

The tables of the test never occur in training, so what is scored is reading a new schema.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from manylora.lifecycle.recipes.recipe import Row, Splits


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its text columns with values to ask for, and its number columns with a range."""

    name: str
    texts: dict[str, tuple[str, ...]]
    numbers: dict[str, tuple[int, int]]


_CITIES = ("Berlin", "Paris", "Oslo", "Lima", "Cairo", "Quito")
TRAIN_TABLES = (
    Table("employees", {"name": ("Ann", "Bob"), "city": _CITIES}, {"salary": (1000, 9000), "age": (18, 65)}),
    Table(
        "books", {"title": ("Emma", "Dune"), "genre": ("crime", "poetry")}, {"pages": (50, 900), "year": (1900, 2020)}
    ),
    Table("cars", {"brand": ("Fiat", "Volvo"), "color": ("red", "blue")}, {"price": (500, 9000), "doors": (2, 5)}),
    Table("movies", {"title": ("Alien", "Jaws"), "director": ("Lee", "Kim")}, {"rating": (1, 10), "length": (60, 200)}),
    Table("orders", {"customer": ("Ada", "Max"), "status": ("open", "paid")}, {"total": (5, 900), "items": (1, 20)}),
    Table("students", {"name": ("Eva", "Tom"), "school": ("North", "East")}, {"grade": (1, 12), "points": (0, 100)}),
    Table(
        "flights", {"origin": _CITIES, "airline": ("Delta", "Iberia")}, {"distance": (100, 9000), "seats": (50, 400)}
    ),
    Table("houses", {"city": _CITIES, "style": ("modern", "old")}, {"rooms": (1, 12), "price": (50000, 900000)}),
    Table(
        "songs", {"artist": ("Abba", "Queen"), "genre": ("rock", "jazz")}, {"plays": (10, 9000), "year": (1950, 2020)}
    ),
    Table("pets", {"name": ("Rex", "Mia"), "species": ("dog", "cat")}, {"age": (1, 20), "weight": (1, 60)}),
    Table(
        "games", {"title": ("Chess", "Go"), "maker": ("Hasbro", "Piatnik")}, {"players": (1, 8), "minutes": (10, 240)}
    ),
    Table(
        "cities",
        {"country": ("Peru", "Chad"), "mayor": ("Diaz", "Roy")},
        {"population": (100, 90000), "area": (5, 900)},
    ),
)
TEST_TABLES = (
    Table("hotels", {"city": _CITIES, "chain": ("Hilton", "Ibis")}, {"stars": (1, 5), "beds": (10, 500)}),
    Table("plants", {"family": ("rose", "fern"), "color": ("green", "white")}, {"height": (1, 90), "leaves": (2, 400)}),
    Table("players", {"team": ("Reds", "Lions"), "name": ("Zoe", "Ivan")}, {"goals": (0, 60), "age": (16, 40)}),
    Table(
        "invoices", {"client": ("Acme", "Globex"), "state": ("sent", "late")}, {"amount": (10, 9000), "days": (1, 90)}
    ),
)


def make(seed: int, source: Path | None = None) -> Splits:
    """700 questions over twelve tables to learn from, 48 to choose by, 160 over four unseen tables for the score."""
    random_ = random.Random(seed)
    seen = _questions(TRAIN_TABLES, 748, random_)
    return Splits(seen[48:], seen[:48], _questions(TEST_TABLES, 160, random_))


def _questions(tables: tuple[Table, ...], count: int, random_: random.Random) -> list[Row]:
    found: dict[str, Row] = {}
    while len(found) < count:
        table = random_.choice(tables)
        question, sql = random_.choice(_KINDS)(table, random_)
        columns = ", ".join((*table.texts, *table.numbers))
        prompt = f"Table {table.name}({columns}). {question}"
        found[prompt] = {"prompt": prompt, "completion": sql}
    return list(found.values())


def _select(what: str, table: Table, *rest: str) -> str:
    return " ".join(("SELECT", what, "FROM", table.name, *rest)) + ";"


def _number(table: Table, random_: random.Random) -> tuple[str, int]:
    column = random_.choice(list(table.numbers))
    return column, random_.randint(*table.numbers[column])


def _text(table: Table, random_: random.Random) -> tuple[str, str]:
    column = random_.choice(list(table.texts))
    return column, random_.choice(table.texts[column])


def _above(table: Table, random_: random.Random) -> tuple[str, str]:
    column, value = _number(table, random_)
    word, sign = random_.choice((("more than", ">"), ("less than", "<"), ("at least", ">="), ("at most", "<=")))
    ask = random_.choice(("Show all {t} with {w} {v} {c}.", "List the {t} where {c} is {w} {v}."))
    return ask.format(t=table.name, w=word, v=value, c=column), _select("*", table, "WHERE", column, sign, str(value))


def _equal(table: Table, random_: random.Random) -> tuple[str, str]:
    column, value = _text(table, random_)
    wanted = random_.choice([*table.numbers, *table.texts])
    ask = random_.choice(("What is the {w} of the {t} with {c} {v}?", "Give the {w} of {t} whose {c} is {v}."))
    question = ask.format(w=wanted, t=table.name, c=column, v=value)
    return question, _select(wanted, table, "WHERE", column, "=", f"'{value}'")


def _count(table: Table, random_: random.Random) -> tuple[str, str]:
    column, value = _text(table, random_)
    question = random_.choice(("How many {t} have {c} {v}?", "Count the {t} with {c} {v}."))
    sql = _select("COUNT(*)", table, "WHERE", column, "=", f"'{value}'")
    return question.format(t=table.name, c=column, v=value), sql


def _aggregate(table: Table, random_: random.Random) -> tuple[str, str]:
    column, _ = _number(table, random_)
    word, function = random_.choice((("average", "AVG"), ("highest", "MAX"), ("lowest", "MIN"), ("total", "SUM")))
    question = random_.choice(("What is the {w} {c} of all {t}?", "Compute the {w} {c} over the {t}."))
    return question.format(w=word, c=column, t=table.name), _select(f"{function}({column})", table)


def _top(table: Table, random_: random.Random) -> tuple[str, str]:
    column, _ = _number(table, random_)
    count = random_.randint(2, 9)
    word, order = random_.choice((("highest", "DESC"), ("lowest", "ASC")))
    question = f"Show the {count} {table.name} with the {word} {column}."
    return question, _select("*", table, "ORDER BY", column, order, "LIMIT", str(count))


def _grouped(table: Table, random_: random.Random) -> tuple[str, str]:
    column = random_.choice(list(table.texts))
    number, _ = _number(table, random_)
    question = f"What is the average {number} of the {table.name} per {column}?"
    return question, _select(f"{column}, AVG({number})", table, "GROUP BY", column)


_KINDS = (_above, _above, _equal, _count, _aggregate, _top, _grouped)
