"""The plain values of the adapter format: what the base offers, what an adapter brings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from manylora.lora.format.tensors import TensorView

ModuleKind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One adaptable module of the base.

    `path` is its name in the Hugging Face model, for example "model.layers.0.self_attn.q_proj". For an
    embedding `in_features` is the vocabulary's size and `out_features` the hidden size.
    """

    path: str
    kind: ModuleKind
    in_features: int
    out_features: int

    @property
    def leaf(self) -> str:
        """The last part of the path: "q_proj"."""
        return self.path.rpartition(".")[2]


class BaseWeights(Protocol):
    """The base's own numbers, to hold an adapter's copies of them against."""

    def find(self, path: str, part: str) -> TensorView | None:
        """The "weight" or "bias" of a module as the base's checkpoint stores it; None where that is not known."""
        ...


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter is held against.

    `modules` by path, in the base's order. `weights` are the base's own numbers, None where they are not at hand.
    """

    modules: Mapping[str, ModuleSpec]
    max_rank: int
    weights: BaseWeights | None = None


@dataclass(frozen=True, slots=True)
class LowRank:
    """A term: y += scale * B (A x).

    linear and conv1d: a [rank, in_features], b [out_features, rank]. embedding: x is one-hot, so a is
    [rank, vocabulary] and b is [hidden, rank]. For LoRA `scale` is alpha/rank, or alpha/sqrt(rank) for rsLoRA.
    """

    rank: int
    scale: float
    a: TensorView
    b: TensorView

    @property
    def views(self) -> tuple[TensorView, ...]:
        """Every tensor of the term."""
        return self.a, self.b


Term = LowRank  # one class for each thing that an adapter may do to a module


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """What an adapter does to one module of the base: terms, each of another class."""

    path: str
    kind: ModuleKind
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Adapter:
    """A validated adapter. `modules` are in the order of the base's modules.

    `kind` is what the registry calls its kind of adapter. `rank` is the largest of its modules, `alpha` the config's
    `lora_alpha`; `target_modules` is the config's list (sorted), or its one pattern. `digest` is the sha256 of the
    canonical content: the config as sorted JSON and the tensors by name, whatever the layout of the file; "" where a
    trusted read was not given it. `size_bytes` is that of the two files. `matched` are the adapted modules' paths.
    """

    rank: int
    alpha: float
    target_modules: list[str]
    base_model_name_or_path: str | None
    modules: tuple[AdaptedModule, ...]
    digest: str
    size_bytes: int
    matched: list[str]
    warnings: list[str]
    kind: str
