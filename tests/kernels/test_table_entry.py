"""An entry of the low-rank tables is named once in Python and once in C++, and both name the same."""

import pytest
import torch

from manylora.kernels import native
from manylora.lora.memory.device_memory import (
    DTYPE_CODES,
    OUTPUT_FIELDS,
    TABLE_FIELDS,
    DeviceMemory,
    OutputEntry,
    TableEntry,
)

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the C++ kernels are not installed")


def test_both_sides_have_the_same_fields_in_the_same_order() -> None:
    assert native.lora_entry_fields() == TableEntry._fields
    assert native.output_entry_fields() == OutputEntry._fields
    memory = DeviceMemory(1, 1, torch.device("cpu"))
    assert memory.outputs.entries.shape[2] == OUTPUT_FIELDS == len(native.output_entry_fields())
    assert DeviceMemory(1, 1, torch.device("cpu")).tables.shape[2] == TABLE_FIELDS == len(native.lora_entry_fields())


def test_a_number_format_that_the_kernels_do_not_know_is_refused() -> None:
    a, b, out = torch.ones(1, 2), torch.ones(1, 3), torch.zeros(1, 3)
    index = torch.tensor([0, 1], dtype=torch.int32)
    for code in (max(DTYPE_CODES.values()), max(DTYPE_CODES.values()) + 1):
        entry = TableEntry(a.data_ptr(), b.data_ptr(), 1, 0, code, 2, 3)
        arguments = (torch.tensor([[entry]]), torch.tensor([0, 3], dtype=torch.int32), index[:1], index[:1], index)
        if code in DTYPE_CODES.values():
            native.add_lora_(out, torch.ones(1, 2), *arguments)
        else:
            with pytest.raises(ValueError, match="number format is unknown"):
                native.add_lora_(out, torch.ones(1, 2), *arguments)
