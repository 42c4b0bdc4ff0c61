"""`manylora inspect`: what an adapter does to each module, how much of its rank it uses, how like another it is."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from manylora.errors import InvalidRequest
from manylora.lifecycle.base import load_base, named_base
from manylora.lifecycle.extras import decoration
from manylora.lifecycle.output import atomic_folder, refuse_existing, write_json
from manylora.lifecycle.plots import heat_map, spectra
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.weights.config import AUTO, DEFAULT, NONE, InspectConfig
from manylora.lifecycle.weights.low_rank import Lora, Pair, read_lora, thin_svd
from manylora.lora.format.spec import ModuleSpec

_UNUSED = 1e-3  # a singular value below this share of the module's largest carries nothing
_DOMINANT = 0.5  # share of the whole ‖ΔW‖² in one module
_FAINT = 1e-5  # ‖ΔW‖ relative to ‖W‖


def inspect_adapter(config: InspectConfig, listen: Listener = ignore) -> dict[str, Any]:
    """The report. Raises InvalidRequest or InvalidAdapter for folders that are no adapters of one base."""
    lora, weights = _read(config)
    report = report_of(config.adapter.name, lora, weights, listen)
    if config.against is not None:
        report["against"] = {"adapter": config.against.name} | similarity(lora, read_lora(config.against))
    return report


def report_of(name: str, lora: Lora, norms: Mapping[str, float], listen: Listener = ignore) -> dict[str, Any]:
    """What is in an adapter; `norms` are ‖W‖ of those of the base's modules where it is known."""
    modules = {}
    for done, (path, pair) in enumerate(lora.pairs.items(), start=1):
        modules[path] = describe(pair, norms.get(path))
        listen(Progress("inspect", done, len(lora.pairs)))
    report: dict[str, Any] = {
        "adapter": name,
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
    return report


def draw(report: dict[str, Any], out: Path, *, overwrite: bool = False, listen: Listener = ignore) -> None:
    """Write the report and its pictures into a new folder. Raises InvalidRequest when it exists."""
    refuse_existing(out, overwrite=overwrite)
    with atomic_folder(out) as draft:
        write_json(draft / "inspect.json", report)
        with decoration("A picture", listen):
            _pictures(report, draft)


def _pictures(report: dict[str, Any], draft: Path) -> None:
    heat_map(draft / "heatmap.png", *sizes(report["modules"]))
    spectra(draft / "spectra.png", report["modules"])
    if "against" in report:
        cosines = {path: m["cosine"] for path, m in report["against"]["modules"].items()}
        heat_map(draft / "similarity.png", cosines, "cosine of the two changes", f"against {_other(report)}")


def sizes(modules: dict[str, dict[str, Any]]) -> tuple[dict[str, float], str, str]:
    """By module: ‖ΔW‖ relative to ‖W‖ where that is known; with its label and title for a picture."""
    is_relative = all(m["relative_norm"] is not None for m in modules.values())
    values = {path: m["relative_norm" if is_relative else "norm"] for path, m in modules.items()}
    return values, "‖ΔW‖ / ‖W‖" if is_relative else "‖ΔW‖", "size of the change"


def _other(report: dict[str, Any]) -> str:
    return str(report["against"]["adapter"])


def describe(pair: Pair, base_norm: float | None) -> dict[str, Any]:
    """Norms, spectrum and effective rank of one module's ΔW."""
    _, values, _ = thin_svd(pair)
    norm = float(values.double().norm())
    return {
        "rank": pair.rank,
        "shape": list(pair.shape),
        "norm": norm,
        "relative_norm": None if base_norm is None else norm / base_norm if base_norm else None,
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
    """Per shared module: cosine of the two ΔW, and the principal angles between their in and out spaces, degrees."""
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
            "input_angles": _principal_angles(a.a.T, b.a.T),
            "output_angles": _principal_angles(a.b, b.b),
        }
        product, squares, other_squares = product + inner, squares + left, other_squares + right
    cosine = product / math.sqrt(squares * other_squares) if squares and other_squares else 0.0
    return {"cosine": cosine, "num_shared": len(shared), "modules": modules}


def _inner(a: Pair, b: Pair) -> float:
    """⟨ΔW₁, ΔW₂⟩ = tr((B₂ᵀB₁)(A₁A₂ᵀ)), without forming either."""
    return float(((b.b.double().T @ a.b.double()) * (b.a.double() @ a.a.double().T)).sum())


def _principal_angles(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Angles between two column spaces in degrees, ascending (Knyazev and Argentati, 2002, by scipy).

    0 is a shared direction, 90 a foreign one; directions of no weight are left out.
    """
    from scipy.linalg import subspace_angles

    one, other = _basis(a), _basis(b)
    if not one.shape[1] or not other.shape[1]:
        return []
    return [math.degrees(float(angle)) for angle in subspace_angles(one.numpy(), other.numpy())[::-1]]


def _basis(matrix: torch.Tensor) -> torch.Tensor:
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    num_used = int((values > values[0] * _UNUSED).sum()) if float(values[0]) else 0
    basis: torch.Tensor = left[:, :num_used]
    return basis


def _read(config: InspectConfig) -> tuple[Lora, dict[str, float]]:
    """The adapter, and ‖W‖ of the base's modules where the base is looked at."""
    if config.base == NONE:
        return read_lora(config.adapter), {}
    if config.base != AUTO:
        modules, norms = _base_norms(None if config.base == DEFAULT else config.base)
        return read_lora(config.adapter, modules), norms
    lora = read_lora(config.adapter)
    is_there, model = named_base(lora.base_name)
    if not is_there:
        return lora, {}
    modules, norms = _base_norms(model)
    fits = all(path in modules and (p.shape == _shape(modules[path])) for path, p in lora.pairs.items())
    return (read_lora(config.adapter, modules), norms) if fits else (lora, {})


def _shape(spec: ModuleSpec) -> tuple[int, int]:
    return spec.out_features, spec.in_features


def _base_norms(model: str | None) -> tuple[dict[str, ModuleSpec], dict[str, float]]:
    from manylora.models.wrapping import adaptable_modules

    base = load_base(model, device="cpu", dtype="float32")
    modules = adaptable_modules(base.model)
    return modules, {path: float(base.model.get_submodule(path).weight.norm()) for path in modules}
