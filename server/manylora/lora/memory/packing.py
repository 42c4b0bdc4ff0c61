"""From a validated adapter to the flat buffer that slots and the host tier hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import numpy as np
import torch

from manylora.lora.format.spec import (
    Adapter,
    BaseLinear,
    Dense,
    Head,
    Input,
    LowRank,
    Matrix,
    ModuleKind,
    Output,
    Prefix,
    Reordered,
    Term,
    TokenRows,
)
from manylora.lora.format.tensors import TensorView
from manylora.lora.memory.layout import Layout
from manylora.lora.memory.pages import zeros
from manylora.lora.memory.terms import (
    DenseExtent,
    DenseRoom,
    Extent,
    InputExtent,
    InputRoom,
    LowRankExtent,
    LowRankRoom,
    NumberFormat,
    OutputExtent,
    OutputRoom,
    PrefixExtent,
    PrefixRoom,
    Room,
    TokenRowsExtent,
    TokenRowsRoom,
    padded_rank,
)

FILE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TORCH_DTYPES: Final[Mapping[NumberFormat, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
_Base = Callable[[], BaseLinear]  # asked only for what is made with it
FORMATS: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class KeepAs:
    """`model` is what the base computes in; every adapter is kept as `dtype`, or narrower, `if_narrower` in its files.

    So files of 16 bits cost no more beside a base in float32, and lose nothing.
    """

    model: torch.dtype
    dtype: torch.dtype
    if_narrower: bool = False

    @classmethod
    def choose(
        cls, asked: NumberFormat | Literal["auto"], model: torch.dtype, *, beside: torch.dtype, mixes_dtypes: bool
    ) -> "KeepAs":
        """What the setting `lora_dtype` means.

        `beside`: what goes with the format that the base is kept in. `mixes_dtypes`: the kernel multiplies other types
        than the model's.
        """
        if asked != "auto":
            return cls(model, TORCH_DTYPES[asked])
        return cls(model, beside, if_narrower=mixes_dtypes)

    def dtype_of(self, adapter: Adapter) -> torch.dtype:
        """The format for one adapter."""
        matrices = [each for module in adapter.modules for term in module.terms for each in term.matrices]
        found = {FILE_DTYPES[each.dtype] for each in matrices}
        own = found.pop() if len(found) == 1 else torch.float32
        return own if self.if_narrower and own.itemsize < self.dtype.itemsize else self.dtype

    def has_scales(self, dtype: torch.dtype) -> bool:
        """Whether the scaling stays beside the matrices: folded in, it would round them once more."""
        return dtype != self.model


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """`data`: one dimension, `layout.numel` elements; `ranks`: true rank of each site's low-rank term; its `head`.

    `num_tokens`: how many tokens there are for it, where these are not the base's.
    """

    layout: Layout
    ranks: dict[int, int]
    data: torch.Tensor
    head: Head | None = None
    num_tokens: int | None = None

    @property
    def size_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def _no_base(path: str) -> BaseLinear:
    """An adapter whose terms are all in its files needs none, and asks for none."""
    raise LookupError(f"{path} is packed without its base")


def pack(
    adapter: Adapter,
    sites: Mapping[str, int],
    dtype: torch.dtype,
    *,
    base: Callable[[str], BaseLinear] = _no_base,
    has_scales: bool = False,
) -> PackedAdapter:
    """Lay an adapter out for the kernels, in `dtype`.

    `sites` maps module paths to their index in the model. A is stored [padded rank, in], B transposed to
    [padded rank, out]. An embedding's A ([r, vocab]) is stored [vocab, padded rank] in the same room, so that a
    token's row is contiguous. The scaling is folded into B, once, here; with `has_scales` it is kept beside the
    matrices instead, which then hold exactly what the files do, if `dtype` can.

    In int8, which always has scales, every row of a matrix as stored (so of A and B one of each per rank) is rounded to
    127 steps of its own either way; a rank's scale is its steps' product times the scaling.

    `base` has the base's modules by path, for terms that are made with their weights.
    """
    has_scales = has_scales or not dtype.is_floating_point
    modules = sorted(adapter.modules, key=lambda module: sites[module.path])
    terms = [(sites[module.path], module, term) for module in modules for term in module.terms]
    layout = Layout(tuple((site, _room(module.kind, term)) for site, module, term in terms), FORMATS[dtype], has_scales)
    data = zeros(layout.numel, dtype)
    for (_, module, term), (_, extent) in zip(terms, layout.placed, strict=True):
        _write(data, layout, extent, module.kind, term, partial(base, module.path))
    ranks = {site: term.rank for site, _, term in terms if isinstance(term, LowRank)}
    return PackedAdapter(layout, ranks, data, adapter.head, adapter.num_tokens)


def _room(kind: ModuleKind, term: Term) -> Room:
    match term:
        case LowRank():
            return LowRankRoom(padded_rank(term.rank), term.a.shape[1], term.b.shape[0])
        case Dense():
            rows, columns = term.matrix.shape
            return DenseRoom(columns, rows) if kind == "embedding" else DenseRoom(rows, columns)
        case TokenRows():
            return TokenRowsRoom(term.ids, term.rows.shape[1])
        case Input():
            return InputRoom(term.scale.shape[0])
        case Prefix():
            return PrefixRoom(term.count, 0 if term.embeddings is None else term.embeddings.shape[1], term.past_width)
        case Output():
            width = term.matrices[0].shape[0]
            return OutputRoom(width, term.scale is not None, term.shift is not None)


def _write(data: torch.Tensor, layout: Layout, extent: Extent, kind: ModuleKind, term: Term, base: _Base) -> None:
    match term, extent:
        case LowRank(), LowRankExtent():
            _write_low_rank(data, layout, extent, kind, term, base)
        case Dense(), DenseExtent():
            _write_dense(data, layout, extent, kind, term, base)
        case TokenRows(), TokenRowsExtent():
            size = len(term.ids) * extent.width * extent.float_elements
            room = data[extent.rows : extent.rows + size]
            room.view(torch.float32).copy_(_tensor(term.rows, base).flatten())
        case Input(), InputExtent():
            _write_vector(data, extent.scale, extent, term.scale, base)
        case Output(), OutputExtent():
            for at, vector in ((extent.scale, term.scale), (extent.shift, term.shift)):
                if at is not None and vector is not None:
                    _write_vector(data, at, extent, vector, base)
        case Prefix(), PrefixExtent():
            for at, matrix in ((extent.embeddings, term.embeddings), (extent.past, term.past)):
                if at is not None and matrix is not None:
                    room = data[at : at + matrix.shape[0] * matrix.shape[1] * extent.float_elements]
                    room.view(torch.float32).copy_(_tensor(matrix, base).flatten())


def _write_vector(data: torch.Tensor, at: int, extent: InputExtent | OutputExtent, vector: Matrix, base: _Base) -> None:
    room = data[at : at + extent.width * extent.float_elements]
    room.view(torch.float32).copy_(_tensor(vector, base))


def _tensor(matrix: Matrix, base: _Base) -> torch.Tensor:
    if isinstance(matrix, Reordered):
        return torch.from_numpy(matrix.values())
    if not isinstance(matrix, TensorView):
        return torch.from_numpy(np.ascontiguousarray(matrix.values(base())))
    # Read-only memory: torch only ever reads it here, so the writable flag is borrowed through numpy.
    raw = np.frombuffer(matrix.data, dtype=np.uint8).copy()
    return torch.from_numpy(raw).view(FILE_DTYPES[matrix.dtype]).reshape(matrix.shape)


def _write_low_rank(
    data: torch.Tensor, layout: Layout, extent: LowRankExtent, kind: ModuleKind, term: LowRank, base: _Base
) -> None:
    rank = term.rank
    a, b = _tensor(term.a, base), _tensor(term.b, base).T
    if layout.has_scales:
        scales = torch.full((rank,), term.scale)
        if not data.dtype.is_floating_point:
            (a, steps_a), (b, steps_b) = _rounded(a.float()), _rounded(b.float())
            scales *= steps_a * steps_b
        room = data[extent.scales : extent.scales + rank * layout.float_elements]
        room.view(torch.float32).copy_(scales)
    else:
        b = b.float() * term.scale
    room_a = data[extent.a : extent.a + extent.padded * extent.in_features]
    room_b = data[extent.b : extent.b + extent.padded * extent.out_features]
    if kind == "embedding":
        room_a.view(extent.in_features, extent.padded)[:, :rank] = a.T
    else:
        room_a.view(extent.padded, extent.in_features)[:rank] = a
    room_b.view(extent.padded, extent.out_features)[:rank] = b


def _write_dense(
    data: torch.Tensor, layout: Layout, extent: DenseExtent, kind: ModuleKind, term: Dense, base: _Base
) -> None:
    matrix = _tensor(term.matrix, base)
    rows = matrix.T if kind == "embedding" else matrix
    if layout.has_scales:
        scales = torch.ones(extent.rows)
        if not data.dtype.is_floating_point:
            rows, scales = _rounded(rows.float())
        room = data[extent.scales : extent.scales + extent.rows * layout.float_elements]
        room.view(torch.float32).copy_(scales)
    data[extent.matrix : extent.matrix + extent.rows * extent.columns].view(extent.rows, extent.columns).copy_(rows)


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in whole steps of its own, -127 to 127, and the steps [rows]."""
    steps = rows.abs().amax(dim=1) / 127
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    return (rows / steps[:, None]).round().to(torch.int8), steps
