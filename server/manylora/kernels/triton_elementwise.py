"""Launches of what stands between the products of a decoder layer: norms, the rotary embedding, the activation."""

from typing import Final

import torch
import triton

from manylora.kernels.programs import elementwise as programs

__all__ = ["add_norm", "silu_and_mul", "turn_and_write"]

_COLUMNS: Final = 1024  # that a program of an activation has
_WIDE_ROW: Final = 4096  # from so many numbers on, a row takes more warps


def add_norm(residual: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add `added` to the residual stream [T, width] in place, and norm it; see `reference.rms_norm`."""
    num_rows, width = residual.shape
    out = torch.empty((num_rows, width), dtype=residual.dtype, device=residual.device)
    programs.add_norm[(num_rows,)](
        out, residual, added, weight, residual.stride(0), width, eps, HAS_ADDED=added is not None,
        BLOCK=triton.next_power_of_2(width), num_warps=8 if width >= _WIDE_ROW else 4,
    )  # fmt: skip
    return out


def turn_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kv_slots: torch.Tensor,
) -> torch.Tensor:
    """Turn queries and keys of `qkv` [T, (heads + 2 kv heads) D], store keys and values; returns q [T, heads, D].

    `cos`, `sin` [T, rotary], contiguous; `kv_slots` int64 [T]; the caches [blocks, kv heads, block size, D].
    """
    num_rows, (num_kv, size, width) = qkv.shape[0], keys.shape[1:]
    heads = qkv.shape[1] // width - 2 * num_kv
    q = torch.empty((num_rows, heads, width), dtype=qkv.dtype, device=qkv.device)
    programs.turn_and_write[num_rows, heads + 2 * num_kv](
        q, qkv, cos, sin, keys, values, kv_slots, qkv.stride(0), keys.stride(0), keys.stride(1), heads, num_kv,
        values.stride(0), values.stride(1), BLOCK=size, D=width, ROTARY=cos.shape[1],
        DP=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
    return q


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * width] -> [T, width]; see `reference.silu_and_mul`."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    programs.silu_and_mul[num_rows, triton.cdiv(width, _COLUMNS)](out, gate_up, width, BLOCK=_COLUMNS, num_warps=4)
    return out
