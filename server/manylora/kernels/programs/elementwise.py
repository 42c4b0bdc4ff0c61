"""What stands between the products of a decoder layer: norms, the rotary embedding, the activation."""

import triton
import triton.language as tl


@triton.jit
def add_norm(
    out, residual, added, weight, stride, width, eps, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """residual += added, and out = weight * residual / rms(residual); grid (T,). See `reference.rms_norm`.

    `residual`, `added`, `out` [T, width]; the residual is rounded to its type before it is normed.
    """
    t = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    x = tl.load(residual + t * stride + n, n < width, other=0.0)
    if HAS_ADDED:
        more = tl.load(added + t * width + n, n < width, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
        tl.store(residual + t * stride + n, x, n < width)
    wide = x.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    factor = tl.load(weight + n, n < width, other=0.0).to(tl.float32)
    tl.store(out + t * width + n, (wide * scale * factor).to(x.dtype), n < width)


@triton.jit
def turn_and_write(
    q, qkv, cos, sin, keys, values, slots, stride_qkv, stride_block, stride_head, heads, kv_heads,
    stride_value_block, stride_value_head,
    BLOCK: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Queries turned to `q` [T, heads, D], keys turned and values to the cache; grid (T, heads + 2 kv heads).

    `qkv` [T, (heads + 2 kv heads) D]; `cos`, `sin` [T, ROTARY]; see `reference.rope`. A head's numbers from ROTARY on
    stay as they are. Nothing is written for a negative slot.
    """
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)
    given = qkv + t * stride_qkv + head * D
    x = tl.load(given + d, d < D, other=0.0)
    if head < heads + kv_heads:
        half: tl.constexpr = ROTARY // 2
        other = tl.load(given + tl.where(d < half, d + half, d - half), d < ROTARY, other=0.0).to(tl.float32)
        c = tl.load(cos + t * ROTARY + d, d < ROTARY, other=1.0).to(tl.float32)
        s = tl.load(sin + t * ROTARY + d, d < ROTARY, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * c + tl.where(d < half, -other, other) * s).to(x.dtype)
    if head < heads:
        tl.store(q + (t * heads + head) * D + d, x, d < D)
    else:
        slot = tl.load(slots + t)
        block, at = slot // BLOCK, slot % BLOCK
        if (slot >= 0) & (head < heads + kv_heads):
            tl.store(keys + block * stride_block + (head - heads) * stride_head + at * D + d, x, d < D)
        elif slot >= 0:
            kv = head - heads - kv_heads
            tl.store(values + block * stride_value_block + kv * stride_value_head + at * D + d, x, d < D)


@triton.jit
def silu_and_mul(out, gate_up, width, BLOCK: tl.constexpr):
    """out [T, width] = silu(gate) * up, of gate_up [T, 2 * width]; grid (T, blocks). See `reference.silu_and_mul`."""
    t, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + t * 2 * width + n, n < width, other=0.0)
    up = tl.load(gate_up + t * 2 * width + width + n, n < width, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    tl.store(out + t * width + n, (wide * tl.sigmoid(wide) * up).to(gate.dtype), n < width)
