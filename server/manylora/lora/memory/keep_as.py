"""In what number format an adapter is kept in memory, in the host tier and on the device."""

from dataclasses import dataclass
from typing import Literal

import torch

from manylora.lora.format.reader import Adapter
from manylora.lora.memory.layout import NumberFormat
from manylora.lora.memory.packing import FILE_DTYPES, TORCH_DTYPES


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
        cls, asked: NumberFormat | Literal["auto"], model: torch.dtype, *, is_int8_base: bool, mixes_dtypes: bool
    ) -> "KeepAs":
        """What the setting `lora_dtype` means. `mixes_dtypes`: the kernel multiplies other types than the model's."""
        if asked != "auto":
            return cls(model, TORCH_DTYPES[asked])
        is_16_bit = is_int8_base and model == torch.float32
        return cls(model, torch.bfloat16 if is_16_bit else model, if_narrower=mixes_dtypes)

    def dtype_of(self, adapter: Adapter) -> torch.dtype:
        """The format for one adapter."""
        found = {FILE_DTYPES[view.dtype] for module in adapter.modules for view in (module.a, module.b)}
        own = found.pop() if len(found) == 1 else torch.float32
        return own if self.if_narrower and own.itemsize < self.dtype.itemsize else self.dtype

    def has_scales(self, dtype: torch.dtype) -> bool:
        """Whether the scaling stays beside the matrices: folded in, it would round them once more."""
        return dtype != self.model
