"""What a decode step launches, and that it reads nothing back: counted on a CPU, with nothing computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from manylora.engine.executor import LocalExecutor
from manylora.engine.step_input import StepInput
from manylora.kernels.batch import Batch
from manylora.kernels.weights import FORMATS
from manylora.lora.format.reader import read_trusted
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.packing import KeepAs
from manylora.lora.memory.slots import SlotBook
from manylora.models import fused
from manylora.models.backends import triton
from manylora.models.kv_cache import KVCache
from manylora.models.wrapping import WrappedModel, wrap
from tests.conftest import ModelMaker
from tests.engine.harness import load, packer_of
from tests.gpu.launches import noted
from tests.tiny_adapters import make_adapter

CPU = torch.device("cpu")
NO_LAUNCH = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.lift_fresh", "aten.alias")


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Torch's operations that a device would be given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not str(func).startswith(NO_LAUNCH):
            self.names.append(str(func))
        return func(*args, **kwargs or {})


class Rig:
    """A model on the Triton backend, with adapters in slots, whose layers are exchanged without being proved."""

    def __init__(self, base: Path, folder: Path, ranks: list[int]) -> None:
        backend = triton(CPU, FORMATS["none"])
        model = load(base)
        self.wrapped: WrappedModel = wrap(model, backend)
        self.cache = KVCache(self.wrapped.survey.kv_shapes, 16, 4, model.dtype, CPU)
        self.wrapped.attach_cache(self.cache)
        self.layers = fused.candidates(self.wrapped, self.cache)
        fused.exchange(self.wrapped, self.layers)
        self.memory = DeviceMemory(len(self.wrapped.modules), 8, CPU)
        book, pack = SlotBook(8, 2**26), packer_of(self.wrapped, KeepAs(model.dtype, model.dtype))
        for number, rank in enumerate(ranks):
            made = make_adapter(base, folder / f"{base.name}-{number}", rank=rank)
            packed = pack(read_trusted(made, self.wrapped.modules))
            place = book.reserve(packed.layout)
            assert place is not None
            self.memory.allocate(place, packed.layout, 1)
            self.memory.fill(place, packed)
            self.memory.publish(place, packed)
        self.slots = sorted(self.memory.places)
        self.executor = LocalExecutor(self.wrapped, self.cache, self.memory, backend.lora)

    def decode(self, slots: list[int]) -> Batch:
        """Of sequences of five tokens."""
        n = len(slots)
        return self.executor._batch(
            StepInput(
                token_ids=np.full(n, 5), positions=np.full(n, 4), kv_slots=np.arange(n) * 8 + 4,
                block_tables=np.arange(2 * n, dtype=np.int32).reshape(n, 2),
                query_starts=np.arange(n + 1, dtype=np.int32), context_lens=np.full(n, 5, dtype=np.int32),
                slots=np.array(slots, dtype=np.int32), logit_rows=np.arange(n), hidden_rows=np.zeros(0, dtype=np.int64),
            )
        )  # fmt: skip

    def forward(self, batch: Batch) -> torch.Tensor:
        self.wrapped.context.batch = batch
        try:
            logits: torch.Tensor = self.wrapped.model(
                input_ids=batch.token_ids[None], position_ids=batch.positions[None], use_cache=False,
                logits_to_keep=batch.logit_rows,
            ).logits  # fmt: skip
        finally:
            self.wrapped.context.batch = None
        return logits

    def launches(self, slots: list[int]) -> list[str]:
        batch = self.decode(slots)
        with torch.inference_mode(), noted() as programs, Operations() as operations:
            self.forward(batch)
        return [*(launch.name for launch in programs), *operations.names]


def test_a_layer_is_ten_launches_and_eighteen_with_any_adapters(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rig = Rig(tiny_llama_dir, tmp_path, [4, 16, 3, 64])
    layers = rig.wrapped.model.model.layers
    assert len(layers) == len(rig.layers) > 1

    def per_layer(slots: list[int]) -> int:
        whole = len(rig.launches(slots))
        rig.wrapped.model.model.layers = layers[:-1]
        rest = len(rig.launches(slots))
        rig.wrapped.model.model.layers = layers
        return whole - rest

    assert per_layer([-1, -1, -1]) <= 10
    with_one = per_layer([rig.slots[0]] * 3)
    assert with_one <= 18
    assert per_layer([*rig.slots, -1, rig.slots[1]]) == with_one


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_a_decode_step_reads_nothing_back(architecture: str, tiny_model_dir: ModelMaker, tmp_path: Path) -> None:
    rig = Rig(tiny_model_dir(architecture), tmp_path, [4, 7])
    batch = rig.decode([rig.slots[0], -1, rig.slots[1]])
    with torch.inference_mode(), noted() as programs, FakeTensorMode(allow_non_fake_inputs=True):
        rig.forward(batch)
    assert {"shrink", "expand", "attend", "combine"} <= {launch.name for launch in programs}


def test_no_program_is_compiled_for_a_number_of_rows(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """What an adapter's first requests may wait for is compiled once, however many rows there are."""
    rig = Rig(tiny_llama_dir, tmp_path, [4])

    def variants(num_rows: int) -> set[object]:
        batch = rig.decode([rig.slots[0]] * num_rows)
        with torch.inference_mode(), noted() as programs:
            rig.forward(batch)
        return {
            (each.name, tuple(each.types.items()), tuple(each.constants.items()), each.aligned) for each in programs
        }

    assert variants(1) == variants(3) == variants(16)
