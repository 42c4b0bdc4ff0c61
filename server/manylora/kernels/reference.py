"""The specification of the kernels, once: obvious arithmetic in float64, which every implementation is tested against.

Every function takes tensors of any float type and returns float64, what an implementation rounds once at its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from manylora.kernels.batch import AttentionOptions
from manylora.kernels.weights import INT4_GROUP, Int4Weight, Int8Weight

__all__ = [
    "Dense",
    "LowRank",
    "MixPart",
    "OutputChange",
    "add_lora",
    "add_mixes",
    "attention",
    "change_output",
    "gelu_tanh_and_mul",
    "int4_linear",
    "int8_linear",
    "linear",
    "rms_norm",
    "rope",
    "silu_and_mul",
    "write_kv",
]


@dataclass(frozen=True, slots=True)
class LowRank:
    """One adapter's weights for one module: `a` [r, in_features], `b` [r, out_features].

    Its scaling is folded into `b`, or lies in `scales` [r], by which the low dimension is multiplied.
    """

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Dense:
    """One adapter's delta for one module as a whole matrix [out_features, in_features], its rows times `scales`."""

    matrix: torch.Tensor
    scales: torch.Tensor | None = None


def add_lora(
    out: torch.Tensor, x: torch.Tensor, weights: Sequence[LowRank | Dense | None], slots: Sequence[int]
) -> torch.Tensor:
    """The base's output plus each row's own delta.

        result[t] = out[t] + (scales[s] * (A[s] x[t])) B[s]    s = slots[t]; nothing is added where it is negative
                                                               or weights[s] is None; of a dense matrix B is the
                                                               identity

    `out` [T, out_features], `x` [T, in_features]. A row depends on its own adapter only, whatever the other rows'
    weights hold. An embedding's delta is that of one-hot rows.
    """
    result = out.double().clone()
    for t, slot in enumerate(slots):
        pair = weights[slot] if slot >= 0 else None
        if pair is not None:
            low = (pair.matrix if isinstance(pair, Dense) else pair.a).double() @ x[t].double()
            if pair.scales is not None:
                low = low * pair.scales.double()
            result[t] = result[t] + (low if isinstance(pair, Dense) else low @ pair.b.double())
    return result


@dataclass(frozen=True, slots=True)
class OutputChange:
    """What one adapter does to one module's output: `scale`, `shift` [out_features], None for 1 and for 0."""

    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None


def change_output(out: torch.Tensor, changes: Sequence[OutputChange | None], slots: Sequence[int]) -> torch.Tensor:
    """Each row's output as its own adapter changes it.

    result[t] = scale[s] * out[t] + shift[s]    s = slots[t]; out[t] where it is negative or changes[s] is None
    """
    result = out.double().clone()
    for t, slot in enumerate(slots):
        change = changes[slot] if slot >= 0 else None
        if change is not None and change.scale is not None:
            result[t] = result[t] * change.scale.double()
        if change is not None and change.shift is not None:
            result[t] = result[t] + change.shift.double()
    return result


@dataclass(frozen=True, slots=True)
class MixPart:
    """What one adapter of a mix does to one module. `input` [in_features]: what it multiplies x by, None for 1."""

    weight: float
    delta: LowRank | Dense | None = None
    change: OutputChange | None = None
    input: torch.Tensor | None = None


def add_mixes(
    out: torch.Tensor, x: torch.Tensor, mixes: Sequence[Sequence[MixPart]], numbers: Sequence[int]
) -> torch.Tensor:
    """The base's output moved by what each adapter of a row's mix would move it by, times its weight.

        result[t] = out[t] + sum over parts p of mixes[numbers[t]] of w_p (y_p[t] - out[t])
        y_p[t] = scale_p (out[t] + delta_p(input_p x[t])) + shift_p

    Nothing is done where `numbers[t]` is negative. A row depends on its own mix only. What is multiplied by an input is
    rounded to x's type, as x is.
    """
    result = out.double().clone()
    for t, number in enumerate(numbers):
        for part in mixes[number] if number >= 0 else ():
            row = x[t : t + 1] if part.input is None else (x[t : t + 1].float() * part.input).to(x.dtype)
            alone = change_output(add_lora(out[t : t + 1], row, [part.delta], [0]), [part.change], [0])
            result[t] += part.weight * (alone[0] - out[t].double())
    return result


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """One sequence's causal attention to its own past.

        result[i, h] = sum_j softmax_j(cap(scale * q[i, h] . k[j, h // group]) + (j - p) slopes[h]) v[j, h // group]
        cap(z) = softcap * tanh(z / softcap), or z where softcap is 0

    q [n, heads, head_dim] are the last n of the positions of k [length, kv_heads, head_dim] and v [length, kv_heads,
    value_dim], and group is heads / kv_heads. The row at position p sees the keys j <= p, with a window only those with
    p - j < window, in chunks only those with j // chunk = p // chunk. sinks[h] is one more score in the softmax, whose
    value is zero.
    """
    length, group = len(k), q.shape[1] // k.shape[1]
    keys, values = (each.double().repeat_interleave(group, dim=1) for each in (k, v))
    rows = []
    for p, query in enumerate(q.double(), length - len(q)):
        first = p // options.chunk * options.chunk if options.chunk else 0
        seen = slice(max(first, p + 1 - options.window) if options.window else first, p + 1)
        scores = options.scale * (query * keys[seen]).sum(dim=2)
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if options.slopes is not None:
            scores = scores + (torch.arange(seen.start, p + 1)[:, None] - p) * options.slopes.double()
        if options.sinks is not None:
            scores = torch.cat((scores, options.sinks.double()[None]))
        weights = scores.softmax(dim=0)[: p + 1 - seen.start]
        rows.append((weights[:, :, None] * values[seen]).sum(dim=0))
    return torch.stack(rows)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: Sequence[int]
) -> None:
    """Store k, v [T, kv_heads, their width] in the caches [blocks, kv_heads, block_size, their width], bit for bit.

    cache[slots[t] // block_size, :, slots[t] % block_size] = k[t]        nothing where slots[t] is negative
    """
    block_size = k_cache.shape[2]
    for t, slot in enumerate(slots):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[t]
            v_cache[slot // block_size, :, slot % block_size] = v[t]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
    """(weight_offset + weight) * x / sqrt(mean(x^2) + eps), for x [T, hidden] and weight [hidden]."""
    wide = x.double()
    return (weight_offset + weight.double()) * wide / (wide.square().mean(dim=1, keepdim=True) + eps).sqrt()


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, silu(z) = z / (1 + e^-z), for gate_up [T, 2 * width], whose first half is gate."""
    gate, up = gate_up.double().chunk(2, dim=1)
    return gate / (1 + (-gate).exp()) * up


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, gelu(z) = z / 2 * (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))), halves as for `silu_and_mul`."""
    gate, up = gate_up.double().chunk(2, dim=1)
    return gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, head_dim] turned by its positions, in Hugging Face's half-split convention.

    For cos, sin [T, rotary_dim], h = rotary_dim / 2 and d < h:
        y[d] = x[d] cos[d] - x[d + h] sin[d]          y[d + h] = x[d + h] cos[d + h] + x[d] sin[d + h]
    and y[d] = x[d] from rotary_dim on.
    """
    half = cos.shape[1] // 2
    result, wide = x.double().clone(), x.double()
    for d in range(half):
        for at, other, sign in ((d, d + half, -1), (d + half, d, 1)):
            result[..., at] = wide[..., at] * cos[:, None, at] + sign * wide[..., other] * sin[:, None, at]
    return result


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in_features] W^T + bias, for weight [out_features, in_features] and bias [out_features]."""
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def int8_linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in_features], rounded to 8 bits by row and group of inputs, times a weight in 8 bits, plus bias.

        result[t, n] = scales[n] * sum over groups g of s[t, g] * sum over k in g of q[t, k] * integers[n, k]
        s[t, g] = max over k in g of |x[t, k]| / 127          q[t, k] = x[t, k] / s[t, g], rounded to an integer

    A row with a NaN or an infinity is NaN throughout.
    """
    result = torch.zeros(len(x), weight.out_features, dtype=torch.float64)
    for columns, integers in zip(
        torch.split(x.double(), weight.group_size, dim=1),
        torch.split(weight.integers().double(), weight.group_size, dim=1),
        strict=True,
    ):
        steps = columns.abs().amax(dim=1, keepdim=True) / 127
        rounded = torch.where(steps > 0, (columns / steps).round(), 0.0)
        result += steps * (rounded @ integers.T)
    result *= weight.scales.double()
    result[~x.isfinite().all(dim=1)] = float("nan")
    return result if bias is None else result + bias.double()


def int4_linear(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in_features], rounded to 8 bits by row and block of 32 inputs, times a weight in 4 bits, plus bias.

        result[t, n] = sum over blocks b of s[t, b] * sum over k in b of q[t, k] * W[n, k]
        s[t, b] = max over k in b of |x[t, k]| / 127          q[t, k] = x[t, k] / s[t, b], rounded to an integer

    W is `weight.dequantised()`. A row with a NaN or an infinity is NaN throughout.
    """
    result = torch.zeros(len(x), weight.out_features, dtype=torch.float64)
    weights = torch.split(weight.dequantised().double(), INT4_GROUP, dim=1)
    for columns, part in zip(torch.split(x.double(), INT4_GROUP, dim=1), weights, strict=True):
        steps = columns.abs().amax(dim=1, keepdim=True) / 127
        rounded = torch.where(steps > 0, (columns / steps).round(), 0.0)
        result += steps * (rounded @ part.T)
    result[~x.isfinite().all(dim=1)] = float("nan")
    return result if bias is None else result + bias.double()
