import json
from pathlib import Path

import pytest
import torch

from manylora.errors import InvalidRequest
from manylora.lifecycle.progress import Progress
from manylora.lifecycle.weights.compress import compress
from manylora.lifecycle.weights.config import CompressConfig
from manylora.lifecycle.weights.low_rank import read_lora
from tests.tiny_adapters import make_adapter


def test_compressing_to_the_same_rank_changes_nothing(tmp_path: Path, tiny_llama_dir: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", rank=5, alpha=7)

    report = compress(CompressConfig(folder, tmp_path / "b", rank=5))

    before, after = read_lora(folder), read_lora(tmp_path / "b")
    assert before.pairs.keys() == after.pairs.keys()
    for path, pair in before.pairs.items():
        torch.testing.assert_close(after.pairs[path].dense(), pair.dense(), rtol=1e-4, atol=1e-6)
    assert all(m["energy"] == pytest.approx(1.0) for m in report["modules"].values())


def test_error_of_a_module_is_its_discarded_singular_values(tmp_path: Path, tiny_llama_dir: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", rank=6)

    report = compress(CompressConfig(folder, tmp_path / "b", rank=2))

    after = read_lora(tmp_path / "b")
    for path, pair in read_lora(folder).pairs.items():
        values = torch.linalg.svdvals(pair.dense().double())
        error = float((after.pairs[path].dense() - pair.dense()).norm())
        assert error == pytest.approx(float(values[2:].norm()), rel=1e-3)
        assert report["modules"][path]["error"] == pytest.approx(error, rel=1e-3)


def test_error_is_that_of_what_is_written_rounding_included(tmp_path: Path, tiny_llama_dir: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", rank=5)

    report = compress(CompressConfig(folder, tmp_path / "b", rank=5, dtype="bfloat16"))

    after = read_lora(tmp_path / "b")
    for path, pair in read_lora(folder).pairs.items():
        error = float((after.pairs[path].dense().double() - pair.dense().double()).norm())
        assert report["modules"][path]["discarded"] < 1e-5 < error
        assert report["modules"][path]["error"] == pytest.approx(error, rel=1e-3)


def test_rank_that_no_module_exceeds_is_said(tmp_path: Path, tiny_llama_dir: Path) -> None:
    events: list[Progress] = []

    compress(CompressConfig(make_adapter(tiny_llama_dir, tmp_path / "a", rank=4), tmp_path / "b", rank=9),
             listen=events.append)  # fmt: skip

    assert events[0].message == "No module has a rank above 9: nothing gets smaller."


def test_card_says_what_it_was_made_from(tmp_path: Path, tiny_llama_dir: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", rank=4)

    compress(CompressConfig(folder, tmp_path / "b", rank=2, command="manylora compress a --rank 2"))

    card = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert "| Made from | a, " in card
    assert "manylora compress a --rank 2" in card


def test_energy_chooses_a_rank_for_each_module(tmp_path: Path, tiny_llama_dir: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", rank=8)

    report = compress(CompressConfig(folder, tmp_path / "b", energy=0.7))

    ranks = {path: m["rank"] for path, m in report["modules"].items()}
    assert all(m["energy"] >= 0.7 for m in report["modules"].values())
    assert len(set(ranks.values())) > 1
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert {**dict.fromkeys(ranks, config["r"]), **config["rank_pattern"]} == ranks
    assert report["size_bytes"] < report["size_bytes_before"]
    assert json.loads((tmp_path / "b.report" / "compress.json").read_text()) == report


def test_adapter_of_some_layers_stays_one_of_these_layers(tmp_path: Path, tiny_llama_dir: Path) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a", rank=4, targets=["q_proj"], layers_to_transform=[1])

    compress(CompressConfig(folder, tmp_path / "b", rank=1))

    assert list(read_lora(tmp_path / "b").pairs) == ["model.layers.1.self_attn.q_proj"]
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["layers_to_transform"] == [1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either `rank` or `energy`"),
        ({"rank": 2, "energy": 0.5}, "either `rank` or `energy`"),
        ({"rank": 0}, "`rank` must be at least 1"),
        ({"energy": 1.5}, "`energy` is a share"),
        ({"rank": 1, "dtype": "int8"}, "`dtype` must be one of"),
    ],
)
def test_bad_arguments_are_refused(
    tmp_path: Path, tiny_llama_dir: Path, arguments: dict[str, object], words: str
) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "a")

    with pytest.raises(InvalidRequest, match=words):
        compress(CompressConfig(folder, tmp_path / "b", **arguments))  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()
