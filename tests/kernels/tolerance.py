"""What a kernel may differ from float64 arithmetic on the same inputs: one table for all operators."""

import torch

# (relative, absolute). The kernels accumulate in float32, so the absolute part is float32's rounding of a sum, and
# the relative part one rounding of the result to its dtype, with a little room for a tie that falls the other way.
TOLERANCES = {
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2**-7, 1e-3),
    torch.float16: (2**-10, 1e-4),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    relative, absolute = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=absolute, equal_nan=True)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the last bit, NaN included."""
    whole = {4: torch.int32, 2: torch.int16}[actual.element_size()]
    assert torch.equal(actual.contiguous().view(whole), expected.contiguous().view(whole))
