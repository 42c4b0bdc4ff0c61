"""What the compiler makes of a layer's programs beside the low-rank ones, for devices that are not here."""

import pytest
import torch

from manylora.kernels.batch import AttentionOptions, Batch
from manylora.kernels.triton_attention import TritonAttention
from manylora.kernels.triton_elementwise import add_norm, silu_and_mul, turn_and_write
from tests.gpu.launches import Launch, compiled, noted
from tests.gpu.test_generated_code import CAPABILITIES, META, check


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def layer_launches(heads: int, num_kv: int, width: int, options: AttentionOptions) -> list[Launch]:
    """Of a step with one sequence of one query and one of many, as layers of their own and the model's launch them."""
    lens = (3000, 40)
    batch = Batch(
        token_ids=empty(41, dtype=torch.int64), positions=empty(41, dtype=torch.int64),
        kv_slots=empty(41, dtype=torch.int64), block_tables=empty(2, 188, dtype=torch.int32),
        query_starts=empty(3, dtype=torch.int32), context_lens=empty(2, dtype=torch.int32), num_decode=1,
        starts=(0, 1, 41), lens=lens, logit_rows=empty(2, dtype=torch.int64),
    )  # fmt: skip
    keys = values = empty(256, num_kv, 16, width)
    stream, q, k = empty(41, 4096), empty(41, heads, width), empty(41, num_kv, width)
    with noted() as found:
        add_norm(stream, stream, empty(4096), 1e-5)
        turned = turn_and_write(
            empty(41, (heads + 2 * num_kv) * width), empty(41, width), empty(41, width), keys, values, batch.kv_slots
        )
        TritonAttention().attend(turned, keys, values, batch, options)
        TritonAttention()(q, k, k, keys, values, batch, options)
        silu_and_mul(empty(41, 28672))
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("heads", "num_kv", "width", "options"),
    [
        (32, 8, 128, AttentionOptions(0.1, 0, 0.0)),
        (9, 3, 64, AttentionOptions(0.1, 512, 0.0)),
        (8, 4, 256, AttentionOptions(0.1, 512, 30.0, sinks=torch.zeros(8), slopes=torch.zeros(8))),
    ],
    ids=["plain", "window", "wide"],
)
def test_attention_uses_the_device(
    capability: int, heads: int, num_kv: int, width: int, options: AttentionOptions
) -> None:
    launches = layer_launches(heads, num_kv, width, options)
    attending = [launch for launch in launches if launch.name == "attend"][:2]
    assert [launch.constants["BQ"] for launch in attending] == [1, 64 // attending[0].constants["GP"]]
    for launch in attending:
        check(compiled(launch, capability), capability)


def test_what_has_no_products_compiles() -> None:
    launches = layer_launches(32, 8, 128, AttentionOptions(0.1, 0, 0.0))
    names = ["add_norm", "turn_and_write", "attend", "combine", "attend", "write_kv", "attend", "combine", "attend",
             "silu_and_mul"]  # fmt: skip
    assert [launch.name for launch in launches] == names
    for number in (0, 1, 3, 5, 9):
        check(compiled(launches[number], 90), 90, has_products=False)
