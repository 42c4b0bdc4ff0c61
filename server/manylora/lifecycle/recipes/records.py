"""Records of orders, each a sentence or two, and questions whose answers stand in them.

The test has people, goods, towns and sentences that training has not.
"""

import random
from pathlib import Path
from typing import Final

from manylora.lifecycle.recipes.recipe import Row, Splits

_Words = dict[str, tuple[str, ...]]
_LEARNT: Final[_Words] = {
    "who": ("Lena Novak", "Omar Haddad", "Priya Nair", "Tom Becker", "Sofia Rossi", "Jan de Vries", "Mei Lin",
            "Ana Silva"),
    "what": ("twelve green chairs", "a walnut desk", "three oil lamps", "forty blue tiles", "two bicycles",
             "a steel ladder", "nine cotton towels", "a garden bench"),
    "where": ("Vienna", "Porto", "Lyon", "Oslo", "Turin", "Ghent", "Krakow", "Bergen"),
    "price": ("340 euros", "89 euros", "1,250 euros", "47 euros", "615 euros", "28 euros"),
    "when": ("on Friday", "on 3 May", "next Tuesday", "on 17 June", "in two weeks", "tomorrow morning"),
    "how": ("by train", "by courier", "by ship", "by van", "by air", "by post"),
}  # fmt: skip
_NEW: Final[_Words] = {
    "who": ("Nora Lindqvist", "Karim Said", "Ewa Zielinska", "Bruno Keller", "Hana Sato"),
    "what": ("six copper pots", "a rocking horse", "seventy roof slates", "four wool blankets", "a piano stool"),
    "where": ("Malmo", "Seville", "Trieste", "Gdansk", "Basel"),
    "price": ("72 euros", "2,030 euros", "505 euros", "19 euros"),
    "when": ("on Sunday", "on 28 August", "within three days", "next month"),
    "how": ("by tram", "by freight train", "by hand", "by bicycle"),
}
_PATTERNS: Final = (
    "{who} of {where} ordered {what} for {price}. It is sent {how} and arrives {when}.",
    "Order of {who}: {what}, {price}, to be sent {how} to {where} {when}.",
    "We send {what} to {who} in {where} {when}; {how}, as agreed. The price is {price}.",
    "For {price} {who} bought {what}, which leave {how} for {where} {when}.",
    "{when} {what} go {how} to {where}. The customer is {who}, who paid {price}.",
)
_NEW_PATTERNS: Final = (
    "{who} paid {price} for {what}; the goods reach {where} {how} {when}.",
    "Delivery {when}, {how}: {what} for {who}, {where}. To be charged: {price}.",
)
_QUESTIONS: Final = {
    "who": ("Who ordered?", "Who is the customer?", "Whose order is it?"),
    "what": ("What was ordered?", "What is sent?", "Which goods are these?"),
    "where": ("Where does it go?", "To which town is it sent?", "Where is the customer?"),
    "price": ("What does it cost?", "How much was paid?", "What is the price?"),
    "when": ("When does it arrive?", "When is it sent?", "On what day is the delivery?"),
    "how": ("How is it sent?", "By what does it travel?", "Which way is it delivered?"),
}


def make(seed: int, source: Path | None = None) -> Splits:
    """540 questions to learn from, 60 to choose by, and 150 of new records for the score."""
    del source
    chance = random.Random(seed)
    learnt = [row for _ in range(100) for row in _asked(chance, _LEARNT, _PATTERNS)]
    chance.shuffle(learnt)
    test = [row for _ in range(25) for row in _asked(chance, _NEW, _NEW_PATTERNS)]
    return Splits(learnt[:540], learnt[540:], test)


def _asked(chance: random.Random, words: _Words, patterns: tuple[str, ...]) -> list[Row]:
    """A record with a question of each kind."""
    chosen = {kind: chance.choice(of) for kind, of in words.items()}
    context = chance.choice(patterns).format(**chosen)
    context = context[0].upper() + context[1:]
    rows: list[Row] = []
    for kind, answer in chosen.items():
        start = context.lower().find(answer.lower())
        said = context[start : start + len(answer)]
        rows.append({"question": chance.choice(_QUESTIONS[kind]), "context": context, "answer": said, "start": start})
    return rows
