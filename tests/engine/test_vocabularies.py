"""Adapters with tokens that the base has not, or without some that it has, beside all others, against PEFT."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from manylora.engine.interface import FinishReason
from manylora.errors import InvalidAdapter
from manylora.identity import Vocabulary
from manylora.lora.format.reader import read
from manylora.models.backends import Backend
from manylora.models.stored_weights import StoredWeights
from tests.engine.harness import Rig, available_kernels, build_rig, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.resized import make_resized, with_resized
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tiny_model

SIZE: Final = 320  # of the tiny base
PROMPT: Final = [7, 33, 250, 12, 5, 91, 180, 44, 3]
KINDS: Final[Mapping[str, tuple[int, dict[str, Any]]]] = {
    "saved": (325, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "untrained": (327, {}),
    "trained": (325, {"trainable_token_indices": [7, 321, 320]}),
    "trained at both ends": (323, {"trainable_token_indices": {"embed_tokens": [321, 7], "lm_head": [320, 250]}}),
    "fewer": (304, {}),
    "fewer, saved": (304, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}
TIED: Final = ("untrained", "trained", "fewer")


def prompt_of(size: int) -> list[int]:
    """With each of its own tokens."""
    return [*PROMPT, *range(SIZE, size), 5, 9]


Wanted = Mapping[str, tuple[str | None, list[int]]]


def prompts_logits(rig: Rig, wanted: Wanted, *, max_tokens: int = 8) -> dict[str, np.ndarray]:
    for request, (adapter, prompt) in wanted.items():
        seq = rig.add(request, prompt, adapter, max_tokens=max_tokens)
        seq.capture_logits = seq.wants_prompt_logits = True
    found: dict[str, np.ndarray] = {}
    while rig.engine.has_work:
        for output in rig.step():
            if output.captured is not None:
                found[output.seq.request_id] = output.captured
    return found


@pytest.mark.parametrize("kernel", available_kernels)
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_a_vocabulary_of_another_size_is_what_it_is_in_peft(base: str, kernel: str | Backend, tmp_path: Path) -> None:
    """All in one batch with the base and a plain adapter, each of which gets what it gets without them."""
    folder = make_tiny_model("llama", tmp_path / "base", tie_word_embeddings=base == "tied")
    kinds = {name: KINDS[name] for name in (TIED if base == "tied" else KINDS)}
    made = {
        name: make_resized(folder, tmp_path / str(n), size, seed=n, **how)
        for n, (name, (size, how)) in enumerate(kinds.items())
    }
    plain = {"plain": make_adapter(folder, tmp_path / "plain", seed=9)}
    others: dict[str, tuple[str | None, list[int]]] = {"base": (None, PROMPT), "plain": ("plain", PROMPT)}
    rig = build_rig(load(folder), {**made, **plain}, kernel=kernel, num_blocks=80, max_num_batched_tokens=32)
    for name, where in made.items():
        size = kinds[name][0]
        assert read(where, rig.wrapped.modules, max_rank=64, max_size=2**24).num_tokens == size
    rig.bring_in()
    wanted = {name: (name, prompt_of(kinds[name][0])) for name in made}
    found = prompts_logits(rig, {**wanted, **others})
    rig.close()
    for name, where in made.items():
        size = kinds[name][0]
        tuned = with_resized(folder, where, size)
        with torch.inference_mode():
            logits = tuned(torch.tensor([wanted[name][1]])).logits[0]
        assert found[name].shape == logits.shape == (len(wanted[name][1]), size)
        assert float((torch.from_numpy(found[name]) - logits).abs().max() / logits.std()) < 1e-4, name
        check_greedy(tuned, wanted[name][1], rig.tokens(name))
    check_greedy(with_adapter(folder, plain["plain"]), PROMPT, rig.tokens("plain"))
    alone = build_rig(load(folder), plain, kernel=kernel, num_blocks=80, max_num_batched_tokens=32)
    apart = prompts_logits(alone, others)
    alone.close()
    for name in others:
        assert alone.tokens(name) == rig.tokens(name)
        if rig.is_exact:
            assert apart[name].tobytes() == found[name].tobytes()


def test_own_tokens_are_drawn_counted_ruled_out_and_scored_like_all_others(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "base")
    made = {"own": make_resized(folder, tmp_path / "own", 325, trainable_token_indices=[320, 321, 322, 323, 324])}
    rig = build_rig(load(folder), made, kernel=available_kernels[-1])
    rig.refs["own"] = replace(rig.refs["own"], vocabulary=Vocabulary.of(325))
    own = range(320, 325)
    bias = tuple((each, 1000.0) for each in own)
    rig.add("drawn", PROMPT, "own", temperature=1.0, seed=1, logit_bias=bias, max_tokens=24)
    rig.add("base", PROMPT, temperature=1.0, seed=1, max_tokens=24)
    rig.add("allowed", PROMPT, "own", allowed_token_ids=(322, 7), max_tokens=12)
    rig.add("no two", PROMPT, "own", logit_bias=bias, presence_penalty=2000.0, max_tokens=5, logprobs=2)
    rig.add("banned", PROMPT, "own", logit_bias=bias, bad_words=((320,), (321,), (322,), (323,)), max_tokens=4)
    rig.add("early", PROMPT, "own", logit_bias=((324, 1000.0),), stop_token_ids=(324,), min_tokens=3, max_tokens=9)
    rig.add("scored", [*PROMPT, 321, 322], "own", prompt_logprobs=1, max_tokens=0)
    rig.run()
    rig.close()
    assert set(rig.tokens("drawn")) <= set(own)
    assert len(set(rig.tokens("drawn"))) > 1
    assert max(rig.tokens("base")) < SIZE
    assert set(rig.tokens("allowed")) <= {322, 7}
    assert sorted(rig.tokens("no two")) == list(own)
    assert rig.tokens("banned") == [324] * 4
    early = rig.tokens("early")
    assert len(early) == 4
    assert early[-1] == 324
    assert rig.outputs["early/0"][-1].delta.finish_reason is FinishReason.STOP
    entries = [entry for output in rig.outputs["scored/0"] for entry in output.delta.prompt_logprobs]
    assert [entry.token_id for entry in entries] == [*PROMPT, 321, 322]
    with torch.inference_mode():
        logits = with_resized(folder, made["own"], 325)(torch.tensor([[*PROMPT, 321, 322]])).logits[0]
    wanted = torch.log_softmax(logits, -1)[-3, 321]
    assert entries[-2].logprob == pytest.approx(float(wanted), abs=1e-3)
    chosen = [entry for output in rig.outputs["no two/0"] for entry in output.delta.logprobs]
    assert [entry.token_id for entry in chosen] == rig.tokens("no two")


def test_rows_that_are_not_finite_stay_in_their_own_requests(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "base")
    made = {
        name: make_resized(folder, tmp_path / name, 325, seed=n, trainable_token_indices=[7, 320])
        for n, name in enumerate(("broken", "sound"))
    }
    wanted: dict[str, tuple[str | None, list[int]]] = {
        "base": (None, PROMPT), "sound": ("sound", prompt_of(325)), "broken": ("broken", prompt_of(325))
    }  # fmt: skip

    def logits(*, spoil: bool) -> dict[str, np.ndarray]:
        rig = build_rig(load(folder), made, kernel=available_kernels[-1])
        rig.bring_in()
        for slot in (row["slot"] for row in rig.tiers.residents() if row["name"] == "broken"):
            for _, extent in rig.tiers.memory.locate(slot)[0].layout.placed if spoil else ():
                slab, row = rig.tiers.memory.locate(slot)
                for start, size in extent.parts():
                    slab._room(start, size, row).fill_(float("nan"))
        found = prompts_logits(rig, wanted, max_tokens=1)
        rig.close()
        return found

    clean, beside = logits(spoil=False), logits(spoil=True)
    assert clean.keys() >= {"base", "sound"}
    for name in ("base", "sound"):
        assert clean[name].tobytes() == beside[name].tobytes()


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder, other = make_tiny_model("llama", tmp_path / "base"), make_tiny_model("llama", tmp_path / "other", seed=5)
    rig = build_rig(load(folder))
    rig.close()

    def problem(adapter: Path) -> tuple[str, str]:
        with pytest.raises(InvalidAdapter) as caught:
            read(adapter, rig.wrapped.modules, max_rank=64, max_size=2**24, base=rig_weights)
        return caught.value.problems[0].code, caught.value.problems[0].message

    rig_weights = StoredWeights(folder, rig.wrapped.modules)
    code, message = problem(make_resized(other, tmp_path / "trained elsewhere", 325))
    assert code == "base_mismatch"
    assert "modules_to_save" in message
    code, message = problem(make_resized(folder, tmp_path / "half", 150))
    assert code == "unexpected_tensor"
    targeted = make_resized(folder, tmp_path / "targeted", 325, target_modules=["embed_tokens", "lm_head"])
    code, message = problem(targeted)
    assert code == "base_mismatch"
    assert "target_modules" in message
    tokens = [33, 7]
    invoked = make_resized(folder, tmp_path / "invoked", 325, target_modules=["q_proj"], alora_invocation_tokens=tokens)
    code, message = problem(invoked)
    assert code == "unsupported_feature"
    assert "before it is invoked" in message
