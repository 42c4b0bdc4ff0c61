"""A stranger's file of an image becomes RGB pixels, within bounds on time and memory.

Pillow knows many kinds of files more than are taken: only what begins as PNG, JPEG, WebP, GIF or BMP does comes to it,
to the reader of that kind alone. A header is believed only as far as its size is small, and nothing is unpacked before.
"""

from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

from manylora.errors import InvalidImage
from manylora.packages import install_command

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["missing_packages", "read"]

MAX_IMAGE_PIXELS: Final = 2**25
MAX_IMAGE_RATIO: Final = 50  # of the longer side to the shorter one, which a processor may bring to its own size
MAX_JPEG_SCANS: Final = 100  # of a progressive file, each of which is a pass over all pixels
MAX_MESSAGE: Final = 100  # characters of Pillow's own words
_TAKEN: Final = "PNG, JPEG, WebP, GIF or BMP"


def missing_packages() -> str | None:
    """What a server of a model of images lacks, and the command that installs it; None where all is there."""
    if find_spec("PIL") is not None:
        return None
    return f"Models of images need Pillow. Install it: {install_command('PIL')}"


def read(data: bytes) -> "Image":
    """The image of a file, upright as its EXIF data says, in RGB. Raises InvalidImage."""
    opened = _opener(data)
    try:
        return _upright(opened(BytesIO(data)))
    except InvalidImage:
        raise
    except Exception as error:  # noqa: BLE001 - of a reader of strangers' bytes, which raises what it likes
        said = str(error).strip().partition("\n")[0][:MAX_MESSAGE].rstrip(". ")
        raise _refusal(f"cannot be read: {said or type(error).__name__}. Send a whole file of {_TAKEN}") from None


def _upright(image: Any) -> "Image":
    """The one picture of an opened file. Raises InvalidImage before anything is unpacked, and what Pillow does."""
    from PIL import ImageOps

    _check_size(*image.size)
    if getattr(image, "is_animated", False):
        raise _refusal("is animated, and a model sees one picture. Send one frame")
    image.load()
    found: Image = ImageOps.exif_transpose(image).convert("RGB")
    return found


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise _refusal(f"has {width} x {height} pixels; at most {MAX_IMAGE_PIXELS} are read. Make it smaller")
    if not width or not height or max(width, height) > MAX_IMAGE_RATIO * min(width, height):
        raise _refusal(
            f"has {width} x {height} pixels; the longer side may be {MAX_IMAGE_RATIO} times the shorter one. Cut it"
        )


def _opener(data: bytes) -> Callable[[BytesIO], Any]:
    """The reader of the kind of file that the first bytes say it is. Raises InvalidImage."""
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        if data.count(b"\xff\xda") > MAX_JPEG_SCANS:  # data of the picture never has these two bytes
            raise _refusal(f"has more than {MAX_JPEG_SCANS} scans. Save it as a plain JPEG")
        return JpegImagePlugin.JpegImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _check_size(*_webp_size(data))  # its reader makes room for the whole picture as it opens the file
        return WebPImagePlugin.WebPImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile
    raise _refusal(f"is none: it begins as no file of {_TAKEN} does. Send one of these")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height by the first chunk's header. Raises InvalidImage."""
    kind, rest = data[12:16], data[20:30]
    if len(rest) == 10:
        if kind == b"VP8X":
            return 1 + int.from_bytes(rest[4:7], "little"), 1 + int.from_bytes(rest[7:10], "little")
        if kind == b"VP8L":
            bits = int.from_bytes(rest[1:5], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if kind == b"VP8 ":
            return int.from_bytes(rest[6:8], "little") & 0x3FFF, int.from_bytes(rest[8:10], "little") & 0x3FFF
    raise _refusal(f"cannot be read: it ends in its header. Send a whole file of {_TAKEN}")


def _refusal(said: str) -> InvalidImage:
    return InvalidImage(f"The image {said}.")
