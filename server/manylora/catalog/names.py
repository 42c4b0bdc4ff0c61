"""What an adapter may be called."""

import re
from typing import Final

from manylora.errors import InvalidRequest

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(name: str, *, reserved: str) -> None:
    """Raises InvalidRequest. `reserved` is the base model's name, which must go on meaning the base."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "'name' must be 1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit.", param="name"
        )
    if name == reserved:
        raise InvalidRequest(f"'{name}' is the base model's name; give the adapter another one.", param="name")
