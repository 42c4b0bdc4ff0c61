"""What the compiler makes of the programs as they are launched, for devices that are not here."""

import pytest
import torch

from manylora.kernels.interface import SiteGroup
from manylora.kernels.triton_lora import MANY, SINGLE
from tests.gpu.launches import Code, Launch, compiled, noted
from tests.gpu.test_lora_programs import CPU, plan_of
from tests.kernels.lora_case import DENSE, make_case

CAPABILITIES = (80, 90, 100)
SHARED_BYTES = 100 * 1024  # what every device from 8.0 on gives a program
# Of 16-bit matrices: Ampere's instruction, Hopper's of 64 rows and more, Blackwell's.
MATRIX = {80: "HMMA", 90: "HGMMA|HMMA", 100: "UTCHMMA|HMMA"}
META = torch.device("meta")


def lora_launches(dtype: torch.dtype, weight_dtype: torch.dtype, num_single: int, ranks: list[int]) -> list[Launch]:
    """Of q, k and v of a model of eight billion weights."""
    offsets = (0, 4096, 5120, 6144)
    case = make_case(dtype, ranks, widths=(8, 8, 8), rows=4, weight_dtypes=[weight_dtype], popularity="distinct")
    plan = plan_of(case.row_slots, case.memory(CPU), num_single)
    assert plan is not None
    x, out = torch.empty(4, 4096, dtype=dtype, device=META), torch.empty(4, 6144, dtype=dtype, device=META)
    with noted() as found:
        plan.add_(out, x, SiteGroup(0, offsets, torch.tensor(offsets, dtype=torch.int32)))
    return found


def check(code: Code, capability: int, *, has_products: bool = True, num_narrow: int = 0) -> None:
    assert code.stack_bytes == code.local_bytes == 0, "registers are spilt"
    assert code.shared_bytes <= SHARED_BYTES
    assert code.count(r"LDG\.E\.[US]?(16|8)\b") <= num_narrow, "weights are loaded a number at a time"
    if has_products:
        assert code.count("LDGSTS") > 0, "loads are waited for"
        assert code.count(MATRIX[capability]) > 0, "products are made number by number"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("num_single", "sizes"), [(4, SINGLE), (0, MANY)], ids=["single", "many"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_low_rank_products_use_the_device(
    capability: int, num_single: int, sizes: object, weight_dtype: torch.dtype
) -> None:
    launches = lora_launches(torch.bfloat16, weight_dtype, num_single, [16, 64])
    assert [launch.name for launch in launches] == ["shrink", "expand"]
    for launch in launches:
        code = compiled(launch, capability)
        check(code, capability)
        if sizes is MANY and capability == 90:
            assert code.count("HGMMA") > 0, "64 rows at a time are one instruction there"


@pytest.mark.parametrize("num_single", [4, 0], ids=["single", "many"])
def test_float16_and_whole_matrices_use_the_device(num_single: int) -> None:
    launches = lora_launches(torch.float16, torch.float16, num_single, [16, DENSE])
    assert [launch.name for launch in launches] == ["shrink", "expand", "add_dense"]
    for launch in launches:
        check(compiled(launch, 90), 90)


def test_adapters_of_several_formats_compile() -> None:
    case = make_case(torch.bfloat16, [8, 8], rows=4, weight_dtypes=[torch.int8, torch.bfloat16], popularity="distinct")
    plan = plan_of(case.row_slots, case.memory(CPU), 2)
    assert plan is not None
    group = SiteGroup(0, tuple(case.offsets), torch.tensor(case.offsets, dtype=torch.int32))
    with noted() as launches:
        plan.add_(case.out, case.x, group)
        plan.add_embedding_(case.out, torch.zeros(4, dtype=torch.int64), group, 1.0)
    assert [launch.name for launch in launches] == ["shrink", "expand"] * 2 + ["embed"] * 2
    for launch in launches[:5]:
        # A thread's part of an embedding's low numbers in int8 is two of them.
        check(compiled(launch, 90), 90, has_products=False, num_narrow=int(launch.name == "embed"))
