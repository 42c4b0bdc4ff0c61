"""What torch's own operations can do on this CPU."""

import torch


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's matmul uses instructions for `dtype` here, rather than converting every number."""
    if dtype is not torch.bfloat16:
        return dtype is torch.float32
    # Where torch is built without oneDNN, its flag can be on all the same, and its operators do not exist.
    is_built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (is_built and torch.backends.mkldnn.enabled):
        return False
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is not None and bool(is_supported())
