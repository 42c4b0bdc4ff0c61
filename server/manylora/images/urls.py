"""Images in data URLs, `data:image/png;base64,…`."""

import binascii
from typing import Final

from manylora.errors import InvalidImage, quoted

__all__ = ["SCHEME", "data_of"]

SCHEME: Final = "data:"
MAX_URL_HEADER: Final = 128  # characters of a data URL before its data
_BASE64: Final = ";base64"


def data_of(url: str) -> bytes:
    """The bytes that a data URL holds. Raises InvalidImage for another URL: an address is never fetched."""
    head, comma, _ = url[:MAX_URL_HEADER].partition(",")
    if not head.lower().startswith(SCHEME):
        if url[:8].lower().startswith(("http:", "https:", "file:", "ftp:")):
            raise InvalidImage(f"An address is not fetched: '{quoted(url)}'. Send the image as data:image/png;base64,…")
        raise InvalidImage(f"It must be a data URL, data:image/png;base64,…, and not '{quoted(url)}'.")
    if not comma or not head.lower().endswith(_BASE64):
        raise InvalidImage(f"A data URL must have its data in base64: data:image/png;base64,…, not '{quoted(url)}'.")
    try:
        return binascii.a2b_base64(url[len(head) + 1 :], strict_mode=True)
    except ValueError as error:
        raise InvalidImage(f"The data of the URL is no base64: {error}.") from None
