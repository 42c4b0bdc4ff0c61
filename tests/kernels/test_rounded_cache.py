"""Keys and values in 8 bits: writing them, attending to them, and what they cost."""

import pytest
import torch

from manylora.kernels import native
from manylora.kernels.batch import AttentionOptions
from manylora.kernels.kv_entries import as_entries, entry_width, read_entries, width_of
from manylora.kernels.reference import attention, rope
from manylora.kernels.torch_attention import TorchAttention
from tests.kernels.test_paged_attention import AttentionCase
from tests.kernels.test_torch_attention import BLOCK, make_batch
from tests.kernels.tolerance import assert_close, assert_same_bits

ROOM = torch.empty(0, dtype=torch.int8)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rooms(width: int, kv_heads: int = 3) -> torch.Tensor:
    """Keys and values: two caches of nothing, whose scales are NaN."""
    return torch.full((2, 4, kv_heads, 8, entry_width(width, torch.int8)), -1, dtype=torch.int8)


def assert_same_entries(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same scales, and integers that differ by one at most and seldom: where a tie was rounded once or twice.

    Of 16 bits ties are not rare: a vector's numbers and its largest have few bits each.
    """
    assert torch.equal(found[..., -4:], wanted[..., -4:])
    apart = (found[..., :-4].int() - wanted[..., :-4].int()).abs()
    assert int(apart.max()) <= 1
    assert int(apart.sum()) <= 2 + apart.numel() // 16


@pytest.mark.parametrize("head_dim", [1, 5, 64, 80])
def test_entries_are_written_as_the_specification_has_them(cpu_path: str, dtype: torch.dtype, head_dim: int) -> None:
    k, v = (torch.randn(2, 6, 3, head_dim) * torch.logspace(-3, 3, 6)[:, None, None]).to(dtype)
    k[1], v[2, 0] = 0, 1e-40
    k_cache, v_cache = rooms(head_dim)
    expected = k_cache.clone(), v_cache.clone()
    slots = torch.tensor([31, 0, 9, 8, -1, 23])
    native.write_kv(k, v, k_cache, v_cache, slots)
    for t, slot in enumerate(slots.tolist()):
        for room, new in zip(expected, (k, v), strict=True):
            if slot >= 0:
                room[slot // 8, :, slot % 8] = as_entries(new[t], room)
    assert_same_entries(k_cache, expected[0])
    assert_same_entries(v_cache, expected[1])


def test_turned_keys_are_rounded_as_they_would_be_kept(cpu_path: str, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 5, 2, 16).to(dtype)
    cos, sin = torch.randn(2, 5, 8)
    whole, rounded = torch.zeros(2, 4, 2, 8, 16).to(dtype), rooms(16, kv_heads=2)
    slots = torch.tensor([3, 31, -1, 8, 0])
    out = native.rope_write_kv(q, k, v, cos, sin, rounded[0], rounded[1], slots)
    assert_close(out, rope(q, cos, sin))
    assert_same_bits(native.rope_write_kv(q, k, v, cos, sin, whole[0], whole[1], slots), out)
    for kept, entries in zip(whole, rounded, strict=True):
        for slot in (3, 31, 8, 0):
            at = slot // 8, slice(None), slot % 8
            assert_same_entries(entries[at], as_entries(kept[at], entries))
    assert (rounded[:, 1, :, 3] == -1).all()  # no token's


@pytest.mark.parametrize("head_dim", [1, 7, 33, 64, 80, 256])
def test_attention_is_to_what_can_be_read_back(cpu_path: str, dtype: torch.dtype, head_dim: int) -> None:
    case = AttentionCase(
        dtype, [(1, 1), (1, 50), (9, 20), (30, 130)], head_dim=head_dim, scale=head_dim**-0.5, is_rounded=True
    )
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize(
    "kind",
    [{"window": 70}, {"softcap": 5.0}, {"chunk": 50, "value_dim": 24}, {"sinks": torch.arange(6.0)}, {"heads": 2}],
    ids=str,
)
def test_every_kind_of_attention(cpu_path: str, kind: dict[str, object]) -> None:
    case = AttentionCase(torch.float32, [(1, 90), (70, 200), (1, 2100), (1, 2)], is_rounded=True, **kind)  # type: ignore[arg-type]
    assert_close(case.run(), case.expected())


def test_a_row_does_not_depend_on_its_neighbours_nor_on_how_its_prompt_is_cut(
    cpu_path: str, dtype: torch.dtype
) -> None:
    case = AttentionCase(dtype, [(1, 300), (70, 200), (1, 2100)], is_rounded=True)
    together = case.run()
    case.sequences, case.q = [(1, 300), (7, 200), (1, 2100)], torch.cat((case.q[:1], case.q[64:]))
    assert_same_bits(case.run(), torch.cat((together[:1], together[64:])))


def test_what_is_not_finite_spoils_its_own_entry(cpu_path: str, dtype: torch.dtype) -> None:
    k = torch.randn(3, 3, 8).to(dtype)
    k[0, 1, 2], k[1, 2, 7] = float("nan"), -float("inf")
    k_cache, v_cache = rooms(8)
    native.write_kv(k, k, k_cache, v_cache, torch.tensor([0, 1, 2]))
    read = read_entries(k_cache)[0, :, :3].transpose(0, 1)
    assert read.isnan().all(dim=2).tolist() == [[False, True, False], [False, False, True], [False] * 3]
    assert read.isnan().any(dim=2).equal(read.isnan().all(dim=2))
    assert read_entries(as_entries(k, ROOM)).isnan().equal(read.isnan())


def test_what_is_read_back_is_written_as_it_was() -> None:
    """As where virtual tokens are kept and brought into the cache again."""
    entries = as_entries(torch.randn(4000, 64) * torch.logspace(-30, 30, 4000)[:, None], ROOM)
    assert torch.equal(as_entries(read_entries(entries), ROOM), entries)


def test_rounding_costs_half_a_step_of_the_largest_number() -> None:
    values = torch.randn(500, 64)
    off = (read_entries(as_entries(values, ROOM)) - values).abs().amax(dim=1)
    assert (off <= values.abs().amax(dim=1) / 127 * 0.51).all()
    assert width_of(rooms(64)[0]) == 64


@pytest.mark.parametrize("multiplies", [True, False])
def test_torch_attends_to_the_same_entries(multiplies: bool) -> None:
    torch.manual_seed(0)
    attend, options = TorchAttention(lambda _dtype: multiplies), AttentionOptions(0.3, 0, 0.0)
    batch = make_batch([(1, 5), (1, 13), (3, 3), (4, 11)], num_blocks=40)
    q, k, v = torch.randn(batch.starts[-1], 6, 8), *torch.randn(2, batch.starts[-1], 2, 8)
    keys, values = torch.full((2, 40, 2, BLOCK, entry_width(8, torch.int8)), -1, dtype=torch.int8)
    past = [torch.randn(2, length, 2, 8) for length in batch.lens]
    wanted = []
    for s, length in enumerate(batch.lens):
        rows = slice(batch.starts[s], batch.starts[s + 1])
        past[s][:, length - (rows.stop - rows.start) :] = torch.stack((k[rows], v[rows]))
        at = torch.arange(length)
        blocks = batch.block_tables[s][at // BLOCK].long()
        for room, kept in zip((keys, values), past[s], strict=True):
            room[blocks, :, at % BLOCK] = as_entries(kept, room)
        read = read_entries(as_entries(past[s], ROOM))
        wanted.append(attention(q[rows], read[0], read[1], options))
    before = keys.clone()

    found = attend(q, k, v, keys, values, batch, options)

    torch.testing.assert_close(found.double(), torch.cat(wanted), rtol=1e-4, atol=1e-5)
    assert torch.equal(keys, before)  # which held this step's already
