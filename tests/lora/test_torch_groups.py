"""Which prompts the torch kernels multiply at once, by the operations that they run."""

from collections.abc import Mapping, Sequence
from copy import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from manylora.kernels.cpu import cpu_multiplies
from manylora.kernels.rows import group_rows
from manylora.kernels.torch_lora import MAX_GROUP, MAX_GROUP_ROWS
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.packing import PackedAdapter
from tests.engine.harness import TORCH
from tests.kernels.tolerance import assert_same_bits
from tests.lora.test_torch_kernel import Fleet

IN, OUT = 48, 40
SHUFFLED = (5, 0, 11, 14, 3, 8, 1, 15, 2, 12, 7, 4, 13, 6, 10, 9)  # adapters in the order of their prompts


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes torch's operations by name, and how many numbers the matmuls multiply."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.multiplications = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[torch.Tensor, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = func.overloadpacket.__name__
        self.names.append(name)
        if name in ("mm", "addmm_"):
            self.multiplications += args[-2].numel() * args[-1].shape[1]
        return func(*args, **(kwargs or {}))

    @property
    def num_matmuls(self) -> int:
        return self.names.count("mm") + self.names.count("addmm_")


def make(ranks: Sequence[int], dtype: torch.dtype = torch.float32) -> Fleet:
    return Fleet(TORCH.lora, (OUT,), [{0: rank} for rank in ranks], in_features=IN, dtype=dtype)


def prompts(fleet: Fleet, order: Sequence[int], rows: int) -> list[int]:
    return [fleet.slots[i] for i in order for _ in range(rows)]


def run(fleet: Fleet, row_slots: list[int]) -> Operations:
    """The operations of a step, whose result is right."""
    fleet.check(row_slots, fleet.group())
    x, out = fleet.inputs(len(row_slots), sum(fleet.widths))
    plan = fleet.plan(row_slots)
    operations = Operations()
    with operations:
        plan.add_(out, x, fleet.group())
    return operations


def test_prompts_of_small_rank_are_multiplied_a_few_neighbours_at_once() -> None:
    made = make([16] * 16)
    row_slots = prompts(made, SHUFFLED, 12)
    operations = run(made, row_slots)
    assert operations.num_matmuls == 2 * 16 / MAX_GROUP
    assert operations.multiplications == MAX_GROUP * len(row_slots) * 16 * (IN + OUT)


def test_prompts_of_large_rank_are_multiplied_by_their_own_adapters_only() -> None:
    made = make([64] * 6)
    row_slots = prompts(made, range(6), 12)
    assert run(made, row_slots).multiplications == len(row_slots) * 64 * (IN + OUT)


@pytest.mark.parametrize(("rank", "dtype"), [(24, torch.float32), (32, torch.bfloat16), (40, torch.bfloat16)])
def test_twice_the_rank_is_small_in_half_the_bits(rank: int, dtype: torch.dtype) -> None:
    made = make([rank] * 3, dtype)
    row_slots = prompts(made, range(3), 12)
    times = 3 if rank == 32 and cpu_multiplies(dtype) else 1
    assert run(made, row_slots).multiplications == times * len(row_slots) * rank * (IN + OUT)


def test_every_module_of_a_layout_goes_by_its_own_rank() -> None:
    made = Fleet(TORCH.lora, (OUT, OUT), [{0: 8, 1: 64}] * 3, in_features=IN)
    row_slots = prompts(made, (2, 0, 1), 12)
    assert run(made, row_slots).multiplications == len(row_slots) * (3 * 8 + 64) * (IN + OUT)


def test_prompts_far_from_each_other_are_multiplied_one_by_one() -> None:
    made = make([8] * 3)
    far = [made.slots[0]] * 12 + [-1] * MAX_GROUP_ROWS + prompts(made, (1, 2), 12)
    assert run(made, far).multiplications == (12 + 2 * 24) * 8 * (IN + OUT)
    long = prompts(made, range(3), MAX_GROUP_ROWS // 2)
    assert run(made, long).num_matmuls == 4


def test_rows_between_prompts_of_a_group_are_right() -> None:
    made = make([8] * 6 + [16] * 2)
    between = [-1, made.slots[6], *prompts(made, [7], 9), made.slots[5], made.slots[4], made.slots[4]]
    row_slots = [*prompts(made, [3], 9), *between, *prompts(made, [0], 9), *between, *prompts(made, [2, 1], 9)]
    assert run(made, row_slots).names.count("masked_fill_") == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("places_per_slab", [1, 32])
def test_adapters_that_are_not_finite_stay_out_of_every_group(value: float, places_per_slab: int) -> None:
    kernel = copy(TORCH.lora)
    kernel.places_per_slab = places_per_slab
    made = Fleet(kernel, (OUT,), [{0: 8}] * 16, in_features=IN)
    row_slots = [*prompts(made, SHUFFLED, 9), -1]
    x, out = made.inputs(len(row_slots), OUT)
    clean, beside = out.clone(), out.clone()
    made.plan(row_slots).add_(clean, x, made.group())
    spoiled = made.slots[SHUFFLED[3]]
    place = made.memory.places[spoiled]
    layout = made.memory.slabs[place.slab].layout
    made.memory.fill(place, PackedAdapter(layout, {0: 8}, torch.full((layout.numel,), value)))
    made.plan(row_slots).add_(beside, x, made.group())
    others = torch.tensor(row_slots) != spoiled
    torch.testing.assert_close(beside[others], clean[others])
    assert not torch.isfinite(beside[~others]).any()
    assert_same_bits(beside[-1], out[-1])


def test_a_step_moves_nothing_to_the_device_layer_by_layer() -> None:
    made = make([8] * 3)
    device = torch.device("meta")
    memory = DeviceMemory(1, 6, device, lambda numel, dtype: torch.empty(numel, dtype=dtype, device=device))
    for place in made.memory.places.values():
        slab = made.memory.slabs[place.slab]
        if place.slab not in memory.slabs:
            memory.allocate(place, slab.layout, slab.num_places)
        packed = PackedAdapter(slab.layout, {0: 8}, torch.zeros(slab.layout.numel))
        memory.fill(place, packed)
        memory.publish(place, packed)
    row_slots = torch.tensor(prompts(made, range(3), 12), dtype=torch.int32).numpy()
    rows = group_rows(row_slots, made.memory.touches, torch.device("cpu"))
    assert rows is not None
    plan = made.kernel.plan(rows, memory)
    operations = Operations()
    with operations:
        plan.add_(torch.empty(36, OUT, device=device), torch.empty(36, IN, device=device), made.group())
    assert operations.names.count("masked_fill_") == 1
    assert "_to_copy" not in operations.names
