"""What is in place before the first request, and that what cannot be does not keep a server from starting."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from manylora.engine.async_engine import AsyncEngine
from manylora.engine.interface import AdapterRef, ModelInfo
from manylora.models.checkpoint import load_tokenizer
from manylora.models.codec import HuggingFaceCodec
from manylora.serving import warm_up as module
from manylora.serving.warm_up import warm_up
from tests.engine.harness import Rig, build_rig, grammars_of, load
from tests.tiny_adapters import make_adapter
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.anyio
NAMES = ("a", "b", "c", "d")
SLOTS = 3


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def rig(tiny_llama_dir: Path, tmp_path: Path) -> Rig:
    adapters = {name: make_adapter(tiny_llama_dir, tmp_path / name, seed=i) for i, name in enumerate(NAMES)}
    return build_rig(load(tiny_llama_dir), adapters, num_blocks=120, num_slots=SLOTS)


@pytest.fixture
async def engine(rig: Rig, tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    codec = HuggingFaceCodec(load_tokenizer(tiny_llama_dir), ())
    model = ModelInfo("tiny", context_length=60, vocab_size=VOCAB_SIZE, created=0)
    engine = AsyncEngine(rig.engine, rig.tiers, model, codec, grammars_of(tiny_llama_dir), max_open=64)
    await engine.start()
    yield engine
    await engine.close()


def tiers(engine: AsyncEngine, rig: Rig) -> list[str]:
    return [engine.tier_of(rig.refs[name]) for name in NAMES]


async def test_as_many_adapters_as_there_are_slots_are_on_the_device_afterwards(engine: AsyncEngine, rig: Rig) -> None:
    await warm_up(engine, [rig.refs[name] for name in NAMES])
    assert tiers(engine, rig)[:SLOTS] == ["device"] * SLOTS
    assert tiers(engine, rig)[SLOTS] != "device"
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert [each["users"] for each in stats.resident] == [0] * SLOTS


async def test_the_base_answers_without_any_adapter(engine: AsyncEngine) -> None:
    before = engine.stats().steps
    await warm_up(engine, [])
    assert engine.stats().steps > before


async def test_an_adapter_that_cannot_be_read_is_left_to_its_own_request(
    engine: AsyncEngine, rig: Rig, tmp_path: Path
) -> None:
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    before = engine.stats().steps
    await warm_up(engine, [rig.refs["a"], rig.refs["b"]])
    assert engine.tier_of(rig.refs["a"]) != "device"
    assert engine.tier_of(rig.refs["b"]) == "device"
    assert engine.stats().steps > before + 1


async def test_adapters_get_no_longer_than_they_are_given(
    engine: AsyncEngine, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ADAPTERS_S", 0.0)
    before = engine.stats().steps
    await warm_up(engine, [AdapterRef("x", "public", "x", 1, "d"), *(rig.refs[name] for name in NAMES)])
    stats = engine.stats()
    assert stats.steps > before, "the base still answers"
    assert (stats.running, stats.waiting) == (0, 0)


async def test_a_base_without_a_chat_template_is_warmed_up_by_plain_text(engine: AsyncEngine) -> None:
    assert isinstance(engine.codec, HuggingFaceCodec)
    engine.codec._tokenizer.chat_template = None
    before = engine.stats().steps
    await warm_up(engine, [])
    assert engine.stats().steps > before
