"""An adapter's card: the README.md that came with its files, kept for each version as the text that it is.

A card describes and does nothing: the same content with another card is the same version, which has the newer card.
What a card says is a stranger's word, so nothing here follows it; whoever shows it makes text of it.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml
from sqlalchemy import select

from manylora.database.database import Database
from manylora.database.tables import VersionRow
from manylora.identity import CARD_FILE

__all__ = ["card_of", "examples_of", "lineage_in", "read_card", "texts_of"]

MAX_CARD_BYTES: Final = 131_072
MAX_FRONT_MATTER: Final = 16_384  # characters
MAX_FRONT_MATTER_DEPTH: Final = 20
MAX_EXAMPLES: Final = 8
MAX_LINEAGE_COMMAND: Final = 1000  # characters
MAX_LINEAGE_SCORES: Final = 16
MAX_SCORE_NAME: Final = 64  # characters
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_FENCE: Final = "---\n"


def read_card(folder: Path) -> tuple[str | None, str | None]:
    """The card in an adapter's folder and what is wrong with it, as a warning; None for either that there is not."""
    path = folder / CARD_FILE
    if not path.is_file():
        return None, None
    if path.stat().st_size > MAX_CARD_BYTES:
        return None, f"{CARD_FILE} has more than {MAX_CARD_BYTES} bytes and is not kept as the card. Shorten it."
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        return None, f"{CARD_FILE} is no UTF-8 text and is not kept as the card."
    return text.replace("\r\n", "\n"), None


def card_of(database: Database, version_id: str) -> str:
    """A version's card, empty where it has none or is gone."""
    with database.read() as session:
        return session.execute(select(VersionRow.card).where(VersionRow.id == version_id)).scalar_one_or_none() or ""


def texts_of(database: Database, version_id: str) -> tuple[str, str]:
    """A version's card and its vocabulary (`identity.Vocabulary`), empty where it has none or is gone."""
    query = select(VersionRow.card, VersionRow.vocabulary).where(VersionRow.id == version_id)
    with database.read() as session:
        found = session.execute(query).one_or_none()
    return ("", "") if found is None else (found.card, found.vocabulary)


def examples_of(card: str) -> list[str]:
    """Prompts to try, from the `widget` of the card's front matter, as on the Hugging Face hub; none of a broken one.

    Its nodes are read and no objects made of them, so aliases cost nothing. Runs in Python: call it from a thread.
    """
    rows = _value(_front_matter(card), "widget")
    found = filter(None, map(_prompt_of, rows.value if isinstance(rows, yaml.SequenceNode) else ()))
    return [text for text, _ in zip(found, range(MAX_EXAMPLES), strict=False)]


def lineage_in(card: str) -> str:
    """How the version was made, from the `lineage` of the card's front matter: a JSON object, "" where it is not said.

    `command` that made it, `data_sha256` and `eval_sha256` of the files that it learnt from and was watched on, and
    `scores` by name. What has another form is left out. Runs in Python: call it from a thread.
    """
    said = _value(_front_matter(card), "lineage")
    found: dict[str, Any] = {}
    if command := _text(_value(said, "command")).strip():
        found["command"] = command[:MAX_LINEAGE_COMMAND]
    for name in ("data_sha256", "eval_sha256"):
        if _DIGEST.fullmatch(digest := _text(_value(said, name))):
            found[name] = digest
    if scores := _scores(_value(said, "scores")):
        found["scores"] = scores
    return json.dumps(found, ensure_ascii=False) if found else ""


def _scores(node: yaml.Node | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        text = _text(name)
        try:
            number = float(_text(value))
        except ValueError:
            continue
        if 0 < len(text) <= MAX_SCORE_NAME and math.isfinite(number) and len(found) < MAX_LINEAGE_SCORES:
            found[text] = number
    return found


def _front_matter(card: str) -> yaml.Node | None:
    """What stands between the fences; None where that is nothing, too long, too deep or no YAML."""
    head, fence, _ = card.removeprefix(_FENCE).partition(f"\n{_FENCE}")
    if not card.startswith(_FENCE) or not fence or len(head) > MAX_FRONT_MATTER:
        return None
    try:
        root: yaml.Node | None = yaml.compose(head, Loader=yaml.SafeLoader) if _is_shallow(head) else None
    except (yaml.YAMLError, ValueError, OverflowError):  # its numbers of versions and characters are unchecked
        return None
    return root


def _is_shallow(head: str) -> bool:
    """Whether composing it takes a bounded time: each level is a call in a call."""
    depth = 0
    for event in yaml.parse(head, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_FRONT_MATTER_DEPTH:
            return False
    return True


def _prompt_of(row: yaml.Node) -> str:
    """The text of one example, or what the user says last in its messages."""
    text = _value(row, "text")
    messages = _value(row, "messages")
    if text is None and isinstance(messages, yaml.SequenceNode):
        users = (m for m in reversed(messages.value) if _text(_value(m, "role")) == "user")
        text = _value(next(users, None), "content")
    return _text(text).strip()


def _text(node: yaml.Node | None) -> str:
    text = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
    return "" if any("\ud800" <= char <= "\udfff" for char in text) else text  # half a character can be sent to nobody


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    pairs: Iterator[tuple[yaml.Node, yaml.Node]] = iter(node.value if isinstance(node, yaml.MappingNode) else ())
    return next((value for name, value in pairs if _text(name) == key), None)
