"""Files of strangers: what is read is what transformers reads, and everything else is refused before it costs much."""

import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, features
from transformers.image_utils import load_image

from manylora.errors import InvalidImage
from manylora.images import reading

from .tiny import file_of, picture, url_of

RGB = picture(3)
SIXTEEN = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(60, 40) * 20)
ALPHA = RGB.convert("RGBA")
ALPHA.putalpha(picture(4).convert("L"))


def turned(kind: str) -> bytes:
    """A file whose EXIF data say that the camera was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(RGB, kind, exif=exif)


FILES: dict[str, Callable[[], bytes]] = {
    "png": lambda: file_of(RGB),
    "png of 16 bits": lambda: file_of(SIXTEEN),
    "png with alpha": lambda: file_of(ALPHA),
    "png of a palette": lambda: file_of(RGB.convert("P")),
    "png of one bit": lambda: file_of(RGB.convert("1")),
    "png turned": lambda: turned("PNG"),
    "jpeg": lambda: file_of(RGB, "JPEG"),
    "jpeg, progressive": lambda: file_of(RGB, "JPEG", progressive=True),
    "jpeg of grays": lambda: file_of(RGB.convert("L"), "JPEG"),
    "jpeg of inks": lambda: file_of(RGB.convert("CMYK"), "JPEG"),
    "jpeg turned": lambda: turned("JPEG"),
    "gif": lambda: file_of(RGB, "GIF"),
    "bmp": lambda: file_of(RGB, "BMP"),
    "webp": lambda: file_of(RGB, "WEBP"),
    "webp, lossless": lambda: file_of(RGB, "WEBP", lossless=True),
    "webp with alpha": lambda: file_of(ALPHA, "WEBP"),
    "webp turned": lambda: turned("WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_transformers_reads_it(name: str) -> None:
    if "webp" in name and not features.check("webp"):
        pytest.skip("this Pillow was built without WebP")
    data = FILES[name]()
    found, wanted = reading.read(data), load_image(url_of(data))
    assert found.mode == "RGB"
    assert found.size == wanted.size == ((60, 40) if "turned" in name else (40, 60))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def frames(kind: str) -> bytes:
    return file_of(RGB, kind, save_all=True, append_images=[picture(5)], duration=100)


def many_scans() -> bytes:
    data = file_of(RGB, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * reading.MAX_JPEG_SCANS + data[-2:]


def wide_webp() -> bytes:
    data = bytearray(file_of(ALPHA, "WEBP"))
    assert data[12:16] == b"VP8X"
    data[24:30] = b"\xfe\x3f\x00" * 2  # 16,383 by 16,383
    return bytes(data)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "begins as no file of PNG"),
    "text": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "begins as no file of PNG"),
    "tiff": (lambda: file_of(RGB, "TIFF"), "begins as no file of PNG"),
    "a bomb": (lambda: png(50_000, 50_000, chunk(b"IDAT", zlib.compress(bytes(10**6)))), "50000 x 50000 pixels"),
    "a bomb of webp": (wide_webp, "16383 x 16383 pixels"),
    "a line": (lambda: file_of(Image.new("RGB", (51, 1))), "51 x 1 pixels; the longer side"),
    "no pixel": (lambda: png(0, 5), "cannot be read|0 x 5 pixels"),
    "cut png": (lambda: file_of(RGB)[:-200], "cannot be read"),
    "cut jpeg": (lambda: file_of(RGB, "JPEG")[:-100], "cannot be read"),
    "cut webp": (lambda: file_of(RGB, "WEBP")[:-100], "cannot be read"),
    "headers alone": (lambda: b"RIFF\0\0\0\0WEBPVP8X", "ends in its header"),
    "animated gif": (lambda: frames("GIF"), "is animated"),
    "animated png": (lambda: frames("PNG"), "is animated"),
    "animated webp": (lambda: frames("WEBP"), "is animated"),
    "a thousand scans": (many_scans, "more than 100 scans"),
    "text that unpacks": (
        lambda: png(
            1, 1, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))), chunk(b"IDAT", zlib.compress(b"\0" * 4))
        ),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_none_or_costs_too_much_is_refused_in_one_sentence(name: str) -> None:
    make, said = HOSTILE[name]
    with pytest.raises(InvalidImage, match=said) as refused:
        reading.read(make())
    assert len(refused.value.message) < 300


def test_damaged_files_are_read_or_refused() -> None:
    random = np.random.default_rng(0)
    for make in FILES.values():
        whole = np.frombuffer(make(), dtype=np.uint8)
        for _ in range(20):
            damaged = whole.copy()
            places = random.integers(0, len(whole), 3)
            damaged[places] = random.integers(0, 256, 3)
            with suppress(InvalidImage):  # whatever else it raises is not told the caller
                assert reading.read(damaged.tobytes()).mode == "RGB"
