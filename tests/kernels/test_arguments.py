"""No operator trusts its caller: arguments that do not fit are refused before anything is read or written.

A valid call of each operator is taken, and one argument at a time is spoilt: cut short, of another type, an index past
the end. Run under AddressSanitizer (`make sanitize`) these tests also show that a refused call has touched nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from manylora.kernels import native
from manylora.kernels.kv_entries import entry_width
from manylora.kernels.weights import pack_int4, pack_int8, pack_panels
from manylora.lora.memory.device_memory import OutputEntry
from tests.kernels.lora_case import make_case

Arguments = dict[str, torch.Tensor | int | float | None]


@dataclass
class Operator:
    """A valid call. `free`: (argument, dimension) pairs that may be shorter, since no more of them is needed."""

    name: str
    make: Callable[[], Arguments]
    indices: tuple[str, ...] = ()
    may_be_negative: tuple[str, ...] = ()
    free: set[tuple[str, int]] = field(default_factory=set)

    def call(self, arguments: Arguments) -> None:
        getattr(torch.ops.manylora, self.name)(*arguments.values())


# The tables have addresses only, so the weights have to live on.
LORA = make_case(torch.float32, [4, 8], in_features=24, widths=(16, 40), rows=6, popularity="distinct")


def _lora() -> Arguments:
    tables, offsets, order, slots, starts = LORA.arguments()
    return {
        "out": LORA.out.clone(), "x": LORA.x, "tables": tables, "out_offsets": offsets, "order": order,
        "segment_slots": slots, "segment_starts": starts,
    }  # fmt: skip


def _mixes() -> Arguments:
    tables, offsets, order, *_ = LORA.arguments()
    nothing = torch.tensor([[OutputEntry()] * tables.shape[1]] * tables.shape[0])
    return {
        "out": LORA.out.clone(), "x": LORA.x, "tables": tables, "inputs": nothing, "changes": nothing.clone(),
        "out_offsets": offsets, "order": order, "row_starts": torch.tensor([0, 2, len(order)], dtype=torch.int32),
        "part_starts": torch.tensor([0, 2, 3], dtype=torch.int32),
        "part_slots": torch.tensor([0, 1, 1], dtype=torch.int32), "part_weights": torch.tensor([0.5, -1.0, 2.0]),
    }  # fmt: skip


def _caches() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(4, 2, 8, 16), torch.zeros(4, 2, 8, 16)


def _attention() -> Arguments:
    k_cache, v_cache = _caches()
    return {
        "out": torch.zeros(5, 4, 16), "q": torch.randn(5, 4, 16), "k_cache": k_cache, "v_cache": v_cache,
        "block_tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "query_starts": torch.tensor([0, 1, 5], dtype=torch.int32),
        "context_lens": torch.tensor([16, 9], dtype=torch.int32),
        "scale": 0.25, "sliding_window": 0, "softcap": 0.0, "chunk": 0,
        "sinks": torch.randn(4), "slopes": torch.randn(4),
    }  # fmt: skip


def _write_kv() -> Arguments:
    k_cache, v_cache = _caches()
    slots = torch.tensor([31, 0, 9])
    return {
        "k": torch.randn(3, 2, 16), "v": torch.randn(3, 2, 16), "k_cache": k_cache, "v_cache": v_cache, "slots": slots
    }  # fmt: skip


def _in_a_rounded_cache(make: Callable[[], Arguments]) -> Callable[[], Arguments]:
    def made() -> Arguments:
        rounded = torch.zeros(2, 4, 2, 8, entry_width(16, torch.int8), dtype=torch.int8)
        return make() | {"k_cache": rounded[0], "v_cache": rounded[1]}

    return made


def _rope() -> Arguments:
    written = _write_kv()
    turns = {"cos": torch.randn(3, 8), "sin": torch.randn(3, 8)}
    head = {"q": torch.randn(3, 4, 16), "k": written["k"], "v": written["v"]}
    return head | turns | {name: written[name] for name in ("k_cache", "v_cache", "slots")}


def _norm() -> Arguments:
    return {"x": torch.randn(3, 24), "weight": torch.randn(24), "eps": 1e-5, "weight_offset": 0.0}


def _add_norm() -> Arguments:
    return {"residual": torch.randn(3, 24)} | _norm()


def _linear() -> Arguments:
    weight = pack_panels(torch.randn(70, 24))
    return {"x": torch.randn(3, 24), "packed": weight.packed, "out_features": 70, "bias": torch.randn(70)}


def _int8() -> Arguments:
    weight = pack_int8(torch.randn(70, 201))
    return {
        "x": torch.randn(3, 201), "packed": weight.packed, "scales": weight.scales, "group_sums": weight.group_sums,
        "bias": torch.randn(70), "group_size": weight.group_size,
    }  # fmt: skip


def _int4() -> Arguments:
    weight = pack_int4(torch.randn(70, 201))
    return {
        "x": torch.randn(3, 201), "packed": weight.packed, "scales": weight.scales, "out_features": 70,
        "bias": torch.randn(70), "group_size": weight.group_size,
    }  # fmt: skip


def _change() -> Arguments:
    # Kept alive by the operator's own arguments: `out` and the vector are one tensor.
    out = torch.ones(4, 16)
    entries = torch.tensor([[OutputEntry(out.data_ptr(), out.data_ptr(), 16)]])
    index = torch.tensor([0, 4], dtype=torch.int32)
    return {
        "out": out, "outputs": entries, "out_offsets": torch.tensor([0, 16], dtype=torch.int32),
        "order": torch.arange(4, dtype=torch.int32), "segment_slots": index[:1], "segment_starts": index,
    }  # fmt: skip


OPERATORS = (
    Operator(
        "add_lora_",
        _lora,
        indices=("out_offsets", "order", "segment_slots", "segment_starts"),
        free={("tables", 1)},  # a slot that no segment names
    ),
    Operator("add_mixes_", _mixes, indices=("out_offsets", "order", "row_starts", "part_starts", "part_slots")),
    Operator("change_output_", _change, indices=("out_offsets", "order", "segment_slots", "segment_starts")),
    Operator("paged_attention", _attention, indices=("block_tables", "query_starts", "context_lens"),
             free={("block_tables", 0)}),  # a third sequence's row
    Operator("write_kv", _write_kv, indices=("slots",), may_be_negative=("slots",)),
    Operator("paged_attention", _in_a_rounded_cache(_attention),
             indices=("block_tables", "query_starts", "context_lens"), free={("block_tables", 0)}),
    Operator("write_kv", _in_a_rounded_cache(_write_kv), indices=("slots",), may_be_negative=("slots",)),
    Operator("rms_norm", _norm, free={("x", 0)}),
    Operator("add_rms_norm_", _add_norm),
    Operator("silu_and_mul", lambda: {"gate_up": torch.randn(3, 24)}, free={("gate_up", 0)}),
    Operator("gelu_tanh_and_mul", lambda: {"gate_up": torch.randn(3, 24)}, free={("gate_up", 0)}),
    Operator("rope_write_kv", _rope, indices=("slots",), may_be_negative=("slots",),
             free={("q", 1)}),  # the number of heads
    Operator("linear", _linear, free={("x", 0)}),
    Operator("int8_linear", _int8, free={("x", 0)}),
    Operator("int4_linear", _int4, free={("x", 0), ("scales", 2)}),  # offsets
)  # fmt: skip


def _cuts(operator: Operator) -> Iterator[tuple[str, int]]:
    for name, value in operator.make().items():
        if isinstance(value, torch.Tensor):
            yield from ((name, dim) for dim in range(value.dim()) if (name, dim) not in operator.free)


CUTS = [(operator, name, dim) for operator in OPERATORS for name, dim in _cuts(operator)]
INDICES = [(operator, name) for operator in OPERATORS for name in operator.indices]


def test_every_operator_of_tensors_is_here() -> None:
    assert native.is_available()
    schemas = torch._C._jit_get_all_schemas()
    ours = {s.name.split("::")[1] for s in schemas if s.name.startswith("manylora::") and "Tensor" in str(s)}
    assert ours == {operator.name for operator in OPERATORS}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_the_calls_are_valid_as_they_stand(cpu_path: str, operator: Operator) -> None:
    operator.call(operator.make())


@pytest.mark.parametrize(("operator", "name", "dim"), CUTS, ids=lambda each: getattr(each, "name", str(each)))
def test_an_argument_cut_short_is_refused(cpu_path: str, operator: Operator, name: str, dim: int) -> None:
    arguments = operator.make()
    value = arguments[name]
    assert isinstance(value, torch.Tensor)
    arguments[name] = value.narrow(dim, 0, value.shape[dim] - 1).contiguous()
    with pytest.raises((ValueError, IndexError)):
        operator.call(arguments)


@pytest.mark.parametrize(("operator", "name"), INDICES, ids=lambda each: getattr(each, "name", str(each)))
@pytest.mark.parametrize("value", [2**30, -1, -(2**31)])
def test_an_index_out_of_range_is_refused(cpu_path: str, operator: Operator, name: str, value: int) -> None:
    if value < 0 and name in operator.may_be_negative:
        pytest.skip("a negative one has a meaning there")
    count = operator.make()[name]
    assert isinstance(count, torch.Tensor)
    for at in range(count.numel()):
        arguments = operator.make()
        spoilt = arguments[name]
        assert isinstance(spoilt, torch.Tensor)
        spoilt.view(-1)[at] = value
        with pytest.raises((ValueError, IndexError)):
            operator.call(arguments)


@pytest.mark.parametrize(("operator", "name", "dim"), CUTS, ids=lambda each: getattr(each, "name", str(each)))
def test_an_argument_of_another_type_is_refused(cpu_path: str, operator: Operator, name: str, dim: int) -> None:
    arguments = operator.make()
    value = arguments[name]
    assert isinstance(value, torch.Tensor)
    arguments[name] = value.double() if dim == 0 else value[None]
    with pytest.raises((ValueError, TypeError)):
        operator.call(arguments)


def test_rows_of_a_whole_batch_are_refused_for_some_of_its_rows(cpu_path: str) -> None:
    """As where a linear runs on the rows whose logits are wanted, with the plan of all rows."""
    case = make_case(torch.float32, [4, 8], in_features=24, widths=(16,), rows=9)
    with pytest.raises(IndexError, match="order"):
        native.add_lora_(case.out[:2], case.x[:2], *case.arguments())


def test_an_adapter_of_another_size_is_refused(cpu_path: str) -> None:
    case = make_case(torch.float32, [4], in_features=24, widths=(16,), rows=2)
    with pytest.raises(ValueError, match=r"slot 0 is for \[24\] -> \[16\]"):
        native.add_lora_(case.out, torch.zeros(2, 32), *case.arguments())
