"""From a validated adapter to the flat buffer that slots and the host tier hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch

from manylora.lora.format.spec import Adapter, LowRank, ModuleKind
from manylora.lora.format.tensors import TensorView
from manylora.lora.memory.layout import Layout
from manylora.lora.memory.pages import zeros
from manylora.lora.memory.terms import LowRankExtent, LowRankRoom, NumberFormat, padded_rank

FILE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TORCH_DTYPES: Final[Mapping[NumberFormat, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
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
        found = {FILE_DTYPES[view.dtype] for module in adapter.modules for term in module.terms for view in term.views}
        own = found.pop() if len(found) == 1 else torch.float32
        return own if self.if_narrower and own.itemsize < self.dtype.itemsize else self.dtype

    def has_scales(self, dtype: torch.dtype) -> bool:
        """Whether the scaling stays beside the matrices: folded in, it would round them once more."""
        return dtype != self.model


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """`data`: one dimension, `layout.numel` elements; `ranks`: true rank of each site's low-rank term."""

    layout: Layout
    ranks: dict[int, int]
    data: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def _tensor(view: TensorView) -> torch.Tensor:
    # Read-only memory: torch only ever reads it here, so the writable flag is borrowed through numpy.
    raw = np.frombuffer(view.data, dtype=np.uint8).copy()
    return torch.from_numpy(raw).view(FILE_DTYPES[view.dtype]).reshape(view.shape)


def pack(adapter: Adapter, sites: Mapping[str, int], dtype: torch.dtype, *, has_scales: bool = False) -> PackedAdapter:
    """Lay an adapter out for the kernels, in `dtype`.

    `sites` maps module paths to their index in the model. A is stored [padded rank, in], B transposed to
    [padded rank, out]. An embedding's A ([r, vocab]) is stored [vocab, padded rank] in the same room, so that a
    token's row is contiguous. The scaling is folded into B, once, here; with `has_scales` it is kept beside the
    matrices instead, which then hold exactly what the files do, if `dtype` can.

    In int8, which always has scales, every row of A and of B as stored (so one of each per rank) is rounded to 127
    steps of its own either way; a rank's scale is its steps' product times the scaling.
    """
    has_scales = has_scales or not dtype.is_floating_point
    modules = sorted(adapter.modules, key=lambda module: sites[module.path])
    terms = [(sites[module.path], module.kind, term) for module in modules for term in module.terms]
    rooms = tuple((site, LowRankRoom(padded_rank(t.rank), t.a.shape[1], t.b.shape[0])) for site, _, t in terms)
    layout = Layout(rooms, FORMATS[dtype], has_scales)
    data = zeros(layout.numel, dtype)
    for site, kind, term in terms:
        _write(data, layout, layout.low_rank[site], kind, term)
    return PackedAdapter(layout, {site: term.rank for site, _, term in terms}, data)


def _write(data: torch.Tensor, layout: Layout, extent: LowRankExtent, kind: ModuleKind, term: LowRank) -> None:
    rank = term.rank
    a, b = _tensor(term.a), _tensor(term.b).T
    if layout.has_scales:
        scales = torch.full((rank,), term.scale)
        if not data.dtype.is_floating_point:
            (a, steps_a), (b, steps_b) = _rounded(a.float()), _rounded(b.float())
            scales *= steps_a * steps_b
        room = data[extent.scales : extent.scales + rank * layout.scale_elements]
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


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in whole steps of its own, -127 to 127, and the steps [rows]."""
    steps = rows.abs().amax(dim=1) / 127
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    return (rows / steps[:, None]).round().to(torch.int8), steps
