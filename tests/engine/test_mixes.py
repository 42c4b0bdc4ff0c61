"""Several adapters on one request: each module of the base moved by the weighted sum of what each moves it by."""

import contextlib
import itertools
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from manylora.engine.interface import FinishReason
from manylora.errors import Conflict
from tests.engine.harness import BACKENDS, Rig, available_kernels, build_rig, load
from tests.engine.oracle import NEAR_TIE, with_adapter, with_mix
from tests.peft_kinds import KINDS, REFUSED, make_kind
from tests.tiny_adapters import make_adapter

# Of what PEFT's own layers compute with.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")

PROMPT = [7, 33, 250, 12, 5, 91, 180, 44, 3]
LONGER = [*PROMPT, *range(100, 140)]  # more than a step takes, so it is cut into pieces
MOST = 1e-4  # of the logits' spread
SERVED = [name for name, kind in KINDS.items() if name not in REFUSED and not kind.acts_on_prompts]
NUM_PLAIN = 64

Made = Mapping[str, Path]
Weights = Mapping[str, float]
Wanted = tuple[str | Weights | None, list[int]]


@pytest.fixture(scope="module")
def made(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder for each kind, written by PEFT, and many of plain LoRA."""
    folder = tmp_path_factory.mktemp("mixed")
    return {name: make_kind(tiny_llama_dir, folder / str(n), name, seed=n) for n, name in enumerate(SERVED)}


@pytest.fixture(scope="module")
def plain(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("plain")
    targets: list[str | list[str]] = ["all-linear", ["q_proj", "v_proj"], ["down_proj", "o_proj", "embed_tokens"]]
    return {
        f"p{n:02}": make_adapter(
            tiny_llama_dir, folder / str(n), rank=(2, 4, 8)[n % 3], targets=targets[n % 3], alpha=4.0, seed=n
        )
        for n in range(NUM_PLAIN)
    }


def run(
    rig: Rig, wanted: Mapping[str, Wanted], *, max_tokens: int, sizes: list[int] | None = None
) -> dict[str, np.ndarray]:
    """Requests, all at once; the logits of their prompts. `sizes` is given the rows of each step."""
    for request, (adapter, prompt) in wanted.items():
        seq = rig.add(request, prompt, adapter, max_tokens=max_tokens)
        seq.capture_logits = seq.wants_prompt_logits = True
    found: dict[str, np.ndarray] = {}
    while rig.engine.has_work:
        outputs = rig.step()
        if sizes is not None:
            sizes.append(len(outputs))
        for output in outputs:
            if output.captured is not None:
                found[output.seq.request_id] = output.captured
    return found


def logits_of(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return found


def apart(found: np.ndarray, wanted: torch.Tensor) -> float:
    """The largest difference, as a share of the logits' spread."""
    return float((torch.from_numpy(found) - wanted).abs().max() / wanted.std())


KIND_WEIGHTS = (0.7, -0.4, 0.5)


@pytest.fixture(scope="module")
def kind_mixes(made: Made, tiny_llama_dir: Path) -> list[tuple[dict[str, float], torch.Tensor]]:
    """Each kind beside two others, and the logits of what its modules are by PEFT's."""
    found = []
    for n in range(0, len(SERVED), 2):
        names = (SERVED[n], SERVED[(n + 1) % len(SERVED)], SERVED[(n + 17) % len(SERVED)])
        mix = dict(zip(names, KIND_WEIGHTS, strict=True))
        together = with_mix(tiny_llama_dir, [(made[part], weight) for part, weight in mix.items()])
        found.append((mix, logits_of(together, PROMPT)))
    return found


@pytest.mark.parametrize("kernel", available_kernels)
def test_a_mix_of_any_kinds_moves_each_module_as_peft_makes_it(
    kernel: str, made: Made, kind_mixes: list[tuple[dict[str, float], torch.Tensor]], tiny_llama_dir: Path
) -> None:
    """All mixes in one batch with the base and with adapters alone."""
    rig = build_rig(load(tiny_llama_dir), made, kernel=kernel, num_blocks=400, max_num_batched_tokens=512,
                    num_slots=128, max_num_seqs=128)  # fmt: skip
    wanted: dict[str, Wanted] = {str(n): (mix, PROMPT) for n, (mix, _) in enumerate(kind_mixes)}
    found = run(rig, {"base": (None, PROMPT), "LoRA": ("LoRA", PROMPT), **wanted}, max_tokens=2)
    rig.close()
    assert apart(found["base"], logits_of(with_adapter(tiny_llama_dir, None), PROMPT)) < MOST
    assert apart(found["LoRA"], logits_of(with_adapter(tiny_llama_dir, made["LoRA"]), PROMPT)) < MOST
    for n, (mix, logits) in enumerate(kind_mixes):
        assert apart(found[str(n)], logits) < MOST, mix


def concatenated(model_dir: Path, parts: Made, weights: Weights, combination: str = "cat") -> PreTrainedModel:
    """What PEFT's `add_weighted_adapter` makes."""
    names = list(weights)
    tuned = PeftModel.from_pretrained(with_adapter(model_dir, None), parts[names[0]], adapter_name=names[0])
    for name in names[1:]:
        tuned.load_adapter(parts[name], adapter_name=name)
    tuned.add_weighted_adapter(names, list(weights.values()), "mixed", combination_type=combination)
    tuned.set_adapter("mixed")
    return tuned.eval()


def many_mixes(names: list[str]) -> list[dict[str, float]]:
    """32 different ones of two to four each, in which every name stands at least once."""
    rng = random.Random(0)
    left = rng.sample(names, len(names))
    found = []
    for n in range(32):
        parts = [left.pop(), left.pop(), *rng.sample(names, n % 3)]
        found.append({name: rng.choice((1.0, 0.7, -0.5, 0.25, 2.0)) for name in parts})
    return found


@pytest.fixture(scope="module")
def many(plain: Made, tiny_llama_dir: Path) -> tuple[list[dict[str, float]], PeftModel]:
    """32 mixes in which all adapters stand, and PEFT's model with all of both, the mixes under their numbers."""
    mixes = many_mixes(list(plain))
    assert {name for mix in mixes for name in mix} == plain.keys()
    first, *others = plain
    tuned = PeftModel.from_pretrained(with_adapter(tiny_llama_dir, None), plain[first], adapter_name=first)
    for name in others:
        tuned.load_adapter(plain[name], adapter_name=name)
    for n, mix in enumerate(mixes):
        tuned.add_weighted_adapter(list(mix), list(mix.values()), str(n), combination_type="cat")
    return mixes, tuned.eval()


@pytest.mark.parametrize("kernel", available_kernels)
def test_32_mixes_of_64_adapters_in_one_batch_answer_each_as_in_peft_and_as_alone(
    kernel: str, many: tuple[list[dict[str, float]], PeftModel], plain: Made, tiny_llama_dir: Path
) -> None:
    """With the base and adapters beside them; and again while prompts are cut into pieces and blocks run out."""
    mixes, tuned = many
    wanted: dict[str, Wanted] = {str(n): (mix, LONGER if n % 8 == 0 else PROMPT) for n, mix in enumerate(mixes)}
    wanted |= {"base": (None, PROMPT), **{name: (name, PROMPT) for name in ("p00", "p01")}}
    rig = build_rig(load(tiny_llama_dir), plain, kernel=kernel, num_blocks=400, max_num_batched_tokens=1024,
                    num_slots=NUM_PLAIN)  # fmt: skip
    rig.bring_in()
    sizes: list[int] = []
    found = run(rig, wanted, max_tokens=8, sizes=sizes)
    assert sizes.count(len(wanted)) >= 4
    together = {request: rig.tokens(request) for request in wanted}
    for n, mix in enumerate(mixes):
        prompt, tokens = wanted[str(n)][1], together[str(n)]
        tuned.set_adapter(str(n))
        logits = logits_of(tuned, [*prompt, *tokens[:-1]])
        assert apart(found[str(n)], logits[: len(prompt)]) < MOST, mix
        answered = logits[len(prompt) - 1 :]
        assert (answered.amax(dim=1) - answered[range(8), tokens]).max() <= NEAR_TIE, mix
    for request, one in wanted.items():
        alone = run(rig, {request: one}, max_tokens=8)[request]
        if rig.is_exact:
            assert alone.tobytes() == found[request].tobytes(), one
        assert rig.tokens(request)[8:] == together[request], one
    rig.close()
    short = build_rig(load(tiny_llama_dir), plain, kernel=kernel, num_blocks=40, max_num_batched_tokens=64,
                      num_slots=NUM_PLAIN)  # fmt: skip
    short.bring_in()
    run(short, wanted, max_tokens=8)
    run(short, wanted, max_tokens=8)
    assert short.scheduler.num_preemptions > 0
    for request, one in wanted.items():
        assert short.tokens(request) == together[request] * 2, one
    short.close()


def test_a_mix_is_what_peft_concatenates_and_not_its_linear_which_adds_cross_terms(
    plain: Made, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    """PEFT's `linear` adds up A and B each: the same only where no module has two of the adapters."""
    apart_ = {"q": make_adapter(tiny_llama_dir, tmp_path / "q", targets=["q_proj"], seed=70),
              "down": make_adapter(tiny_llama_dir, tmp_path / "down", targets=["down_proj"], seed=71)}  # fmt: skip
    rig = build_rig(load(tiny_llama_dir), {**plain, **apart_}, kernel=available_kernels[-1])
    both, shared = {"q": 0.7, "down": -0.3}, {"p00": 0.7, "p03": 0.3}
    negative = {"p01": 1.5, "p02": -1.0}
    found = run(rig, {"both": (both, PROMPT), "shared": (shared, PROMPT), "negative": (negative, PROMPT)}, max_tokens=1)
    rig.close()
    for combination in ("cat", "linear"):
        tuned = concatenated(tiny_llama_dir, apart_, both, combination)
        assert apart(found["both"], logits_of(tuned, PROMPT)) < MOST
    assert apart(found["negative"], logits_of(concatenated(tiny_llama_dir, plain, negative), PROMPT)) < MOST
    assert apart(found["shared"], logits_of(concatenated(tiny_llama_dir, plain, shared), PROMPT)) < MOST
    same_rank = {"a": plain["p02"], "b": plain["p05"]}
    crossed = concatenated(tiny_llama_dir, same_rank, {"a": 0.7, "b": 0.3}, "linear")
    exact = concatenated(tiny_llama_dir, same_rank, {"a": 0.7, "b": 0.3})
    assert apart(logits_of(crossed, PROMPT).numpy(), logits_of(exact, PROMPT)) > 100 * MOST


@pytest.mark.parametrize("kernel", available_kernels)
def test_a_part_that_is_not_finite_moves_no_row_without_it(kernel: str, made: Made, tiny_llama_dir: Path) -> None:
    """Of whatever sort its numbers are."""
    broken = ["LoRA", "DoRA", "LoKr", "IA3", "LN tuning", "LoRA with a saved head", "LoRA with trained tokens"]
    sound = ["VeRA", "OFT", "LoRA on all linears"]
    wanted: dict[str, Wanted] = {name: ({name: 0.5, "OFT": 0.5, "VeRA": 0.1}, PROMPT) for name in broken}
    wanted |= {"sound": (dict.fromkeys(sound, 0.5), PROMPT), "VeRA": ("VeRA", PROMPT), "base": (None, PROMPT)}

    def logits(*, spoil: bool) -> dict[str, np.ndarray]:
        adapters = {name: made[name] for name in (*broken, *sound)}
        rig = build_rig(load(tiny_llama_dir), adapters, kernel=kernel, num_blocks=400, max_num_batched_tokens=512)
        for name in broken:
            while (slot := rig.tiers.acquire(rig.refs[name])) is None:
                rig.loaded.wait(1)
            rig.tiers.release(rig.refs[name])
            slab, row = rig.tiers.memory.locate(slot)
            for start, size in slab.layout.parts() if spoil else ():
                slab._room(start, size, row).fill_(float("nan"))
            slab.finite.discard(row)
        found = run(rig, wanted, max_tokens=1)
        rig.close()
        return found

    clean, beside = logits(spoil=False), logits(spoil=True)
    for name in wanted:
        if name in broken:
            assert np.isnan(beside[name]).any(), name
        else:
            assert beside[name].tobytes() == clean[name].tobytes(), name


# places


@pytest.mark.parametrize("seed", range(3))
def test_mixes_that_want_the_same_few_slots_all_get_them(seed: int, plain: Made, tiny_llama_dir: Path) -> None:
    """With three slots for eight adapters, some pinned for a while, requests that end early and adapters that leave."""
    rng = random.Random(seed)
    names = list(plain)[:8]
    rig = build_rig(load(tiny_llama_dir), {name: plain[name] for name in names}, kernel=available_kernels[-1],
                    num_slots=3, max_num_seqs=6, num_blocks=200)  # fmt: skip
    parts_of: dict[str, list[str]] = {}
    ended, pinned, leaving = set[str](), set[str](), set[str]()
    for n in range(60):
        parts_of[str(n)] = parts = rng.sample(names, rng.choice((1, 1, 2, 2, 3)))
        mix: str | Weights = parts[0] if len(parts) == 1 else {name: rng.choice((0.5, 1.0, -0.5)) for name in parts}
        rig.add(str(n), PROMPT, mix, tenant=f"t{n % 3}", max_tokens=rng.randint(1, 6))
    open_ = {seq.request_id: seq for seq in rig.scheduler.sequences()}
    while rig.engine.has_work:
        for _ in range(rng.randint(1, 8)):
            for output in rig.step():
                if output.error is not None:
                    assert "leave no room" in output.error.message
                    assert len({*parts_of[output.seq.request_id], *pinned}) > 3
        if rng.random() < 0.2:
            name, seq = rng.choice(list(open_.items()))
            if not seq.is_finished:
                rig.engine.abort([seq])
                ended.add(name)
        if rng.random() < 0.3:
            switch_pin(rig, rng.choice(names), pinned)
        if rng.random() < 0.3:
            leaving.add(rng.choice(names))
        gone = {name for name in leaving if rig.tiers.forget(rig.refs[name], 0)}
        pinned -= leaving
        leaving -= gone
    for name, seq in open_.items():
        assert seq.is_finished, name
        if name not in ended and seq.finish_reason is not FinishReason.ERROR:
            assert seq.finish_reason is FinishReason.LENGTH, name
            assert len(rig.tokens(name)) == seq.params.max_tokens
    assert not any(row["users"] for row in rig.tiers.residents())
    rig.tiers.check_integrity()
    rig.close()


def switch_pin(rig: Rig, name: str, pinned: set[str]) -> None:
    """Pin an adapter, unless there would be too many then, or let it go."""
    is_pinned = name in pinned
    with contextlib.suppress(Conflict):
        rig.tiers.set_pinned(rig.refs[name], not is_pinned)
        (pinned.discard if is_pinned else pinned.add)(name)


def test_pins_that_leave_no_room_for_a_mix_fail_its_requests_and_nobody_elses(
    plain: Made, tiny_llama_dir: Path
) -> None:
    names = list(plain)[:4]
    rig = build_rig(load(tiny_llama_dir), {name: plain[name] for name in names}, num_slots=2)
    rig.tiers.set_pinned(rig.refs[names[0]], True)
    rig.add("mix", PROMPT, {names[1]: 0.5, names[2]: 0.5}, max_tokens=2)
    rig.add("beside", PROMPT, names[3], max_tokens=2)
    rig.add("with it", PROMPT, {names[0]: 0.5, names[2]: 0.5}, max_tokens=2)
    rig.run()
    error = rig.outputs["mix/0"][-1].error
    assert error is not None
    assert "pinned adapters and the others of the request leave no room" in error.message
    assert len(rig.tokens("beside")) == len(rig.tokens("with it")) == 2
    rig.close()


@pytest.mark.skipif("fused" not in BACKENDS, reason="the C++ kernels are not installed")
def test_the_cache_knows_a_prompt_by_its_mix(plain: Made, tiny_llama_dir: Path) -> None:
    """In whatever order the parts are named; not by other weights, and not by one of them."""
    rig = build_rig(load(tiny_llama_dir), plain, kernel="fused")

    def cached(mix: str | Weights) -> int:
        name = str(next(number))
        seq = rig.add(name, LONGER, mix, tenant="one", max_tokens=1)
        rig.run()
        return seq.num_cached_tokens

    number = itertools.count()
    assert cached({"p00": 0.7, "p01": 0.3}) == 0
    assert cached({"p01": 0.3, "p00": 0.7}) == 48
    assert cached({"p00": 0.3, "p01": 0.7}) == 0
    assert cached("p00") == 0
    assert cached({"p00": 1.0}) == 48
    assert cached({"p00": 0.5}) == 0
    rig.close()
