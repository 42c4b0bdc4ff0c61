"""The C++ kernels: the one place that loads them, says whether they are there, and what they take.

What each computes is the function of its name in `kernels/reference.py`.

`manylora._C` is compiled when the package is installed (`setup.py`); where there was no compiler it is missing, which
is logged once, and callers use their torch versions. Every operator takes float32, bfloat16 or float16 on the CPU, any
sizes, accumulates in float32, and wants tensors contiguous in their last dimension; the other strides are free. The
kernels exist once per instruction set (`CPU_PATHS`), and the best one for the machine is chosen when they are loaded.
"""

import functools
import importlib
import logging
from collections.abc import Sequence

import torch

from manylora.kernels.weights import Int4Weight, Int8Weight, PanelWeight

CPU_PATHS = ("avx512_bf16", "avx512", "avx2_vnni", "avx2", "portable")

_log = logging.getLogger(__name__)


@functools.cache
def is_available() -> bool:
    """Whether the C++ kernels are installed. The first call loads them, and logs a line where it cannot."""
    try:
        importlib.import_module("manylora._C")  # registers torch.ops.manylora
    except ImportError as error:
        _log.warning(
            "C++ kernels are not installed (%s): using the slower torch kernels. "
            "Install a C++17 compiler and reinstall manylora to have them built.",
            error,
        )
        return False
    _log.info("C++ kernels loaded, CPU path %s", cpu_path())
    return True


def cpu_path() -> str:
    """The instruction set in use, one of `CPU_PATHS`."""
    return str(torch.ops.manylora.cpu_path())


def available_cpu_paths() -> tuple[str, ...]:
    """The members of `CPU_PATHS` that this machine can run, best first; none without the kernels."""
    return tuple(path for path in CPU_PATHS if torch.ops.manylora.has_cpu_path(path)) if is_available() else ()


def set_cpu_path(path: str) -> None:
    """Use another path for the whole process, for tests and comparisons; "auto" is the best one.

    Raises ValueError for a path that this machine cannot run.
    """
    torch.ops.manylora.set_cpu_path(path)


def lora_entry_fields() -> tuple[str, ...]:
    """What an entry of the low-rank tables consists of, as the kernels read it."""
    return tuple(torch.ops.manylora.lora_entry_fields())


def output_entry_fields() -> tuple[str, ...]:
    """What an entry of the tables of outputs consists of, as the kernels read it."""
    return tuple(torch.ops.manylora.output_entry_fields())


def place_threads(cpus: Sequence[int], *, apart: bool) -> None:
    """Let each thread of the calling thread's parallel regions run on its own of `cpus`, or again on all of them.

    As many `cpus` as torch has threads; the calling thread gets the first. What the system refuses is left as it was.
    Does nothing on systems other than Linux.
    """
    torch.ops.manylora.place_threads(cpus, apart)


def thread_times(cpus: Sequence[int]) -> tuple[int, int] | None:
    """How long these threads have run, and how long they have waited for a CPU, in nanoseconds, summed.

    None unless each is on its own of `cpus`, and where the system has no `schedstat`.
    """
    run_ns, wait_ns = torch.ops.manylora.thread_times(cpus)
    return (run_ns, wait_ns) if run_ns >= 0 else None


def add_lora_(
    out: torch.Tensor,
    x: torch.Tensor,
    tables: torch.Tensor,
    out_offsets: torch.Tensor,
    order: torch.Tensor,
    segment_slots: torch.Tensor,
    segment_starts: torch.Tensor,
) -> None:
    """`reference.add_lora` in place, for one linear or for several that share their input.

    Member m of these writes to the columns offsets[m]:offsets[m + 1]; segment i's rows, order[starts[i]:starts[i + 1]],
    have the adapter in segment_slots[i].

    out [T, columns] and x [T, in_features] of one dtype. tables int64 [members, slots, TABLE_FIELDS]: for each member
    and slot a `device_memory.TableEntry`: addresses of A [r, in_features], of B [r, offsets[m + 1] - offsets[m]], both
    contiguous, and of float32 scales [r] by which x @ A.T is multiplied (0: of none). r = 0 where the slot's
    adapter does not touch the member. Where B's address is 0, B is the identity, and r the member's width. That memory
    is at the addresses is trusted; that it is for x and out of these sizes is not. out_offsets int32 [members + 1];
    order int32 [R]: the rows that have an adapter, sorted by slot; segment_slots int32 [S]; segment_starts int32
    [S + 1] into order.

    The delta is made in float32 and rounded once, in the sum with out. A row depends on its own adapter only, and its
    result does not depend on which other rows are in the batch.
    """
    torch.ops.manylora.add_lora_(out, x, tables, out_offsets, order, segment_slots, segment_starts)


def change_output_(
    out: torch.Tensor,
    outputs: torch.Tensor,
    out_offsets: torch.Tensor,
    order: torch.Tensor,
    segment_slots: torch.Tensor,
    segment_starts: torch.Tensor,
) -> None:
    """`reference.change_output` in place, for the members and segments of `add_lora_`.

    outputs int64 [members, slots, OUTPUT_FIELDS]: for each member and slot a `device_memory.OutputEntry`: addresses of
    float32 scale and shift [offsets[m + 1] - offsets[m]], 0 for none; a width of 0 where the slot's adapter changes
    nothing.
    """
    torch.ops.manylora.change_output_(out, outputs, out_offsets, order, segment_slots, segment_starts)


def add_mixes_(
    out: torch.Tensor,
    x: torch.Tensor | None,
    tables: torch.Tensor | None,
    inputs: torch.Tensor | None,
    changes: torch.Tensor,
    out_offsets: torch.Tensor,
    order: torch.Tensor,
    row_starts: torch.Tensor,
    part_starts: torch.Tensor,
    part_slots: torch.Tensor,
    part_weights: torch.Tensor,
) -> None:
    """`reference.add_mixes` in place, for the members of `add_lora_` and rows that have several adapters.

    Mix i's rows are order[row_starts[i]:row_starts[i + 1]] (no row twice), its adapters those in the slots
    part_slots[part_starts[i]:part_starts[i + 1]], each times the float32 at its place in part_weights; the others are
    int32. `tables` as for `add_lora_`, `inputs` and `changes` int64 [members, slots, OUTPUT_FIELDS] as the outputs of
    `change_output_`. Without x, tables and inputs only `changes` are made.

    The sum is made in float32 and rounded once. A row's result does not depend on which other rows are in the batch.
    """
    torch.ops.manylora.add_mixes_(
        out, x, tables, inputs, changes, out_offsets, order, row_starts, part_starts, part_slots, part_weights
    )


def paged_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> None:
    """`reference.attention` of a ragged batch to its own past in the paged cache.

    out [T, heads, value_dim], q [T, heads, head_dim]; k_cache [blocks, kv_heads, block_size, head_dim], v_cache
    [blocks, kv_heads, block_size, value_dim] with heads a multiple of kv_heads. Sequence s owns the rows
    query_starts[s]:query_starts[s + 1] (int32 [S + 1]), the last of which is its position context_lens[s] - 1 (int32
    [S]; this step's keys are written before). Key j lies in block block_tables[s, j // block_size] (int32 [S,
    max_blocks]); what lies behind context_lens is not read. A window, a soft cap or a chunk of 0 is none. sinks, slopes
    float32 [heads]. Caches of int8 are rounded ones, with entries of `kv_entries`.
    """
    torch.ops.manylora.paged_attention(
        out, q, k_cache, v_cache, block_tables, query_starts, context_lens, scale, sliding_window, softcap,
        chunk, sinks, slopes,
    )  # fmt: skip


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """`reference.write_kv`.

    k [T, kv_heads, head_dim], v [T, kv_heads, value_dim]; the caches [blocks, kv_heads, block_size, …] of the same
    width and dtype, or rounded ones; slots int64 [T], negative to leave a row out.
    """
    torch.ops.manylora.write_kv(k, v, k_cache, v_cache, slots)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
    """`reference.rms_norm`, x [T, hidden] and weight [hidden] -> [T, hidden], rounded as Hugging Face does.

    With weight_offset 0 (Llama) what weight is multiplied by is rounded, with another (1 for Gemma) it is not.
    """
    out: torch.Tensor = torch.ops.manylora.rms_norm(x, weight, eps, weight_offset)
    return out


def add_rms_norm_(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0
) -> torch.Tensor:
    """residual [T, hidden] += x, in place and rounded; returns rms_norm(residual, weight, eps, weight_offset)."""
    out: torch.Tensor = torch.ops.manylora.add_rms_norm_(residual, x, weight, eps, weight_offset)
    return out


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`reference.silu_and_mul`, gate_up [T, 2 * width] -> [T, width], rounded once."""
    out: torch.Tensor = torch.ops.manylora.silu_and_mul(gate_up)
    return out


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`reference.gelu_tanh_and_mul`, gate_up [T, 2 * width] -> [T, width], rounded once."""
    out: torch.Tensor = torch.ops.manylora.gelu_tanh_and_mul(gate_up)
    return out


def rope_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Turn q and k (`reference.rope`, rounded once), store k and v in the cache, return the turned q.

    q [T, heads, head_dim]; k, v [T, kv_heads, head_dim], as slices of one fused row if you like; cos, sin float32
    [T, rotary_dim], rotary_dim even and at most head_dim; caches and slots as for `write_kv`. Returns a new, contiguous
    [T, heads, head_dim].
    """
    out: torch.Tensor = torch.ops.manylora.rope_write_kv(q, k, v, cos, sin, k_cache, v_cache, slots)
    return out


def linear(x: torch.Tensor, weight: PanelWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`reference.linear`, x [T, in_features], bias float32 [out_features] -> [T, out_features]; x and W of one dtype.

    Accumulated in float32, rounded once. A row's result does not depend on the rows beside it.
    """
    out: torch.Tensor = torch.ops.manylora.linear(x, weight.packed, weight.out_features, bias)
    return out


def int8_linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`reference.int8_linear`, x [T, in_features], bias float32 [out_features] -> [T, out_features] of x's dtype.

    Sums within a group of inputs are exact, those of groups are made in float32.
    """
    out: torch.Tensor = torch.ops.manylora.int8_linear(
        x, weight.packed, weight.scales, weight.group_sums, bias, weight.group_size
    )
    return out


def int4_linear(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`reference.int4_linear`, x [T, in_features], bias float32 [out_features] -> [T, out_features] of x's dtype.

    Sums within a block of 32 inputs are exact, those of blocks are made in float32. A row's result does not depend on
    the rows beside it.
    """
    out: torch.Tensor = torch.ops.manylora.int4_linear(
        x, weight.packed, weight.scales, weight.out_features, bias, weight.group_size
    )
    return out
