"""Adapters merged number by number: what PEFT's `add_weighted_adapter` makes of them, or refused with the reason."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from manylora.errors import InvalidRequest
from manylora.lora.format.merged import Method, Recipe, write_merged
from manylora.lora.format.reader import read_trusted
from manylora.models.wrapping import adaptable_modules
from tests.engine.harness import load
from tests.engine.oracle import with_adapter
from tests.tiny_adapters import make_adapter

WEIGHTS = (0.7, -0.4, 1.5)


@pytest.fixture(scope="module")
def parts(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of one rank, with other scales and, the last one, on other modules."""
    folder = tmp_path_factory.mktemp("parts")
    how: list[dict[str, Any]] = [{"alpha": 4}, {"alpha": 16}, {"targets": ["q_proj", "down_proj"]}]
    return [make_adapter(tiny_llama_dir, folder / str(n), rank=4, seed=n, **each) for n, each in enumerate(how)]


def merged(base: Path, parts: list[Path], recipe: Recipe, folder: Path) -> Path:
    modules = adaptable_modules(load(base))
    folder.mkdir(exist_ok=True)
    read = [(read_trusted(part, modules), weight, part.name) for part, weight in zip(parts, WEIGHTS, strict=False)]
    write_merged(read, recipe, folder, "CAUSAL_LM")
    return folder


def weights_of(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT makes of each module of the merged base."""
    return dict(with_adapter(base, folder).merge_and_unload().named_parameters())


def by_peft(base: Path, parts: list[Path], method: str, density: float) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(with_adapter(base, None), parts[0], adapter_name="0")
        for number, part in enumerate(parts[1:], start=1):
            tuned.load_adapter(part, adapter_name=str(number))
        names, weights = [str(n) for n in range(len(parts))], list(WEIGHTS[: len(parts)])
        tuned.add_weighted_adapter(names, weights, "merged", combination_type=method, density=density)
        tuned.set_adapter("merged")
        return dict(tuned.merge_and_unload().named_parameters())


@pytest.mark.parametrize(
    ("method", "density"), [("ties", 0.5), ("ties", 1.0), ("dare_linear", 1.0), ("dare_ties", 1.0)]
)
def test_it_is_what_peft_makes_of_them(
    method: Method, density: float, parts: list[Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """All that chance has no part in."""
    found = weights_of(tiny_llama_dir, merged(tiny_llama_dir, parts, Recipe(method, density), tmp_path / "out"))
    wanted, bare = by_peft(tiny_llama_dir, parts, method, density), weights_of(tiny_llama_dir, parts[0])
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(bare[name], weight) for name, weight in wanted.items())


def test_dare_drops_the_share_that_it_is_told_and_makes_the_rest_larger(
    parts: list[Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    def tensors(seed: int, density: float) -> dict[str, torch.Tensor]:
        recipe = Recipe("dare_linear", density, seed)
        folder = merged(tiny_llama_dir, parts[:1], recipe, tmp_path / "x")
        found: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
        return found

    whole, half, again, other = tensors(0, 1.0), tensors(0, 0.25), tensors(0, 0.25), tensors(1, 0.25)
    kept = total = 0
    for name, values in half.items():
        mask = values != 0
        torch.testing.assert_close(values[mask], whole[name][mask] / 0.25)
        torch.testing.assert_close(values, again[name], rtol=0, atol=0)
        kept, total = kept + int(mask.sum()), total + mask.numel()
    assert kept / total == pytest.approx(0.25, abs=0.02)
    assert any(not torch.equal(values, other[name]) for name, values in half.items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"rank": 8}, "different ranks"), ({"rank": 4, "use_dora": True}, "more than an A and a B")],
)
def test_what_cannot_be_merged_is_refused(
    settings: dict[str, Any], said: str, parts: list[Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    other = make_adapter(tiny_llama_dir, tmp_path / "other", **settings)
    with pytest.raises(InvalidRequest, match=said) as caught:
        merged(tiny_llama_dir, [parts[0], other], Recipe("ties", 0.5), tmp_path / "out")
    assert caught.value.param == "materialise"
