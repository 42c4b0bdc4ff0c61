"""How far positions reach, and that a neighbour's length changes nobody's answer."""

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from transformers import AutoConfig, BloomConfig, GPT2Config, LlamaConfig, MptConfig

from manylora.engine.build import EngineBuilder
from manylora.errors import InvalidSettings
from manylora.models.loading import load_base
from manylora.models.positions import UNSTATED_LIMIT, position_limit
from manylora.settings import Settings
from tests.engine.harness import build_rig, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.models.front_door import settings_for
from tests.models.zoo import make_zoo_model
from tests.tiny_models import make_tiny_model

ORIGINAL = 40
LONG_ROPE: dict[str, Any] = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": ORIGINAL,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [3.0 + i for i in range(8)],
        "original_max_position_embeddings": ORIGINAL,
        "factor": 12.8,
    },
}


@pytest.fixture(scope="module")
def long_phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("phi3", tmp_path_factory.mktemp("phi3"), **LONG_ROPE)


def test_the_limit_is_the_configs_own() -> None:
    assert position_limit(LlamaConfig(max_position_embeddings=300)) == 300
    assert position_limit(GPT2Config(n_positions=77)) == 77
    assert position_limit(MptConfig(max_seq_len=8192)) == 8192
    assert position_limit(BloomConfig(seq_length=4096)) == 4096
    assert position_limit(BloomConfig()) == 0


def test_a_limit_that_is_assumed_is_told(tmp_path: Path) -> None:
    folder = make_zoo_model("mamba2", tmp_path / "base")

    def told(**values: Any) -> list[Any]:
        settings = settings_for(folder, **values)
        with capture_logs() as logs:
            EngineBuilder(settings, load_base(settings))
        return [each["tokens"] for each in logs if each["event"] == "context_length_assumed"]

    assert told() == [UNSTATED_LIMIT]
    assert told(max_model_len=UNSTATED_LIMIT) == []


def test_long_rope_reaches_as_far_as_one_set_of_frequencies(long_phi3: Path) -> None:
    assert position_limit(AutoConfig.from_pretrained(long_phi3)) == ORIGINAL


def test_a_longer_sequence_than_that_is_refused_at_start(long_phi3: Path) -> None:
    def context_length(wanted: int | None) -> int:
        settings = Settings(model=str(long_phi3), device="cpu", dtype="float32", max_model_len=wanted)
        return EngineBuilder(settings, load_base(settings)).context_length

    assert (context_length(None), context_length(24)) == (ORIGINAL, 24)
    with pytest.raises(InvalidSettings, match=f"{ORIGINAL + 1} is more than the {ORIGINAL} positions"):
        context_length(ORIGINAL + 1)


def test_within_it_neighbours_of_any_length_get_the_tokens_of_generate(long_phi3: Path) -> None:
    asked = [list(range(5, 5 + length)) for length in (3, 28, 10)]
    rig = build_rig(load(long_phi3), num_blocks=64)
    for number, prompt in enumerate(asked):
        rig.add(f"r{number}", prompt, max_tokens=ORIGINAL - 28)
    rig.run()
    for number, prompt in enumerate(asked):
        check_greedy(with_adapter(long_phi3, None), prompt, rig.tokens(f"r{number}"))
