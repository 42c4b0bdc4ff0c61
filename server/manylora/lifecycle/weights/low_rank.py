"""Low-rank pairs as tensors: reading them out of an adapter, factorising, writing them back. No PEFT.

ΔW = B A with A [rank, in] and B [out, rank]; an adapter's scale is folded into B when it is read. What is
written has alpha = rank everywhere, so that its scale is 1.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from manylora.errors import InvalidRequest, quoted
from manylora.lifecycle.adapter_files import read_adapter_files
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lora.format.config import KNOWN_PARTS
from manylora.lora.format.kinds import KINDS, NOT_SERVED
from manylora.lora.format.methods.prompts import PROMPTS
from manylora.lora.format.pairing import PREFIX, parse_name
from manylora.lora.format.reader import AdaptedModule, LowRank, TensorView, read
from manylora.lora.format.spec import ModuleKind, ModuleSpec

_NO_LIMIT = 2**62
_MORE_THAN_LOW_RANK: Final = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens",
)  # fmt: skip
_WAY_OUT: Final = (
    "PEFT's merge_and_unload makes a checkpoint of it, of which `manylora extract` makes a low-rank adapter."
)
_OF_PROMPTS: Final = "What it does depends on where a token stands, so no checkpoint can have it: serve it as it is."


@dataclass(frozen=True, slots=True)
class Pair:
    """One module's ΔW = b @ a, fp32, scale included. For an embedding "in" is the vocabulary."""

    kind: ModuleKind
    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> torch.Tensor:
        return self.b @ self.a

    def scaled(self, factor: float) -> "Pair":
        return replace(self, b=self.b * factor)


@dataclass(frozen=True, slots=True)
class Lora:
    """A whole adapter by module path, with its config and the dtype that its file has."""

    pairs: dict[str, Pair]
    config: dict[str, Any]
    dtype: torch.dtype
    size_bytes: int

    @property
    def base_name(self) -> str | None:
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def num_parameters(self) -> int:
        return sum(p.a.numel() + p.b.numel() for p in self.pairs.values())


def read_lora(folder: Path, modules: Mapping[str, ModuleSpec] | None = None) -> Lora:
    """Read and check an adapter; against the base's `modules` when given, otherwise against itself.

    Raises InvalidRequest when it is no adapter in PEFT layout, InvalidAdapter with every problem otherwise.
    """
    config, tensors = read_adapter_files(folder)
    _require_plain(config, tensors)
    adapter = read(folder, modules or _own_modules(tensors), max_rank=_NO_LIMIT, max_size=_NO_LIMIT)
    pairs = {m.path: _pair(m, adapter.kind) for m in adapter.modules}
    dtype = next(iter(tensors.values())).dtype
    return Lora(pairs, config, dtype, adapter.size_bytes)


def _require_plain(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Raises InvalidRequest for a kind whose files say more than low rank, by its name.

    Of a model that was resized for more tokens the tensors' names alone say it.
    """
    kind = config.get("peft_type")
    more = [key for key in _MORE_THAN_LOW_RANK if config.get(key)]
    whole = next((name for name in names if name.endswith(".weight") and parse_name(name) is None), None)
    if kind == "LORA" and not more and whole is not None:
        more.append(f"the whole weight {quoted(whole.removeprefix(PREFIX))}")
    if config.get("bias") not in (None, "none") and any(name.endswith(".bias") for name in names):
        more.append("bias")
    if config.get("init_lora_weights") in KNOWN_PARTS:
        more.append("init_lora_weights")
    if (kind != "LORA" and kind in KINDS) or kind in NOT_SERVED or more:
        what = f"has {', '.join(more)}" if more else f"is of the type {kind}"
        is_of_prompts = kind in PROMPTS or bool(config.get("alora_invocation_tokens"))
        way_out = _OF_PROMPTS if is_of_prompts else _WAY_OUT
        if kind in NOT_SERVED:
            way_out = f"It is not served either: {NOT_SERVED[str(kind)]}."
        raise InvalidRequest(f"This is for plain low-rank adapters, and this one {what}. {way_out}")


def _pair(module: AdaptedModule, kind: str) -> Pair:
    """Raises InvalidRequest for a module that is not plain low rank."""
    (term, *others) = module.terms
    if (
        others
        or not isinstance(term, LowRank)
        or not isinstance(term.a, TensorView)
        or not isinstance(term.b, TensorView)
    ):
        raise InvalidRequest(
            f"This is for plain low-rank adapters, and {module.path} of this one ({kind}) is more than an A and a B. "
            f"{_WAY_OUT}"
        )
    return Pair(module.kind, torch.from_numpy(term.a.to_float32()), torch.from_numpy(term.b.to_float32()) * term.scale)


def _own_modules(tensors: Mapping[str, torch.Tensor]) -> dict[str, ModuleSpec]:
    """What the base must look like for these tensors to fit: enough to read an adapter without its base."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    embeddings = set()
    for name, tensor in tensors.items():
        parsed = parse_name(name)
        if parsed is not None and tensor.dim() == 2:
            shapes.setdefault(parsed.path, {})[parsed.part] = tuple(tensor.shape)
            if parsed.is_embedding:
                embeddings.add(parsed.path)
    return {
        path: ModuleSpec(path, "embedding" if path in embeddings else "linear", parts["a"][1], parts["b"][0])
        for path, parts in shapes.items()
        if "a" in parts and "b" in parts
    }


def balanced(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, kind: ModuleKind) -> Pair:
    """U diag(s) Vᵀ as b = U √s and a = √s Vᵀ, so that neither factor dominates (nor loses bits in 16)."""
    root = values.sqrt()
    return Pair(kind, (root[:, None] * right).contiguous(), (left * root).contiguous())


def thin_svd(pair: Pair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The SVD of b @ a without forming it: QR of both factors, SVD of the small r × r middle.

    Returns U [out, k], s [k] descending, Vᵀ [k, in] with k = min(rank, in, out), computed in fp64.
    """
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return (q_b @ left).float(), values.float(), (right @ q_a.T).float()


def as_stored(pair: Pair, dtype: torch.dtype) -> Pair:
    """The pair as it is read back from a file of this dtype."""
    return replace(pair, a=pair.a.to(dtype).float(), b=pair.b.to(dtype).float())


def distance(one: Pair, other: Pair) -> float:
    """‖ΔW₁ − ΔW₂‖ (Frobenius) without forming either: the norm of the small middle of [B₁ −B₂][A₁; A₂]."""
    r_b = torch.linalg.qr(torch.cat([one.b, -other.b], dim=1).double(), mode="r")[1]
    r_a = torch.linalg.qr(torch.cat([one.a, other.a]).double().T, mode="r")[1]
    return float((r_b @ r_a.T).norm())


def rank_for_energy(values: torch.Tensor, energy: float) -> int:
    """The fewest leading singular values that hold this share of the sum of squares; at least one."""
    squares = values.double().square()
    total = float(squares.sum())
    if total == 0:
        return 1
    reached = squares.cumsum(0) / total >= energy - 1e-12
    return int(reached.long().argmax()) + 1 if bool(reached.any()) else len(values)


def truncate(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, kind: ModuleKind, rank: int
) -> tuple[Pair, float, float]:
    """The best pair of this rank (Eckart–Young), the share of energy kept and the Frobenius error.

    A rank beyond what there is stays what there is.
    """
    rank = min(rank, len(values))
    squares = values.double().square()
    total = float(squares.sum())
    kept = float(squares[:rank].sum()) / total if total else 1.0
    return balanced(left[:, :rank], values[:rank], right[:rank], kind), kept, math.sqrt(float(squares[rank:].sum()))


def lora_files(
    pairs: Mapping[str, Pair], *, targets: Sequence[str] | str, base_name: str | None, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors in PEFT layout. The commonest rank is `r`, other ranks go into `rank_pattern`.

    Raises InvalidRequest when there is no pair, or an adapter in half precision would overflow.
    """
    if not pairs:
        raise InvalidRequest("Nothing is left to write: no module has a low-rank part.")
    rank = Counter(p.rank for p in pairs.values()).most_common(1)[0][0]
    others = {path: p.rank for path, p in pairs.items() if p.rank != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(targets) if not isinstance(targets, str) else targets,
        "base_model_name_or_path": base_name,
    }
    if others:
        config |= {"rank_pattern": others, "alpha_pattern": others}
    if any(p.kind == "conv1d" for p in pairs.values()):
        config["fan_in_fan_out"] = True
    tensors: dict[str, torch.Tensor] = {}
    for path, pair in pairs.items():
        names = (
            ("lora_embedding_A", "lora_embedding_B") if pair.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        )
        for name, tensor in zip(names, (pair.a, pair.b), strict=True):
            tensors[f"{PREFIX}{path}.{name}"] = tensor.to(dtype)
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise InvalidParameter(f"The result does not fit {dtype}: choose `dtype` bfloat16 or float32.")
    return config, tensors


def short_targets(paths: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Leaf names where every module of that name in the base is meant, full paths otherwise."""
    wanted = set(paths)
    leaves = {path.rpartition(".")[2] for path in paths}
    whole = {leaf for leaf in leaves if all(m in wanted for m in modules if m.rpartition(".")[2] == leaf)}
    return sorted(whole) + sorted(p for p in wanted if p.rpartition(".")[2] not in whole)


@contextmanager
def applied(model: nn.Module, pairs: Mapping[str, Pair]) -> Iterator[None]:
    """Inside, `model` computes base + B A x with forward hooks: its weights stay untouched.

    Raises InvalidRequest when a path or a shape does not belong to the model.
    """
    modules = dict(model.named_modules())
    handles = []
    try:
        for path, pair in pairs.items():
            if path not in modules:
                raise InvalidRequest(f"The base has no module {path}: the adapter was made for another base.")
            handles.append(modules[path].register_forward_hook(_hook(pair)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(pair: Pair) -> Any:
    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if pair.kind == "embedding":
            low = nn.functional.embedding(inputs[0], pair.a.T.to(output.device))
        else:
            low = inputs[0].to(pair.a.dtype) @ pair.a.T.to(output.device)
        return output + (low @ pair.b.T.to(output.device)).to(output.dtype)

    return add
