"""What torch's own operations can do on this CPU."""

from collections.abc import Callable, Mapping
from typing import Final

import torch


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's matmul uses instructions for `dtype` here, rather than converting every number."""
    has_instructions = _INSTRUCTIONS.get(dtype)
    return has_instructions is not None and has_instructions()


def _has_bfloat16() -> bool:
    # Where torch is built without oneDNN, its flag can be on all the same, and its operators do not exist.
    is_built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (is_built and torch.backends.mkldnn.enabled):
        return False
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is not None and bool(is_supported())


_INSTRUCTIONS: Final[Mapping[torch.dtype, Callable[[], bool]]] = {
    torch.float32: lambda: True,
    torch.bfloat16: _has_bfloat16,
}
