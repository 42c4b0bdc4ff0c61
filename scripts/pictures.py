"""Pictures small enough for a page."""

import io
from pathlib import Path
from typing import Final

from PIL import Image

__all__ = ["MOST_BYTES", "save"]

MOST_BYTES: Final = 150_000


def save(shot: bytes, path: Path) -> None:
    """Write a shot as a PNG with a palette, of fewer colours until it is small enough. Raises ValueError if none is."""
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    for colours in (256, 128, 64, 32):
        palette = image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
        palette.save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {colours} colours")  # noqa: T201 - a script's output
            return
    raise ValueError(f"{path} stays above {MOST_BYTES} bytes")
