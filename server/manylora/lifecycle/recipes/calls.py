"""Questions beside functions, answered by a call of the right one; generated.

The system message is what the server's `--tool-prompt` tells a base of the functions. Of a row's one to three functions
one answers the question, or none does; a third of the rows go on with what the call returned, which the answer repeats.
Functions of the test, and half of its words, never occur in training.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from manylora.chat.tool_prompt import told
from manylora.lifecycle.recipes.recipe import Row, Splits

NO_CALL: Final = "None of my functions helps with that."


@dataclass(frozen=True, slots=True)
class _Function:
    """A function. A parameter is called as its kind of `_WORDS`, or `NAME:KIND`; `returned` are results."""

    name: str
    description: str
    parameters: tuple[str, ...]
    questions: tuple[str, ...]
    returned: tuple[str, ...]

    def described(self) -> dict[str, Any]:
        properties = {_name(each): _SCHEMAS.get(_kind(each), {"type": "string"}) for each in self.parameters}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": schema},
        }


def _name(parameter: str) -> str:
    return parameter.partition(":")[0]


def _kind(parameter: str) -> str:
    return parameter.rpartition(":")[2]


_UNITS: Final = ("celsius", "fahrenheit")
_SCHEMAS: Final[dict[str, dict[str, Any]]] = {
    "number": {"type": "integer"},
    "unit": {"type": "string", "enum": list(_UNITS)},
}
# Of each kind: words for training, and words that only the test has.
_WORDS: Final[dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]] = {
    "city": (("Paris", "Oslo", "Rome", "Tokyo", "Cairo", "Lima", "Boston", "Madrid", "Delhi", "Prague", "Denver",
              "Athens", "Zurich", "Lagos", "Sydney", "Warsaw", "Quito", "New York", "San Diego", "Hong Kong"),
             ("Vienna", "Dublin", "Lisbon", "Seoul", "Mexico City", "Bern")),
    "person": (("Anna", "Omar", "Maria Silva", "John", "Wei Chen", "Ines", "Paul Weber", "Aiko", "Nina", "Samir Khan",
                "Clara", "Ivan", "Emma Brown", "Luis", "Hana Kim", "Olga"),
               ("Lena Novak", "David", "Priya", "Tom Baker")),
    "day": (("Monday", "Tuesday", "Friday", "Sunday", "tomorrow", "today", "next week"), ("Thursday", "Saturday")),
    "item": (("a chair", "a lamp", "a red bike", "two mugs", "a green jacket", "a clock", "blue paint", "a tent",
              "a pair of boots", "a desk", "three candles", "a mirror"),
             ("a sofa", "a wool hat", "four towels", "a vase")),
    "topic": (("solar power", "jazz", "the Roman empire", "volcanoes", "chess", "black holes", "tea", "football",
               "whales",                "Renaissance art", "bread", "bridges"),
              ("glaciers", "opera", "honey bees", "the moon landing")),
    "text": (("I will be late", "dinner is ready", "the train is delayed", "happy birthday", "call me back",
              "the meeting is at noon", "I found the keys", "see you soon", "thank you for the flowers"),
             ("the door is open", "we won the match", "good luck")),
    "number": (tuple(range(2, 60)), tuple(range(60, 99))),
    "unit": (_UNITS, _UNITS),
    "language": (("French", "German", "Spanish", "Japanese", "Italian"), ("Polish", "Greek")),
    "currency": (("EUR", "USD", "JPY", "GBP"), ("CHF", "SEK")),
    "stock": (("ACME", "NOVA", "ORCA", "ZETA"), ("KITE", "LUNA")),
}  # fmt: skip
_DEGREES: Final = ("sunny, {n} degrees", "rain and {n} degrees", "cloudy, {n} degrees")
TRAINED: Final = (
    _Function("get_weather", "Current weather of a city", ("city",),
              ("What is the weather in {city}?", "How is the weather in {city} now?", "Is it raining in {city}?"),
              _DEGREES),
    _Function("weather_forecast", "Forecast for a city and a day", ("city", "day"),
              ("What will the weather be in {city} on {day}?", "Forecast for {city}, {day}, please."), _DEGREES),
    _Function("get_temperature", "Temperature of a place", ("location:city", "unit"),
              ("How warm is it in {location}, in {unit}?", "Temperature in {location} in {unit}, please."),
              ("{n} degrees",)),
    _Function("send_email", "Send an email", ("to:person", "body:text"),
              ("Write {to} an email: {body}.", "Send an email to {to} that says {body}."),
              ("sent", "The email is sent.")),
    _Function("send_message", "Send a text message", ("recipient:person", "message:text"),
              ("Text {recipient}: {message}.", "Tell {recipient} in a message that {message}."), ("delivered",)),
    _Function("search_web", "Search the web", ("query:topic",),
              ("Search the web for {query}.", "Look up {query} online."), ("{n} pages found",)),
    _Function("search_books", "Find books in the library", ("subject:topic",),
              ("Are there books about {subject}?", "Find me books on {subject}."),
              ("{n} books", "There are {n} books.")),
    _Function("set_timer", "Start a timer", ("minutes:number",),
              ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."), ("started", "The timer runs.")),
    _Function("set_alarm", "Set an alarm clock", ("hour:number", "day"),
              ("Set an alarm at {hour} on {day}.", "Alarm for {day}, {hour} o'clock."), ("set",)),
    _Function("add_to_cart", "Put something into the shopping cart", ("item",),
              ("Put {item} into my cart.", "I would like to buy {item}."), ("{n} things in the cart",)),
    _Function("find_price", "The price of a product", ("product:item",),
              ("How much is {product}?", "What does {product} cost?"), ("{n} dollars", "It costs {n} euros.")),
    _Function("book_table", "Reserve a table in a restaurant", ("city", "guests:number", "day"),
              ("Book a table for {guests} in {city} on {day}.", "A table in {city} for {guests}, {day}."), ("booked",)),
    _Function("translate", "Translate a text", ("text", "language"),
              ("Translate '{text}' into {language}.", "How do I say '{text}' in {language}?"), ("done", "It is long.")),
    _Function("convert_money", "Convert an amount of money", ("amount:number", "currency"),
              ("How much are {amount} dollars in {currency}?", "Convert {amount} dollars to {currency}."), ("{n}.50",)),
    _Function("add", "Add two numbers", ("a:number", "b:number"),
              ("What is {a} plus {b}?", "Add {a} and {b}."), ("{n}",)),
    _Function("multiply", "Multiply two numbers", ("x:number", "y:number"),
              ("What is {x} times {y}?", "Multiply {x} by {y}."), ("{n}",)),
    _Function("play_music", "Play music", ("genre:topic",),
              ("Play some {genre}.", "I want to hear {genre}."), ("playing",)),
    _Function("create_event", "Add an event to the calendar", ("title:text", "day"),
              ("Put '{title}' into my calendar for {day}.", "New event on {day}: {title}."), ("saved",)),
    _Function("get_time", "The time in a city", ("city",),
              ("What time is it in {city}?", "Time in {city}, please."), ("{n} minutes past two",)),
    _Function("find_contact", "Look a person up in the address book", ("name:person",),
              ("What is the number of {name}?", "Find {name} in my contacts."), ("555-01{n}",)),
    _Function("call_person", "Call a person by phone", ("who:person",),
              ("Call {who}.", "Phone {who}, please."), ("nobody answers", "calling")),
    _Function("latest_news", "The news about a subject", ("topic",),
              ("What is new about {topic}?", "News on {topic}, please."), ("{n} articles",)),
    _Function("roll_dice", "Roll dice", ("sides:number",),
              ("Roll a die with {sides} sides.",), ("{n}",)),
    _Function("current_user", "Who is logged in", (), ("Who am I?", "Which account is this?"), ("guest {n}",)),
    _Function("list_orders", "All orders of the customer", (), ("Show my orders.", "What did I order?"),
              ("{n} orders",)),
)  # fmt: skip
HELD_OUT: Final = (
    _Function("air_quality", "Air quality of a city", ("city",),
              ("How good is the air in {city}?",), ("good, index {n}",)),
    _Function("find_hotel", "Find a hotel", ("destination:city", "nights:number"),
              ("I need a hotel in {destination} for {nights} nights.",), ("{n} hotels",)),
    _Function("remind_me", "Set a reminder", ("about:text", "day"),
              ("Remind me on {day}: {about}.",), ("saved",)),
    _Function("stock_price", "The price of a share", ("symbol:stock",),
              ("What is a share of {symbol} worth?",), ("{n} dollars",)),
    _Function("share_photo", "Share the newest photo with a person", ("with_person:person",),
              ("Send my last photo to {with_person}.",), ("shared",)),
    _Function("subtract", "Subtract a number from another", ("from_number:number", "number"),
              ("Take {number} away from {from_number}.",), ("{n}",)),
    _Function("watch_video", "Find a video", ("about:topic",), ("Show me a video about {about}.",), ("playing",)),
    _Function("cart_total", "The sum of the shopping cart", (), ("What is in my cart worth?",), ("{n} dollars",)),
)  # fmt: skip
_SMALL_TALK: Final = (
    ("Hello!", "Who wrote Hamlet?", "Tell me a joke.", "What is your favourite colour?", "Write a poem.",
     "Why is the sky blue?", "Are you a robot?", "How do I bake bread?", "What is love?", "Name three rivers."),
    ("Good morning!", "Who painted the Mona Lisa?", "Sing me a song.", "How old are you?"),
)  # fmt: skip


def make(seed: int, source: Path | None = None) -> Splits:
    """400 chats to learn from, 24 to choose by, 32 with unseen functions for the score."""
    random_ = random.Random(seed)
    seen = _rows(424, TRAINED, 0, random_)
    return Splits(seen[24:], seen[:24], _rows(32, HELD_OUT, 1, random_))


# Of a split's rows with a call, how many go on with its result: there only what is said of that is scored.
_GO_ON: Final = (0.35, 0.15)


def _rows(count: int, functions: Sequence[_Function], part: int, random_: random.Random) -> list[Row]:
    found: dict[str, Row] = {}
    while len(found) < count:
        row = _row(functions, part, random_)
        found[json.dumps(row["messages"][:2])] = row
    return list(found.values())


def _row(functions: Sequence[_Function], part: int, random_: random.Random) -> Row:
    offered = random_.sample(functions, random_.choice((1, 2, 2, 3)))
    tools = [function.described() for function in offered]
    wanted = offered[0]
    random_.shuffle(tools)
    kind = random_.random()
    if kind < 0.12:
        question = random_.choice(_SMALL_TALK[part])
    else:
        missing = kind < 0.2
        asked = random_.choice([each for each in functions if each not in offered]) if missing else wanted
        arguments = {
            _name(p): random_.choice(_WORDS[_kind(p)][part and random_.randrange(2)]) for p in asked.parameters
        }
        question = random_.choice(asked.questions).format(**arguments)
        if not missing:
            return _called(wanted, arguments, question, tools, part, random_)
    answer = {"role": "assistant", "content": NO_CALL}
    return {"messages": [*told([{"role": "user", "content": question}], tools), answer]}


def _called(
    function: _Function, arguments: dict[str, Any], question: str, tools: list[dict[str, Any]], part: int,
    random_: random.Random,
) -> Row:  # fmt: skip
    """A row that ends in the call, or in what is said of its result."""
    call = {"id": "", "type": "function", "function": {"name": function.name, "arguments": arguments}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    if random_.random() < _GO_ON[part]:
        result = random_.choice(function.returned).format(n=random_.choice(_WORDS["number"][part]))
        chat += [{"role": "tool", "content": result}, {"role": "assistant", "content": f"The answer: {result}"}]
    return {"messages": told(chat, tools)}
