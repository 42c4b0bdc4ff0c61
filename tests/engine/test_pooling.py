"""Prompts that become vectors: the model's own hidden states, in the steps of everybody's requests."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.engine.interface import FinishReason, Pooling, SamplingParams, Task
from manylora.engine.pooling import Pool
from manylora.errors import AdapterNotFinite
from tests.engine.faults import Faults
from tests.engine.harness import Rig, available_kernels, build_rig, load
from tests.engine.oracle import with_adapter
from tests.tiny_adapters import make_adapter, make_adapter_that_spoils
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.usefixtures("quick_collections")  # one for each step that has no memory

PROMPTS = [list(range(20, 20 + n)) for n in (1, 3, 30, 7, 19)]
EXACT = [kernel for kernel in available_kernels if kernel != "torch"]
HOW: tuple[Pooling, ...] = ("last", "mean")


@pytest.fixture(scope="module")
def adapters(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {name: make_adapter(tiny_llama_dir, root / name, seed=i) for i, name in enumerate(("tuned", "other"))}
    return made | {"spoilt": make_adapter_that_spoils(tiny_llama_dir, root / "spoilt", 49)}


@functools.cache  # for all kernels: to load a model takes longer than to serve it
@torch.inference_mode()
def states_of(folder: Path, adapter: Path | None, prompt: tuple[int, ...]) -> torch.Tensor:
    model = with_adapter(folder, adapter)
    found: torch.Tensor = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    return found


@torch.inference_mode()
def hidden_of(folder: Path, adapter: Path | None, prompt: list[int], how: Pooling) -> npt.NDArray[np.float32]:
    states = states_of(folder, adapter, tuple(prompt))
    vector: npt.NDArray[np.float32] = (states[-1] if how == "last" else states.mean(0)).numpy()
    return vector


def vector_of(rig: Rig, name: str) -> npt.NDArray[np.float32]:
    [output] = rig.outputs[f"{name}/0"]
    assert output.error is None, output.error
    assert output.delta.finish_reason is FinishReason.STOP
    assert output.delta.token_ids == ()
    assert output.delta.pooled is not None
    return output.delta.pooled


def pool(rig: Rig, name: str, prompt: list[int], adapter: str | None, how: Pooling) -> None:
    rig.add(name, prompt, adapter, max_tokens=0, pooling=how)


# against transformers and PEFT


@pytest.mark.parametrize("kernel", available_kernels)
def test_vectors_are_the_hidden_states_of_transformers_and_peft(
    kernel: str, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    """All together, in pieces of 8 tokens, beside answers that go on."""
    rig = build_rig(load(tiny_llama_dir), adapters, kernel=kernel, num_blocks=200, max_num_batched_tokens=8)
    for name in (None, "tuned"):
        rig.add(f"text-{name}", PROMPTS[3], name, max_tokens=30)
    wanted = [
        (f"{how}-{name}-{number}", prompt, name, how)
        for how in HOW
        for name in (None, "tuned", "other")
        for number, prompt in enumerate(PROMPTS)
    ]
    for each in wanted:
        pool(rig, *each)
    rig.run()
    for key, prompt, name, how in wanted:
        expected = hidden_of(tiny_llama_dir, adapters[name] if name else None, prompt, how)
        np.testing.assert_allclose(vector_of(rig, key), expected, atol=1e-5, rtol=1e-5, err_msg=key)
    rig.close()


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("how", HOW)
def test_every_architecture_gives_what_goes_into_its_head(architecture: str, how: Pooling, tmp_path: Path) -> None:
    folder = make_tiny_model(architecture, tmp_path)
    rig = build_rig(load(folder), kernel=available_kernels[-1], max_num_batched_tokens=8)
    pool(rig, "r", PROMPTS[2], None, how)
    rig.run()
    np.testing.assert_allclose(vector_of(rig, "r"), hidden_of(folder, None, PROMPTS[2], how), atol=1e-5, rtol=1e-5)
    assert rig.wrapped.hidden_size == len(vector_of(rig, "r"))
    rig.close()


# beside others, to the last bit


def ask_all(rig: Rig, alone: bool) -> None:
    for number, name in enumerate((None, "tuned", "other")):
        rig.add(f"text-{number}", [number + 9, *PROMPTS[4]], name, max_tokens=40, temperature=1.0, seed=number)
        if alone:
            rig.run()
    for how in HOW:
        for number, prompt in enumerate(PROMPTS):
            for name in (None, "tuned"):
                pool(rig, f"{how}-{number}-{name}", prompt, name, how)
                if alone:
                    rig.run()
    rig.run()


def told(rig: Rig) -> dict[str, Any]:
    return {
        key: (
            [token for o in outputs for token in o.delta.token_ids],
            None if (vector := outputs[-1].delta.pooled) is None else vector.tobytes(),
        )
        for key, outputs in rig.outputs.items()
    }


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("faults", [False, True])
def test_vectors_and_answers_are_those_that_each_gets_alone(
    kernel: str, faults: bool, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    """However prompts are cut into pieces, who is preempted, and which steps are run again."""
    alone = build_rig(load(tiny_llama_dir), adapters, kernel=kernel, num_blocks=200, prefix_cache=False)
    ask_all(alone, alone=True)
    together = build_rig(load(tiny_llama_dir), adapters, kernel=kernel, num_blocks=34, max_num_batched_tokens=11)
    together.bring_in()
    put_in = Faults(together).install()
    if faults:
        put_in.after("forward", 2, 5, 9)
        put_in.after("sample", 4, 11)
        put_in.error = MemoryError  # then a prompt is run in pieces
    ask_all(together, alone=False)
    assert together.scheduler.num_preemptions
    assert {result for _, result in put_in.counted} == ({"retried"} if faults else set())
    assert told(together) == told(alone)
    for rig in (alone, together):
        rig.close()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_mean_is_the_same_to_the_last_bit_whatever_pieces_its_rows_come_in(sizes: list[int], random: Any) -> None:
    draw = np.random.default_rng(random.randrange(2**32))
    rows = draw.normal(size=(sum(sizes), 5)).astype(np.float32) * np.float32(1e3)
    whole, pieces = Pool("mean"), Pool("mean")
    whole.add([rows])
    for piece in np.split(rows, np.cumsum(sizes)[:-1]):
        pieces.add([piece])
    assert whole.vector.tobytes() == pieces.vector.tobytes()
    np.testing.assert_allclose(whole.vector, rows.astype(np.float64).mean(0), rtol=1e-6, atol=1e-4)


# the cache


def test_the_last_token_takes_what_the_cache_knows_and_a_mean_runs_all(
    tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    rig = build_rig(load(tiny_llama_dir), adapters, kernel=available_kernels[-1], num_blocks=200)
    for how in HOW:
        for turn in range(2):
            pool(rig, f"{how}-{turn}", PROMPTS[2], "tuned", how)
            rig.run()
    rig.add("text", PROMPTS[2], "tuned", max_tokens=2)
    rig.run()
    cached = {name: rig.outputs[f"{name}/0"][0].delta.num_cached_tokens for name in ("last-0", "last-1", "mean-0")}
    assert cached == {"last-0": 0, "last-1": 28, "mean-0": 0}
    assert rig.outputs["text/0"][0].delta.num_cached_tokens == 28
    for how in HOW:
        assert vector_of(rig, f"{how}-0").tobytes() == vector_of(rig, f"{how}-1").tobytes()
    assert rig.scheduler.blocks.num_used == 0
    rig.close()


# ends


@pytest.mark.parametrize("how", HOW)
def test_a_vector_that_is_not_finite_is_an_error_and_touches_nobody_else(
    how: Pooling, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    rig = build_rig(load(tiny_llama_dir), adapters, kernel=available_kernels[-1], num_blocks=200)
    pool(rig, "spoilt", PROMPTS[2], "spoilt", how)
    pool(rig, "tuned", PROMPTS[2], "tuned", how)
    rig.run()
    assert isinstance(rig.outputs["spoilt/0"][0].error, AdapterNotFinite)
    expected = hidden_of(tiny_llama_dir, adapters["tuned"], PROMPTS[2], how)
    np.testing.assert_allclose(vector_of(rig, "tuned"), expected, atol=1e-5, rtol=1e-5)
    rig.close()


def test_a_step_without_vectors_asks_for_no_hidden_states(tiny_llama_dir: Path) -> None:
    assert SamplingParams(max_tokens=0, pooling="last").task is Task.POOL
    rig = build_rig(load(tiny_llama_dir))
    base = rig.wrapped.model.base_model
    rig.add("text", PROMPTS[0], max_tokens=3)
    rig.step()
    assert not base._forward_hooks
    pool(rig, "vector", PROMPTS[1], None, "mean")
    rig.run()
    assert not base._forward_hooks
    rig.close()
