import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from manylora.lifecycle.plots import confusion_matrix, fonts_for, rank_curve, spectra

PNG = b"\x89PNG"


def test_plain_labels_have_a_font_and_boxes_are_none() -> None:
    assert fonts_for("good (other)") == ["DejaVu Sans"]
    assert fonts_for("\U000f0000") is None


def test_labels_in_several_scripts_have_a_font_for_each_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fonts that were installed after matplotlib had made its list."""
    paths = [_font(tmp_path / "one.ttf", "One", "\U000f0001京"), _font(tmp_path / "two.ttf", "Two", "\U000f0002")]
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [*paths, str(tmp_path / "broken.ttf")])
    monkeypatch.setattr(font_manager, "fontManager", copy.deepcopy(font_manager.fontManager))

    assert fonts_for("a\U000f0001") == ["DejaVu Sans", "One"]
    assert fonts_for("a\U000f0001\U000f0002") == ["DejaVu Sans", "One", "Two"]
    assert fonts_for("a\U000f0001\U000f0003") is None


def _font(path: Path, name: str, characters: str) -> str:
    """A font file that has these characters and nothing else."""
    glyphs = {ord(c): f"glyph{number}" for number, c in enumerate(characters)}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *glyphs.values()])
    builder.setupCharacterMap(glyphs)
    pen = TTGlyphPen(None)
    builder.setupGlyf(dict.fromkeys([".notdef", *glyphs.values()], pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *glyphs.values()], (500, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.mark.parametrize("labels", [["bad", "good"], ["上海", "北京"], ["\U000f0000", "\U000f0001"]])
def test_confusion_matrix_is_drawn_in_any_script_without_a_missing_character(tmp_path: Path, labels: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_matrix(tmp_path / "a.png", np.array([[3, 0, 1], [1, 2, 0]]), labels, [*labels, "(other)"], "a")

    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_spectrum_with_zeros_and_an_adapter_of_zeros_are_drawn(tmp_path: Path) -> None:
    modules = {"l.0.q": {"singular_values": [1.0, 0.1, 0.0]}, "l.0.v": {"singular_values": [0.0, 0.0]}}

    spectra(tmp_path / "a.png", modules)

    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_ranks_are_drawn_against_rank_and_size(tmp_path: Path) -> None:
    rows = [
        {"rank": r, "targets": t, "size_bytes": 1000 * r * len(t), "mean": 1 / r, "standard_error": 0.1}
        for t in (["q"], ["q", "v"])
        for r in (1, 4)
    ]

    rank_curve(tmp_path / "a.png", rows, rows[1])

    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
