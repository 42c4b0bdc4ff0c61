"""The plain values of the adapter format: what the base offers, what an adapter brings."""

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
class LoraModule:
    """The low-rank pair of one module: y += scale * B (A x), whatever the kind.

    linear and conv1d: a [rank, in_features], b [out_features, rank]. embedding: x is one-hot, so a is
    [rank, vocabulary] and b is [hidden, rank]. `scale` is alpha/rank, or alpha/sqrt(rank) for rsLoRA.
    """

    path: str
    kind: ModuleKind
    rank: int
    scale: float
    a: TensorView
    b: TensorView


@dataclass(frozen=True)
class Adapter:
    """A validated adapter. `modules` are in the order of the base's modules.

    `rank` is the largest of its modules, `alpha` the config's `lora_alpha`; `target_modules` is the config's
    list (sorted), or its one pattern. `digest` is the sha256 of the canonical content: the config as sorted
    JSON and the tensors by name, whatever the layout of the file; "" where a trusted read was not given it.
    `size_bytes` is that of the two files. `matched` are the adapted modules' paths.
    """

    rank: int
    alpha: float
    target_modules: list[str]
    base_model_name_or_path: str | None
    modules: tuple[LoraModule, ...]
    digest: str
    size_bytes: int
    matched: list[str]
    warnings: list[str]
