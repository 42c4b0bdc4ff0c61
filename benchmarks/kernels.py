"""The C++ kernels beside torch's operations and beside what the machine can do at most.

    OMP_WAIT_POLICY=passive python benchmarks/kernels.py [--dtype float32] [--rows 1,8,32,128] [--rank 16]

One JSON line per kernel and number of rows: the median microseconds of the kernel and of torch, taken in turns, their
ratio, and the kernel's arithmetic and memory rate as shares of the two rates measured in the same run (`gemm_gflops`: a
large matmul of torch's in the same dtype; `read_gb_s`: summing a large buffer). Weights are taken in turn from more
copies than the caches hold, as a model's layers are.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch.nn import functional

from manylora.kernels import native
from manylora.kernels.weights import pack_int4, pack_int8, pack_panels
from manylora.lora.memory.device_memory import DTYPE_CODES, TableEntry

SHAPES = ((576, 960), (576, 3072), (1536, 576))  # in, out: a small model's q/k/v, gate/up and down
CACHE_BYTES = 96 * 2**20
Run = Callable[[], object]


def in_turns(*runs: Run, rounds: int = 30) -> list[float]:
    """Median seconds of each, one call of each per round."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, seconds, strict=True):
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def machine(dtype: torch.dtype) -> dict[str, float]:
    x, w = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    buffer = torch.ones(CACHE_BYTES * 2 // 4)
    gemm, read = in_turns(lambda: functional.linear(x, w), buffer.sum, rounds=15)
    return {"gemm_gflops": 2 * 1024**3 / gemm / 1e9, "read_gb_s": buffer.nbytes / read / 1e9}


def copies(make: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    first = make()
    return [first, *(make() for _ in range(min(64, CACHE_BYTES // first.nbytes)))]


def linears(rows: int, dtype: torch.dtype) -> Iterator[dict[str, object]]:
    for size, width in SHAPES:
        x = torch.randn(rows, size).to(dtype)
        weights = copies(lambda size=size, width=width: (torch.randn(width, size) / size**0.5).to(dtype))  # type: ignore[misc]
        plain, panels = cycle(weights), cycle([pack_panels(each) for each in weights])
        rounded = cycle([pack_int8(each) for each in weights])
        nibbles = cycle([pack_int4(each) for each in weights])
        torch_s, panels_s, int8_s, int4_s = in_turns(
            lambda x=x, w=plain: functional.linear(x, next(w)),  # type: ignore[misc]
            lambda x=x, w=panels: native.linear(x, next(w)),  # type: ignore[misc]
            lambda x=x, w=rounded: native.int8_linear(x, next(w)),  # type: ignore[misc]
            lambda x=x, w=nibbles: native.int4_linear(x, next(w)),  # type: ignore[misc]
        )
        flops = 2 * rows * size * width
        for name, taken, weight_bytes in (
            ("linear", panels_s, size * width * dtype.itemsize),
            ("int8_linear", int8_s, size * width),
            ("int4_linear", int4_s, size * width * 5 // 8),
        ):
            yield {"kernel": name, "shape": [size, width], **figures(taken, torch_s, flops, weight_bytes)}


def low_rank(rows: int, dtype: torch.dtype, kept_as: torch.dtype, rank: int, num_adapters: int) -> dict[str, object]:
    """One gate/up pair: every row with the next adapter, against gathering and a batched matmul in `dtype`."""
    size, width = SHAPES[1]
    num_used = min(rows, num_adapters)
    adapter_bytes = rank * (size + width) * kept_as.itemsize
    layers = max(2, CACHE_BYTES // (num_used * adapter_bytes) + 1)
    a = torch.randn(layers, num_used, rank, size).to(dtype)
    b = torch.randn(layers, num_used, rank, width).to(dtype)
    x, out = torch.randn(rows, size).to(dtype), torch.zeros(rows, width, dtype=dtype)
    slots = torch.arange(rows) % num_used
    order = torch.argsort(slots, stable=True).int()
    used, counts = torch.unique_consecutive(slots[order.long()], return_counts=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    offsets = torch.tensor([0, width], dtype=torch.int32)
    scales = torch.full((rank,), 1e-4)
    address = 0 if kept_as == dtype else scales.data_ptr()
    ours_a, ours_b = ((50 * each).to(kept_as) if kept_as == torch.int8 else each.to(kept_as) for each in (a, b))
    code = DTYPE_CODES[kept_as]

    def entry(layer: int, slot: int) -> TableEntry:
        addresses = ours_a[layer, slot].data_ptr(), ours_b[layer, slot].data_ptr()
        return TableEntry(*addresses, rank, address, code, size, width)

    tables = [torch.tensor([[entry(layer, slot) for slot in range(num_used)]]) for layer in range(layers)]
    ours, theirs = cycle(tables), cycle(range(layers))

    def gathered() -> torch.Tensor:
        layer = next(theirs)
        low = torch.bmm(a[layer][slots], x[:, :, None])
        return out + torch.bmm(b[layer][slots].transpose(1, 2), low)[..., 0]

    native_s, torch_s = in_turns(
        lambda: native.add_lora_(out, x, next(ours), offsets, order, used.int(), starts), gathered
    )
    return {
        "kernel": "add_lora_",
        "kept_as": str(kept_as).removeprefix("torch."),
        "adapters": num_used,
        "rank": rank,
        **figures(native_s, torch_s, 2 * rows * rank * (size + width), num_used * adapter_bytes),
    }


def figures(taken: float, torch_s: float, flops: float, weight_bytes: float) -> dict[str, float]:
    return {
        "us": taken * 1e6,
        "torch_us": torch_s * 1e6,
        "torch_over_ours": torch_s / taken,
        "gflops": flops / taken / 1e9,
        "gb_s": weight_bytes / taken / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", default="1,8,32,128")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=32)
    args = parser.parse_args()
    if not native.is_available():
        raise SystemExit("the C++ kernels are not installed")
    dtype = getattr(torch, args.dtype)
    limits = machine(dtype)
    setup = {"cpu_path": native.cpu_path(), "dtype": args.dtype, "threads": torch.get_num_threads(), **limits}
    for rows in (int(r) for r in args.rows.split(",")):
        kinds = dict.fromkeys((dtype, torch.bfloat16, torch.int8))  # what adapters may be kept as
        deltas = (low_rank(rows, dtype, kept_as, args.rank, args.adapters) for kept_as in kinds)
        for record in (*linears(rows, dtype), *deltas):
            shares = {
                "gemm_share": float(str(record["gflops"])) / limits["gemm_gflops"],
                "memory_share": float(str(record["gb_s"])) / limits["read_gb_s"],
            }
            rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in {**setup, **record, **shares}.items()}
            print(json.dumps({"rows": rows, **rounded}), flush=True)


if __name__ == "__main__":
    main()
