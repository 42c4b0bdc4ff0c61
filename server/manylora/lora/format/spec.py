"""The plain values of the adapter format: what the base offers, what an adapter brings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from manylora.identity import Vocabulary
from manylora.lora.format.tensors import TensorView

Floats = npt.NDArray[np.float32]

ModuleKind = Literal["linear", "conv1d", "embedding", "norm", "experts"]


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One adaptable module of the base.

    `path` is its name in the Hugging Face model, for example "model.layers.0.self_attn.q_proj". For an
    embedding `in_features` is the vocabulary's size and `out_features` the hidden size, of a norm both are its width.
    `shares_input`: whether other linears are computed with the very same input, as q, k and v are. `is_tied`: of an
    embedding and a head that have one weight. `is_head`: of the linear that makes the logits. `grows`: of an embedding
    and a head that may have rows for tokens which the base has not. `is_parameter`: of what adapters name by its
    parameter and not by its module (`target_parameters`): a router, or the experts of a layer, whose path ends in the
    parameter's name and whose sizes are those of each of `num_experts`. `past`: of the embedding, how many layers,
    heads and numbers of a head the keys of a token have, and its values alike; None where layers differ.
    `has_swapped_ab`: of experts that PEFT takes to lie the other way round, so that its A is on the side of the output.
    """

    path: str
    kind: ModuleKind
    in_features: int
    out_features: int
    shares_input: bool = False
    is_tied: bool = False
    is_head: bool = False
    grows: bool = False
    is_parameter: bool = False
    num_experts: int = 1
    has_swapped_ab: bool = False
    past: tuple[int, int, int] | None = None

    @property
    def parameter(self) -> str:
        """The name of its weight, as `target_parameters` ends in it: "model.layers.0.self_attn.q_proj.weight"."""
        return self.path if self.kind == "experts" else f"{self.path}.weight"

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


class BaseLinear(Protocol):
    """One module of the base as it is served: [out_features, in_features], of an embedding [hidden, vocabulary].

    A norm's weight is its gain, [width, 1]: `weight_offset`, 0 for everything else, and what the checkpoint has.
    """

    weight_offset: float

    def __hash__(self) -> int: ...

    @property
    def bias(self) -> Floats | None:
        """[out_features]; None where it has none."""
        ...

    def weight(self) -> Floats:
        """All of the weight, in float32. Not to be changed."""
        ...

    def project(self, rows: Floats) -> Floats:
        """`rows` [n, in_features] times the weight: [n, out_features]."""
        ...

    def token_rows(self, ids: Sequence[int]) -> Floats:
        """Of an embedding or a head, each token's numbers [n, hidden]; zeros for one that the base has not."""
        ...

    def squared_norms(self) -> Floats:
        """Of each output's row of the weight: [out_features]."""
        ...


class Matrix(Protocol):
    """Numbers of an adapter: those of a file, or what is made of them."""

    @property
    def dtype(self) -> str:
        """As the safetensors format calls it: "F32", "BF16" or "F16"."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_bytes(self) -> int:
        """What it takes in memory, in this dtype."""
        ...

    def values(self, base: BaseLinear) -> Floats:
        """The numbers, for this module of the base. Not to be changed."""
        ...


@dataclass(frozen=True, slots=True)
class Made:
    """A matrix that is made when the adapter is packed, of its tensors and perhaps of the base's weight.

    `make` gets the module and returns float32 of `shape`. It was checked to fit: it raises nothing.
    """

    shape: tuple[int, ...]
    make: Callable[[BaseLinear], Floats]
    dtype: str = field(default="F32", init=False)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * np.dtype(np.float32).itemsize

    def values(self, base: BaseLinear) -> Floats:
        found = self.make(base)
        assert found.shape == self.shape
        return found


@dataclass(frozen=True, slots=True)
class Reordered:
    """A file's numbers in another order: `order` gets them as they lie there and returns them in the same shape."""

    view: TensorView
    order: Callable[[Floats], Floats]

    @property
    def dtype(self) -> str:
        return self.view.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def num_bytes(self) -> int:
        return self.view.num_bytes

    def values(self, _base: object = None) -> Floats:
        """The tensor's values, which do not depend on the base's."""
        return self.order(self.view.to_float32())


@dataclass(frozen=True, slots=True)
class LowRank:
    """A term: y += scale * B (A x).

    linear and conv1d: a [rank, in_features], b [out_features, rank]. embedding: x is one-hot, so a is
    [rank, vocabulary] and b is [hidden, rank]. For LoRA `scale` is alpha/rank, or alpha/sqrt(rank) for rsLoRA.
    Of experts `rank` is that of all together, one expert after the other: expert e of n has the ranks from
    e * rank / n on.
    """

    rank: int
    scale: float
    a: Matrix
    b: Matrix
    num_experts: int = 1

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Everything that the term is made of."""
        return self.a, self.b


@dataclass(frozen=True, slots=True)
class Dense:
    """A term: y += D x, where D [out_features, in_features] has no small factors."""

    matrix: Matrix

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Everything that the term is made of."""
        return (self.matrix,)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """A term of the embedding or the head: of the tokens `ids`, ascending, `rows` [n, hidden] are added to the base's.

    Of the embedding y[t] += rows[t], of the head y[ids] += rows x.
    """

    ids: tuple[int, ...]
    rows: Matrix

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Everything that the term is made of."""
        return (self.rows,)


@dataclass(frozen=True, slots=True)
class Input:
    """A term: x = scale * x [in_features], before the base and every other term see it.

    Of linears that share their input (q, k and v) no adapter can have it for some of them only.
    """

    scale: Matrix

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Everything that the term is made of."""
        return (self.scale,)


@dataclass(frozen=True, slots=True)
class Output:
    """A term: y = scale * y + shift, [out_features] each, once all others have been added; None leaves y as it is."""

    scale: Matrix | None = None
    shift: Matrix | None = None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Everything that the term is made of."""
        return tuple(each for each in (self.scale, self.shift) if each is not None)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A term of the embedding: `count` virtual tokens before each prompt.

    Either `embeddings` [count, hidden] or what layers would make of them, `past` [count, past_width]: the keys and the
    values of layer after layer, each [heads, head size].
    """

    count: int
    past_width: int
    embeddings: Matrix | None
    past: Matrix | None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Everything that the term is made of."""
        return tuple(each for each in (self.embeddings, self.past) if each is not None)


Term = (
    LowRank | Dense | TokenRows | Input | Output | Prefix
)  # one class for each thing that an adapter may do to a module


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """What an adapter does to one module of the base: terms, each of another class, and not both of the additions."""

    path: str
    kind: ModuleKind
    terms: tuple[Term, ...]


ProblemType = Literal["single", "multi", "regression"]


@dataclass(frozen=True, slots=True)
class Head:
    """What an adapter's head says: one score for each of `labels`, of a text (SEQ_CLS) or of each token.

    `problem`: one of the labels holds, any number of them do, or the scores are numbers in themselves.
    """

    task: str
    labels: tuple[str, ...]
    problem: ProblemType = "single"


@dataclass(frozen=True)
class Adapter:
    """A validated adapter. `modules` are in the order of the base's modules.

    `kind` is what the registry calls its kind of adapter. `rank` is the largest of its modules, `alpha` the config's
    `lora_alpha`; `target_modules` is the config's list (sorted), or its one pattern. `digest` is the sha256 of the
    canonical content: the config as sorted JSON and the tensors by name, whatever the layout of the file; "" where a
    trusted read was not given it; `former_digest` what it was before tokens of a tokenizer counted, "" where none do.
    `size_bytes` is that of the two files and of what is kept of its vocabulary. `matched` are the adapted modules'
    paths. `invocation`: tokens from which on it acts, where it does not act everywhere. `num_tokens`: how many tokens
    it has rows for, where these are not as many as the base has; `vocabulary`: what else is its own of its tokenizer.
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
    invocation: tuple[int, ...] = ()
    head: Head | None = None
    num_tokens: int | None = None
    vocabulary: Vocabulary | None = None
    former_digest: str = ""

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that it takes before each prompt."""
        return sum(term.count for module in self.modules for term in module.terms if isinstance(term, Prefix))

    @property
    def token_ids(self) -> list[int]:
        """Tokens of which it changes the rows, sorted: without one of them in a prompt it may do nothing."""
        terms = (term for module in self.modules for term in module.terms)
        return sorted({each for term in terms if isinstance(term, TokenRows) for each in term.ids})
