"""What an adapter's version says of the requests that name it, as the catalog keeps it.

The catalog knows that it is an object of a bounded size, in one canonical text. What the names mean is the API's
(`api/defaults.py`), which is handed in as a `DefaultsCheck`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import orjson

from manylora.errors import InvalidAdapter, Problem
from manylora.identity import DEFAULTS_FILE, TEMPLATE_FILE

__all__ = ["NO_DEFAULTS", "DefaultsCheck", "canonical", "formerly", "not_used", "read_file", "shown", "with_template"]

MAX_DEFAULTS_BYTES: Final = 65_536
NO_DEFAULTS: Final = ""
_TEMPLATE: Final = "chat_template"

DefaultsCheck: TypeAlias = Callable[[Mapping[str, Any], str], Awaitable[None]]
"""Called with the object and the tenant whose adapter it is. Raises InvalidAdapter with every reason."""


def canonical(defaults: Mapping[str, Any]) -> str:
    """The one text of an object, empty for an empty one. Raises InvalidAdapter for one that is too large.

    Only the names of defaults are sorted: the order of a schema's properties is the order in which they are answered.
    """
    kept = {name: defaults[name] for name in sorted(defaults) if defaults[name] is not None}
    text = orjson.dumps(kept).decode() if kept else NO_DEFAULTS
    if len(text.encode()) > MAX_DEFAULTS_BYTES:
        raise _refused(f"The defaults have more than {MAX_DEFAULTS_BYTES} bytes of JSON. Shorten them.")
    return text


def formerly(text: str) -> str:
    """What earlier versions of this server called the same object, or others with its names in another order."""
    return orjson.dumps(orjson.loads(text), option=orjson.OPT_SORT_KEYS).decode() if text else text


def shown(text: str) -> dict[str, Any]:
    """The object of a canonical text."""
    found: dict[str, Any] = orjson.loads(text) if text else {}
    return found


def read_file(folder: Path) -> dict[str, Any] | None:
    """What `manylora.json` in an adapter's folder holds; None where there is none. Raises InvalidAdapter."""
    path = folder / DEFAULTS_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_DEFAULTS_BYTES:
        raise _refused(f"The file has more than {MAX_DEFAULTS_BYTES} bytes. Shorten it.")
    try:
        found = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise _refused(f"The file is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise _refused("The file must hold one JSON object.")
    return with_template(found, folder)


def with_template(defaults: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The defaults with the text of the template's file beside them, where they name that. Raises InvalidAdapter."""
    if defaults.get(_TEMPLATE) != TEMPLATE_FILE:
        return defaults
    path = folder / TEMPLATE_FILE
    if not path.is_file():
        raise _refused(f"It names {TEMPLATE_FILE}, and there is no such file beside it.")
    if path.stat().st_size > MAX_DEFAULTS_BYTES:
        raise _refused(f"{TEMPLATE_FILE} has more than {MAX_DEFAULTS_BYTES} bytes. Shorten it.")
    try:
        return {**defaults, _TEMPLATE: path.read_text(encoding="utf-8")}
    except UnicodeDecodeError:
        raise _refused(f"{TEMPLATE_FILE} is no UTF-8 text.") from None


def not_used(folder: Path, beside: Sequence[str]) -> list[str]:
    """Names of what lies beside an adapter's files, but for a template's file that its defaults name."""
    others = [name for name in beside if name != TEMPLATE_FILE]
    if not (folder / TEMPLATE_FILE).is_file():
        return others
    try:
        defaults = orjson.loads((folder / DEFAULTS_FILE).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        defaults = None
    is_used = isinstance(defaults, dict) and defaults.get(_TEMPLATE) == TEMPLATE_FILE
    return others if is_used else [*others, TEMPLATE_FILE]


def _refused(message: str) -> InvalidAdapter:
    return InvalidAdapter([Problem("bad_defaults", DEFAULTS_FILE, message)])
