from pathlib import Path

import pytest
import torch

from manylora.cli.tables import print_inspection
from manylora.errors import InvalidRequest
from manylora.lifecycle.adapter_files import write_adapter
from manylora.lifecycle.weights.config import InspectConfig
from manylora.lifecycle.weights.inspection import draw, effective_rank, inspect_adapter
from manylora.lifecycle.weights.low_rank import Pair, lora_files, read_lora
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tiny_model


def _write(folder: Path, pairs: dict[str, Pair]) -> Path:
    folder.mkdir()
    write_adapter(folder, *lora_files(pairs, targets=list(pairs), base_name="x", dtype=torch.float32))
    return folder


def _pair(*columns: int, size: int = 8, scale: float = 1.0) -> Pair:
    """ΔW = scale · Σ e_c e_cᵀ: its spaces are spanned by the named unit vectors."""
    eye = torch.eye(size)[list(columns)]
    return Pair("linear", eye.clone(), scale * eye.T.clone())


def test_norms_and_spectra_are_those_of_the_full_matrix(tmp_path: Path, tiny_llama_dir: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", rank=4, alpha=9)

    report = inspect_adapter(InspectConfig(folder, base=str(tiny_llama_dir)))

    for path, pair in read_lora(folder).pairs.items():
        module, values = report["modules"][path], torch.linalg.svdvals(pair.dense())
        assert module["norm"] == pytest.approx(float(pair.dense().norm()), rel=1e-4)
        assert module["singular_values"] == pytest.approx(values[:4].tolist(), rel=1e-3)
        assert 0 < module["relative_norm"] < 10
    assert (report["rank"], report["alpha"], report["warnings"]) == (4, 9, [])


@pytest.mark.parametrize(("values", "rank"), [([1.0, 1.0, 1.0], 3.0), ([5.0, 0.0], 1.0), ([0.0], 0.0)])
def test_effective_rank_counts_directions_of_like_weight(values: list[float], rank: float) -> None:
    assert effective_rank(torch.tensor(values)) == pytest.approx(rank)


def test_unused_rank_and_a_dominant_module_are_warned_of(tmp_path: Path) -> None:
    pairs = {"l.0.q": _pair(0, 1, scale=10.0), "l.1.q": _pair(2, 3)}
    pairs["l.1.q"].b[:, 1] = 0

    warnings = inspect_adapter(InspectConfig(_write(tmp_path / "a", pairs)))["warnings"]

    assert warnings[0].startswith("1 of 2 modules do not use all of their rank, for example l.1.q (1 of 2)")
    assert warnings[1] == "l.0.q holds 100% of the whole change."


def test_change_close_to_nothing_is_warned_of(tmp_path: Path, tiny_llama_dir: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", strength=1e-8)

    report = inspect_adapter(InspectConfig(folder, base=str(tiny_llama_dir)))

    assert "close to nothing" in report["warnings"][-1]


def test_principal_angles_tell_shared_from_foreign_directions(tmp_path: Path) -> None:
    a = _write(tmp_path / "a", {"l.0.q": _pair(0, 1)})
    b = _write(tmp_path / "b", {"l.0.q": _pair(1, 2)})

    against = inspect_adapter(InspectConfig(a, against=b))["against"]

    assert against["modules"]["l.0.q"]["input_angles"] == pytest.approx([0.0, 90.0], abs=1e-4)
    assert against["modules"]["l.0.q"]["output_angles"] == pytest.approx([0.0, 90.0], abs=1e-4)
    assert against["cosine"] == pytest.approx(0.5)


def test_an_adapter_is_like_itself_and_opposite_to_its_negative(tmp_path: Path, tiny_llama_dir: Path) -> None:
    a = make_adapter(tiny_llama_dir, tmp_path / "a")
    pairs = {path: pair.scaled(-1.0) for path, pair in read_lora(a).pairs.items()}
    b = _write(tmp_path / "b", pairs)

    assert inspect_adapter(InspectConfig(a, against=a))["against"]["cosine"] == pytest.approx(1.0)
    assert inspect_adapter(InspectConfig(a, against=b))["against"]["cosine"] == pytest.approx(-1.0)


def test_adapters_without_common_ground_are_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    a = make_adapter(tiny_llama_dir, tmp_path / "a", targets=["q_proj"])
    b = make_adapter(tiny_llama_dir, tmp_path / "b", targets=["v_proj"])
    other = make_tiny_model("llama", tmp_path / "other", hidden_size=32)
    c = make_adapter(other, tmp_path / "c", targets=["q_proj"])

    with pytest.raises(InvalidRequest, match="no module in common"):
        inspect_adapter(InspectConfig(a, against=b))
    with pytest.raises(InvalidRequest, match="different bases"):
        inspect_adapter(InspectConfig(a, against=c))


def test_pictures_are_drawn(tmp_path: Path, tiny_llama_dir: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", targets="all-linear")

    draw(inspect_adapter(InspectConfig(folder)), tmp_path / "png")

    for name in ("heatmap.png", "spectra.png"):
        assert (tmp_path / "png" / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidRequest, match="exists"):
        draw(inspect_adapter(InspectConfig(folder)), tmp_path / "png")


def test_many_modules_are_shown_by_kind_or_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    def module(rank: int, relative: float | None) -> dict[str, object]:
        spectrum = {"effective_rank": rank / 2, "norm": rank / 4, "singular_values": [rank / 8]}
        return {"rank": rank, "num_used": rank, "relative_norm": relative, **spectrum}

    modules = {f"layers.{n}.q_proj": module(8, None) for n in range(40)}
    modules |= {f"layers.{n}.v_proj": module(4 if n else 16, 0.5) for n in range(2)}
    facts = {"adapter": "a", "base": "b", "rank": 8, "alpha": 8, "num_parameters": 1, "size_bytes": 2}
    report = {**facts, "dtype": "float32", "rslora": False, "target_modules": ["q_proj", "v_proj"], "modules": modules}

    def rows(*, is_by_kind: bool) -> list[list[str]]:
        print_inspection(report, is_by_kind=is_by_kind)
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]

    assert rows(is_by_kind=True) == [
        ["q_proj", "40", "8", "4.00", "2", "", "1"],
        ["v_proj", "2", "4 to 16", "2.00 to 8.00", "1 to 4", "0.5", "0.5 to 2"],
    ]
    assert [row[0] for row in rows(is_by_kind=False)] == list(modules)
