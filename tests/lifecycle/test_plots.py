import warnings
from pathlib import Path

import numpy as np
import pytest

from manylora.lifecycle.plots import confusion_matrix, font_for, rank_curve, spectra

PNG = b"\x89PNG"


def test_plain_labels_have_a_font_and_boxes_are_none() -> None:
    assert font_for("good (other)") == "DejaVu Sans"
    assert font_for("\U000f0000") is None


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
