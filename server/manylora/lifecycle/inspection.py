"""`manylora inspect`: what an adapter does to each module, how much of its rank it uses, how like another it is."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora.errors import InvalidRequest
from manylora.lifecycle.low_rank import Lora, Pair, read_lora, thin_svd
from manylora.lifecycle.output import atomic_folder, refuse_existing
from manylora.lifecycle.plots import heat_map, spectra
from manylora.lifecycle.progress import Listener, Progress, ignore

_UNUSED = 1e-3  # a singular value below this share of the module's largest carries nothing
_DOMINANT = 0.5  # share of the whole ‖ΔW‖² in one module
_FAINT = 1e-5  # ‖ΔW‖ relative to ‖W‖


@dataclass(frozen=True, slots=True)
class InspectConfig:
    """`base` (a model) adds norms relative to W; `against` another adapter folder adds similarities."""

    adapter: Path
    against: Path | None = None
    base: str | None = None
    with_base: bool = False


def inspect_adapter(config: InspectConfig, listen: Listener = ignore) -> dict[str, Any]:
    """The report. Raises InvalidRequest or InvalidAdapter for folders that are no adapters of one base."""
    weights = _base_norms(config) if config.with_base else None
    lora = read_lora(config.adapter, weights[0] if weights else None)
    modules = {}
    for done, (path, pair) in enumerate(lora.pairs.items(), start=1):
        modules[path] = describe(pair, weights[1].get(path) if weights else None)
        listen(Progress("inspect", done, len(lora.pairs)))
    report: dict[str, Any] = {
        "adapter": config.adapter.name,
        "base": lora.base_name,
        "target_modules": lora.config.get("target_modules"),
        "rank": max(p.rank for p in lora.pairs.values()),
        "alpha": lora.config.get("lora_alpha"),
        "rslora": bool(lora.config.get("use_rslora")),
        "dtype": str(lora.dtype).removeprefix("torch."),
        "num_parameters": lora.num_parameters,
        "size_bytes": lora.size_bytes,
        "modules": modules,
    }
    report["warnings"] = warnings_about(report)
    if config.against is not None:
        report["against"] = {"adapter": config.against.name} | similarity(lora, read_lora(config.against))
    return report


def draw(report: dict[str, Any], out: Path, *, overwrite: bool = False) -> None:
    """Write `heatmap.png` and `spectra.png` into a new folder. Raises InvalidRequest when it exists."""
    refuse_existing(out, overwrite=overwrite)
    with atomic_folder(out) as draft:
        heat_map(draft / "heatmap.png", report["modules"])
        spectra(draft / "spectra.png", report["modules"])


def describe(pair: Pair, base_norm: float | None) -> dict[str, Any]:
    """Norms, spectrum and effective rank of one module's ΔW."""
    _, values, _ = thin_svd(pair)
    norm = float(values.double().norm())
    return {
        "rank": pair.rank,
        "shape": list(pair.shape),
        "norm": norm,
        "relative_norm": None if base_norm is None else norm / base_norm if base_norm else math.inf,
        "singular_values": [float(v) for v in values],
        "effective_rank": effective_rank(values),
        "num_used": int((values > _UNUSED * values[0]).sum()) if norm else 0,
    }


def effective_rank(values: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007): 0 for a zero matrix."""
    total = float(values.double().sum())
    if total == 0:
        return 0.0
    shares = values.double() / total
    shares = shares[shares > 0]
    return math.exp(float(-(shares * shares.log()).sum()))


def warnings_about(report: dict[str, Any]) -> list[str]:
    """What a person should look at, in sentences."""
    modules: dict[str, dict[str, Any]] = report["modules"]
    found = []
    energy = {path: m["norm"] ** 2 for path, m in modules.items()}
    total = sum(energy.values())
    if total == 0:
        return ["The adapter does nothing: every ΔW is zero."]
    unused = [path for path, m in modules.items() if m["num_used"] < m["rank"]]
    if unused:
        found.append(
            f"{len(unused)} of {len(modules)} modules do not use all of their rank, for example {unused[0]} "
            f"({modules[unused[0]]['num_used']} of {modules[unused[0]]['rank']}): a smaller rank would do."
        )
    largest = max(energy, key=lambda path: energy[path])
    if len(modules) > 1 and energy[largest] > _DOMINANT * total:
        found.append(f"{largest} holds {energy[largest] / total:.0%} of the whole change.")
    relative = [m["relative_norm"] for m in modules.values() if m["relative_norm"] is not None]
    if relative and max(relative) < _FAINT:
        found.append(f"The change is close to nothing: at most {max(relative):.1e} of a weight's norm.")
    return found


def similarity(one: Lora, other: Lora) -> dict[str, Any]:
    """Per shared module: cosine of the two ΔW, and cosines of the principal angles of their in and out spaces."""
    shared = [path for path in one.pairs if path in other.pairs]
    if not shared:
        raise InvalidRequest("The two adapters have no module in common.")
    modules: dict[str, Any] = {}
    product = squares = other_squares = 0.0
    for path in shared:
        a, b = one.pairs[path], other.pairs[path]
        if a.shape != b.shape:
            raise InvalidRequest(f"The adapters were made for different bases: {path} is {a.shape} and {b.shape}.")
        inner, left, right = _inner(a, b), _inner(a, a), _inner(b, b)
        modules[path] = {
            "cosine": inner / math.sqrt(left * right) if left and right else 0.0,
            "input_angles": _principal_cosines(a.a.T, b.a.T),
            "output_angles": _principal_cosines(a.b, b.b),
        }
        product, squares, other_squares = product + inner, squares + left, other_squares + right
    cosine = product / math.sqrt(squares * other_squares) if squares and other_squares else 0.0
    return {"cosine": cosine, "num_shared": len(shared), "modules": modules}


def _inner(a: Pair, b: Pair) -> float:
    """⟨ΔW₁, ΔW₂⟩ = tr((B₂ᵀB₁)(A₁A₂ᵀ)), without forming either."""
    return float(((b.b.double().T @ a.b.double()) * (b.a.double() @ a.a.double().T)).sum())


def _principal_cosines(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Cosines of the principal angles between two column spaces, descending; directions of no weight left out."""
    return [min(1.0, float(v)) for v in torch.linalg.svdvals(_basis(a).T @ _basis(b))]


def _basis(matrix: torch.Tensor) -> torch.Tensor:
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    num_used = int((values > values[0] * _UNUSED).sum()) if float(values[0]) else 0
    basis: torch.Tensor = left[:, :num_used]
    return basis


def _base_norms(config: InspectConfig) -> tuple[dict[str, Any], dict[str, float]]:
    from manylora.lifecycle.base import load_base
    from manylora.models.wrapping import adaptable_modules

    base = load_base(config.base, device="cpu", dtype="float32")
    modules = adaptable_modules(base.model)
    return modules, {path: float(base.model.get_submodule(path).weight.norm()) for path in modules}
