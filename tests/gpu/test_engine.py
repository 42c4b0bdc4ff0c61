"""Whole models on the Triton backend, in the interpreter, against transformers and PEFT."""

from pathlib import Path

import pytest
import torch

from manylora.kernels.weights import FORMATS
from manylora.models.backends import triton
from manylora.models.fused import FusedDecoderLayer
from tests.conftest import ModelMaker
from tests.engine.harness import build_rig, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.resized import make_resized, with_resized
from tests.tiny_adapters import make_adapter

pytestmark = pytest.mark.interpreted
BACKEND = triton(torch.device("cpu"), FORMATS["none"])
PROMPT = [3, 14, 15, 92, 65]
OWN = [3, 14, 322, 92, 320]  # two of them the adapter's own


@pytest.mark.parametrize("architecture", ["llama"])
def test_adapters_and_the_base_in_one_batch(architecture: str, tiny_model_dir: ModelMaker, tmp_path: Path) -> None:
    base = tiny_model_dir(architecture)
    adapters = {f"rank{rank}": make_adapter(base, tmp_path / str(rank), rank=rank, seed=rank) for rank in (2, 9)}
    own = make_resized(base, tmp_path / "own", 325, trainable_token_indices=[14, 320])
    rig = build_rig(load(base), {**adapters, "own": own}, kernel=BACKEND)
    assert any(isinstance(module, FusedDecoderLayer) for module in rig.wrapped.model.modules())
    requests = {"base": None, **{name: name for name in adapters}}
    for request, used in requests.items():
        rig.add(request, PROMPT, used, max_tokens=3)
    rig.add("own", OWN, "own", max_tokens=3)
    rig.run()
    rig.close()
    for request, used in requests.items():
        check_greedy(with_adapter(base, adapters[used] if used else None), PROMPT, rig.tokens(request))
    check_greedy(with_resized(base, own, 325), OWN, rig.tokens("own"))
