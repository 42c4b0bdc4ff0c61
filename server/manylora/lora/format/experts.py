"""Tensors of experts and routers, under the names of the parameters that they adapt.

PEFT has two layouts. With `target_parameters` it wraps the module that holds the experts once for each of its adapted
parameters, so the last of them is `experts`, the one before it `experts.base_layer`. Before transformers fused them,
each expert was modules of its own, `experts.3.up_proj`; those become what PEFT makes of them: one A with a rank for
each of the fused weights' parts, and a B whose blocks are the parts'.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format.config import LoraSettings
from manylora.lora.format.problems import Problems, shown
from manylora.lora.format.spec import ModuleSpec
from manylora.lora.format.targets import Target, parameter_targets
from manylora.lora.format.tensors import TensorView

__all__ = ["Arranged", "arranged"]

Tensors = Mapping[str, TensorView]

_PREFIX: Final = "base_model.model."
_NAME: Final = re.compile(r"(?P<path>.+?)\.lora_(?P<part>[AB])(?:\.[^.]+)??\.weight")
_EXPERT: Final = re.compile(r"(?P<path>.+)\.(?P<number>[0-9]{1,6})\.(?P<leaf>[^.]+)")
# What single experts' modules were called: which fused weight each became, and which part of it.
_PARTS: Final[Mapping[str, tuple[str, int]]] = {
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1), "down_proj": ("down_proj", 0), "w2": ("down_proj", 0),
}  # fmt: skip
_NUM_PARTS: Final = {"gate_up_proj": 2, "down_proj": 1}
_RENAMED: Final = (".block_sparse_moe.", ".mlp.")


@dataclass(frozen=True, slots=True)
class Arranged:
    """`tensors` by names that end in `PARAMETER.lora_A.weight`; `targets`: what they adapt beside what the config says.

    Those are of adapters made before transformers fused the experts, whose config names modules.
    """

    tensors: Tensors
    targets: Mapping[str, Target] = field(default_factory=dict)


def arranged(
    settings: LoraSettings, tensors: Tensors, modules: Mapping[str, ModuleSpec], problems: Problems
) -> Arranged:
    """The tensors as the base's own experts take them; everything else is passed on. Adds what cannot be converted."""
    specs = {path: spec for path, spec in modules.items() if spec.is_parameter}
    if not specs:
        return Arranged(tensors)
    holders = _holders(settings, specs)
    single: dict[str, dict[tuple[int, int, str], TensorView]] = defaultdict(dict)
    routers: dict[str, TensorView] = {}
    found: dict[str, TensorView] = {}
    for name, view in tensors.items():
        matched = _NAME.fullmatch(name.removeprefix(_PREFIX))
        path, part = (matched["path"], matched["part"]) if matched else ("", "")
        place = _place(path, specs)
        if path in holders:
            spec = specs[holders[path]]
            side, ours = _swapped(spec, part, view, problems) if spec.has_swapped_ab else (part, view)
            found[f"{_PREFIX}{spec.path}.lora_{side}.weight"] = ours
        elif place is not None:
            single[place[0]][place[1], place[2], part] = view
        elif (router := _router(path, specs)) is not None:
            found[f"{_PREFIX}{router}.lora_{part}.weight"] = view
            if part == "A" and router not in holders.values():
                routers[router] = view
        else:
            found[name] = view
    targets = {
        path: Target(specs[path], view.shape[0], settings.scale(view.shape[0], settings.alpha), settings.alpha)
        for path, view in routers.items()
        if _names_router(settings, path) and view.shape and view.shape[0]
    }
    if single and (settings.rank_pattern or settings.alpha_pattern):
        problems.add(
            "unsupported_feature",
            f"{CONFIG_FILE}: {'rank_pattern' if settings.rank_pattern else 'alpha_pattern'}",
            "Not served beside modules of single experts, as transformers 4 kept them: load the adapter with "
            "transformers 5 and PEFT, and save it again.",
        )
        return Arranged(found, targets)
    for path, parts in sorted(single.items()):
        fused = _fused(specs[path], parts, settings, problems)
        if fused is not None:
            target, a, b = fused
            targets[path] = target
            found |= {f"{_PREFIX}{path}.lora_A.weight": a, f"{_PREFIX}{path}.lora_B.weight": b}
    return Arranged(found, targets)


def _holders(settings: LoraSettings, specs: Mapping[str, ModuleSpec]) -> dict[str, str]:
    """The path that each adapted parameter has in the file."""
    adapted: dict[str, list[str]] = defaultdict(list)
    for path in parameter_targets(settings, specs):
        spec = specs[path]
        adapted[path.rpartition(".")[0] if spec.kind == "experts" else path].append(path)
    return {
        holder + ".base_layer" * (len(paths) - 1 - number): path
        for holder, paths in adapted.items()
        for number, path in enumerate(paths)
    }


def _swapped(spec: ModuleSpec, part: str, view: TensorView, problems: Problems) -> tuple[str, TensorView]:
    """What PEFT has as A [experts * rank, out] is B [out, rank * experts], and the other way round."""
    count, is_a = spec.num_experts, part == "A"
    width = spec.out_features if is_a else spec.in_features
    rank = (view.shape[0 if is_a else 1] if len(view.shape) == 2 else 0) // count
    shape = (count * rank, width) if is_a else (width, rank * count)
    if view.shape != shape or view.dtype not in _TYPES:
        problems.add(
            "wrong_shape",
            f"{TENSOR_FILE}: {shown(spec.path)}",
            f"Its {part} is {shown(view.dtype)} {shown(list(view.shape))}; of {count} experts that are kept as "
            f"[experts, {spec.in_features}, {spec.out_features}] PEFT's A ends in {spec.out_features} and its B begins "
            f"with {spec.in_features}.",
        )
        return part, view
    whole = _bits(view).reshape((count, rank, width) if is_a else (width, rank, count))
    turned = np.ascontiguousarray(whole.transpose(2, 1, 0))
    return "B" if is_a else "A", TensorView(view.dtype, shape[::-1], memoryview(turned.tobytes()))


def _place(path: str, specs: Mapping[str, ModuleSpec]) -> tuple[str, int, int] | None:
    """Of a single expert's module: the parameter that it is a part of now, the expert, and which part."""
    matched = _EXPERT.fullmatch(path)
    if matched is None or matched["leaf"] not in _PARTS:
        return None
    name, part = _PARTS[matched["leaf"]]
    for holder in _names_now(matched["path"]):
        spec = specs.get(f"{holder}.{name}")
        if spec is not None and int(matched["number"]) < spec.num_experts:
            return spec.path, int(matched["number"]), part
    return None


def _router(path: str, specs: Mapping[str, ModuleSpec]) -> str | None:
    return next((each for each in _names_now(path) if each in specs and specs[each].kind == "linear"), None)


def _names_now(path: str) -> Iterator[str]:
    yield path
    if _RENAMED[0] in path:
        yield path.replace(*_RENAMED)


def _names_router(settings: LoraSettings, path: str) -> bool:
    """Whether a config that names modules means a router, which was a linear; a pattern is not asked again."""
    names = settings.target_modules
    return isinstance(names, str) or any(path == name or path.endswith(f".{name.rpartition('.')[2]}") for name in names)


def _fused(
    spec: ModuleSpec, parts: Mapping[tuple[int, int, str], TensorView], settings: LoraSettings, problems: Problems
) -> tuple[Target, TensorView, TensorView] | None:
    """A [experts * rank, in] and B [out, rank * experts] in PEFT's layout, and the target; None with the reason."""
    count = _NUM_PARTS[spec.leaf]
    width = spec.out_features // count
    wanted = [(expert, part) for expert in range(spec.num_experts) for part in range(count)]
    missing = [each for each in wanted if not {(*each, "A"), (*each, "B")} <= parts.keys()]
    where = f"{TENSOR_FILE}: {shown(spec.path)}"
    if missing:
        problems.add(
            "missing_tensor",
            where,
            f"Of {len(wanted)} modules of single experts the file has no A and B for {len(missing)}, the first of "
            f"expert {missing[0][0]}. Experts that are one tensor are adapted all or none.",
        )
        return None
    rank = settings.rank
    types = {view.dtype for view in parts.values()}
    for (expert, _, side), view in sorted(parts.items()):
        shape = (rank, spec.in_features) if side == "A" else (width, rank)
        if view.shape != shape or view.dtype not in _TYPES or len(types) > 1:
            problems.add(
                "wrong_shape",
                where,
                f"Expert {expert}'s {side} is {shown(view.dtype)} {shown(list(view.shape))}; this base and the config "
                f"take {shown(list(shape))}, and one type for all experts.",
            )
            return None
    kind = next(iter(types))
    a = np.stack([_bits(parts[expert, part, "A"]) for expert, part in wanted])
    b = np.zeros((spec.out_features, count * rank, spec.num_experts), dtype=_TYPES[kind])
    for expert, part in wanted:
        inside = slice(part * rank, (part + 1) * rank)
        b[part * width : (part + 1) * width, inside, expert] = _bits(parts[expert, part, "B"])
    target = Target(spec, count * rank, settings.scale(rank, settings.alpha), settings.alpha)
    ranks = spec.num_experts * count * rank
    return (
        target,
        TensorView(kind, (ranks, spec.in_features), memoryview(a.tobytes())),
        TensorView(kind, (spec.out_features, ranks), memoryview(b.tobytes())),
    )


_TYPES: Final[Mapping[str, str]] = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}


def _bits(view: TensorView) -> npt.NDArray[np.generic]:
    return np.frombuffer(view.data, dtype=_TYPES[view.dtype]).reshape(view.shape)
