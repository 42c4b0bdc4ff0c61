"""What torch's own operations can do on this CPU."""

import torch


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's matmul uses instructions for `dtype` here, rather than converting every number."""
    if dtype is torch.bfloat16:
        return bool(torch.backends.mkldnn.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
