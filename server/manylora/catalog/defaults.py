"""What an adapter's version says of the requests that name it, as the catalog keeps it.

The catalog knows that it is an object of a bounded size, in one canonical text. What the names mean is the API's
(`api/defaults.py`), which is handed in as a `DefaultsCheck`.
"""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import orjson

from manylora.errors import InvalidAdapter, Problem
from manylora.identity import DEFAULTS_FILE

__all__ = ["NO_DEFAULTS", "DefaultsCheck", "canonical", "read_file", "shown"]

MAX_DEFAULTS_BYTES: Final = 65_536
NO_DEFAULTS: Final = ""

DefaultsCheck: TypeAlias = Callable[[Mapping[str, Any], str], Awaitable[None]]
"""Called with the object and the tenant whose adapter it is. Raises InvalidAdapter with every reason."""


def canonical(defaults: Mapping[str, Any]) -> str:
    """The one text of an object, empty for an empty one. Raises InvalidAdapter for one that is too large."""
    kept = {name: value for name, value in defaults.items() if value is not None}
    text = orjson.dumps(kept, option=orjson.OPT_SORT_KEYS).decode() if kept else NO_DEFAULTS
    if len(text.encode()) > MAX_DEFAULTS_BYTES:
        raise _refused(f"The defaults have more than {MAX_DEFAULTS_BYTES} bytes of JSON. Shorten them.")
    return text


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
    return found


def _refused(message: str) -> InvalidAdapter:
    return InvalidAdapter([Problem("bad_defaults", DEFAULTS_FILE, message)])
