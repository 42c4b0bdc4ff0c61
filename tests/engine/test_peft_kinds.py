"""Every kind of adapter that the installed PEFT can make: served as PEFT computes it in float32, or refused by name."""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from manylora.errors import InvalidAdapter, InvalidRequest
from manylora.identity import CONFIG_FILE
from manylora.lifecycle.weights.low_rank import applied, read_lora
from manylora.lora.format.kinds import KINDS as READERS
from manylora.lora.format.kinds import NOT_SERVED
from manylora.lora.format.reader import read, read_trusted
from manylora.lora.memory.packing import KeepAs
from manylora.lora.memory.terms import (
    DenseExtent,
    InputExtent,
    LowRankExtent,
    OutputExtent,
    PrefixExtent,
    TokenRowsExtent,
)
from manylora.models.wrapping import adaptable_modules
from tests.engine.harness import BACKENDS, Rig, available_kernels, build_rig, load
from tests.engine.oracle import check_served, with_adapter
from tests.engine.test_async_engine import started
from tests.peft_kinds import KINDS, METHODS, OUTCOMES, REFUSED, make_kind, outcome_of, tensors_of

# Of what PEFT's own layers compute with.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),  # as PEFT hands prefixes in
]

PROMPT = [7, 33, 250, 12, 5, 91, 180, 44, 3]
LONGER = [*PROMPT, *range(100, 140)]  # more than a step takes, so it is cut into pieces
MOST = 1e-4  # of the logits' spread
SERVED = {name: kind for name, kind in KINDS.items() if name not in REFUSED}

Made = Mapping[str, Path]


@pytest.fixture(scope="module")
def made(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder for each kind, written by PEFT."""
    folder = tmp_path_factory.mktemp("kinds")
    return {name: make_kind(tiny_llama_dir, folder / str(n), name, seed=n) for n, name in enumerate(KINDS)}


@functools.cache  # for all kernels and number formats: to load a model takes longer than to serve it
def _computed(base: Path, adapter: Path | None, prompt: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = with_adapter(base, adapter)(torch.tensor([prompt])).logits[0]
    return found[-len(prompt) :]


def logits_of(base: Path, adapter: Path | None, prompt: list[int]) -> torch.Tensor:
    """PEFT's own, [tokens, vocabulary]; of virtual tokens before the prompt PEFT has some as well."""
    return _computed(base, adapter, tuple(prompt))


def run(
    rig: Rig, prompts: Mapping[str | None, list[int]], *, max_tokens: int, tenant: str | None = None
) -> dict[str, np.ndarray]:
    """A request for each adapter, all at once; the logits of their prompts, by name."""
    for name, prompt in prompts.items():
        seq = rig.add(str(name), prompt, name, tenant=tenant, max_tokens=max_tokens)
        seq.capture_logits = seq.wants_prompt_logits = True
    found: dict[str, np.ndarray] = {}
    while rig.engine.has_work:
        for output in rig.step():
            if output.captured is not None:
                found[output.seq.request_id] = output.captured
    return found


def apart(found: np.ndarray, wanted: torch.Tensor) -> float:
    """The largest difference, as a share of the logits' spread."""
    return float((torch.from_numpy(found) - wanted).abs().max() / wanted.std())


def test_every_method_of_the_installed_peft_is_decided() -> None:
    assert {kind.method for kind in KINDS.values()} | {"XLORA"} == METHODS
    assert READERS.keys() | NOT_SERVED.keys() == METHODS
    assert not READERS.keys() & NOT_SERVED.keys()


def test_the_page_says_what_each_kind_becomes(made: Made, tiny_llama_dir: Path) -> None:
    rig = build_rig(load(tiny_llama_dir))
    rig.close()
    found = {}
    for name, folder in made.items():
        size = sum(view.num_bytes for view in tensors_of(folder).values())
        adapter = read(folder, rig.wrapped.modules, max_rank=64, max_size=2**24) if name in SERVED else None
        found[name] = outcome_of(name, adapter, size)
    assert found == json.loads(OUTCOMES.read_text()), "run `python scripts/document_kinds.py --try`"


def test_most_kinds_are_served() -> None:
    assert len(SERVED) >= 60


@pytest.mark.parametrize("name", REFUSED)
def test_a_kind_that_is_not_served_is_refused_with_the_reason(name: str, made: Made, tiny_llama_dir: Path) -> None:
    rig = build_rig(load(tiny_llama_dir))
    rig.close()
    with pytest.raises(InvalidAdapter) as caught:
        read(made[name], rig.wrapped.modules, max_rank=64, max_size=2**24)
    first = caught.value.problems[0]
    assert first.code == "unsupported_feature"
    assert REFUSED[name] in first.message


@pytest.mark.parametrize("name", SERVED)
def test_a_kind_answers_alone_as_in_peft(name: str, made: Made, tiny_llama_dir: Path) -> None:
    rig = build_rig(load(tiny_llama_dir), {name: made[name]}, kernel=available_kernels[-1])
    read(made[name], rig.wrapped.modules, max_rank=64, max_size=2**24)
    found = run(rig, {name: PROMPT}, max_tokens=8)
    rig.close()
    tuned = logits_of(tiny_llama_dir, made[name], PROMPT)
    assert apart(found[name], tuned) < MOST
    assert float((logits_of(tiny_llama_dir, None, PROMPT) - tuned).abs().max() / tuned.std()) > 10 * MOST
    check_served(tiny_llama_dir, made[name], PROMPT, rig.tokens(name))


@pytest.mark.parametrize("kernel", available_kernels)
def test_all_kinds_answer_together_as_in_peft(kernel: str, made: Made, tiny_llama_dir: Path) -> None:
    """In one batch with the base, while prompts are cut into pieces and blocks run out."""
    adapters = {name: made[name] for name in SERVED}
    rig = build_rig(load(tiny_llama_dir), adapters, kernel=kernel, num_blocks=24, max_num_batched_tokens=96,
                    num_slots=128, max_num_seqs=128)  # fmt: skip
    rig.bring_in()
    prompts: dict[str | None, list[int]] = {name: LONGER if n % 3 == 0 else PROMPT for n, name in enumerate(adapters)}
    found = run(rig, {None: PROMPT, **prompts}, max_tokens=12)
    again = run(rig, prompts, max_tokens=12)  # over blocks of the prefix cache
    preemptions = rig.scheduler.num_preemptions
    rig.close()
    assert preemptions > 0
    assert apart(found["None"], logits_of(tiny_llama_dir, None, PROMPT)) < MOST
    for name, adapter in adapters.items():
        prompt = prompts[name]
        assert apart(found[name], logits_of(tiny_llama_dir, adapter, prompt)) < MOST, name
        tokens = rig.tokens(name)
        check_served(tiny_llama_dir, adapter, prompt, tokens[:12])
        assert tokens[:12] == tokens[12:], name
    assert again.keys() == adapters.keys()


@pytest.mark.anyio
async def test_the_probe_of_an_upload_sees_what_each_kind_does(made: Made, tiny_llama_dir: Path) -> None:
    """Also where it acts on some tokens only, or behind some."""
    rig = build_rig(load(tiny_llama_dir), {name: made[name] for name in SERVED}, kernel=available_kernels[-1],
                    num_blocks=100, num_slots=128)  # fmt: skip
    async with started(rig, tiny_llama_dir) as engine:
        for name in SERVED:
            effect = await engine.measure_effect(rig.refs[name], read_trusted(made[name], rig.wrapped.modules))
            assert effect.max_abs_logit_delta > 1e-3, name


def test_commands_on_weights_take_plain_low_rank_as_peft_has_it_and_refuse_all_others_by_name(
    made: Made, tiny_llama_dir: Path
) -> None:
    """`inspect`, `compress`, `merge` and a local `evaluate`, which read adapters by one function."""
    base = load(tiny_llama_dir)
    refused, num_taken = {}, 0
    for name, folder in made.items():
        try:
            pairs = read_lora(folder, adaptable_modules(base)).pairs
        except (InvalidRequest, InvalidAdapter) as error:
            refused[name] = str(error)
            continue
        with torch.inference_mode(), applied(base, pairs):
            found = base(torch.tensor([PROMPT])).logits[0]
        assert apart(found.numpy(), logits_of(tiny_llama_dir, folder, PROMPT)) < MOST, name
        num_taken += 1
    assert num_taken > 10
    for name, message in refused.items():
        config = json.loads((made[name] / CONFIG_FILE).read_text())
        assert config["peft_type"] in message or any(key in message for key in config) or REFUSED[name] in message, name


@pytest.mark.skipif("fused" not in BACKENDS, reason="the C++ kernels are not installed")
def test_plain_adapters_are_the_same_to_the_last_bit_beside_every_other_kind(made: Made, tiny_llama_dir: Path) -> None:
    plain = [name for name in SERVED if SERVED[name].method == "LORA" and not SERVED[name].has_more_than_low_rank]
    assert len(plain) > 5

    def logits(names: list[str]) -> dict[str, np.ndarray]:
        rig = build_rig(load(tiny_llama_dir), {name: made[name] for name in names}, kernel="fused", num_blocks=400,
                        max_num_batched_tokens=1024, num_slots=128, max_num_seqs=128)  # fmt: skip
        found = run(rig, {None: PROMPT, **dict.fromkeys(names, PROMPT)}, max_tokens=4)
        rig.close()
        return found

    together, alone = logits(list(SERVED)), logits(plain)
    for name in ("None", *plain):
        assert together[name].tobytes() == alone[name].tobytes(), name


# Every term at every place that it can have, each with an adapter that has it there.
TERMS = [
    ("LoRA with alphas by pattern", LowRankExtent), ("LoRA on the embedding", LowRankExtent),
    ("LoRA on the head", LowRankExtent), ("LoKr", DenseExtent), ("LoRA with a saved head", DenseExtent),
    ("LoRA with a saved embedding", DenseExtent), ("LoRA with trained tokens", TokenRowsExtent),
    ("IA3", InputExtent), ("IA3", OutputExtent), ("DoRA", OutputExtent), ("LN tuning", OutputExtent),
    ("Prompt tuning", PrefixExtent), ("Prefix tuning", PrefixExtent),
]  # fmt: skip
LENGTHS_AT_THE_ENDS = [("DoRA on the embedding", OutputExtent), ("DoRA on the head", OutputExtent)]


@contextmanager
def spoiled(rig: Rig, name: str, term: type) -> Iterator[None]:
    """One term of an adapter that is on the device is NaN, and then what it was."""
    slot = next(row["slot"] for row in rig.tiers.residents() if row["name"] == name)
    memory = rig.tiers.memory
    slab, row = memory.locate(slot)
    extents = [extent for _, extent in slab.layout.placed if isinstance(extent, term)]
    assert extents
    rooms = [slab._room(start, size, row) for extent in extents for start, size in extent.parts()]
    kept = [room.clone() for room in rooms]
    for room in rooms:
        room.fill_(float("nan"))
    slab.finite.discard(row)
    memory._ready.pop(slot, None)
    yield
    for room, values in zip(rooms, kept, strict=True):
        room.copy_(values)
    slab.finite.discard(row)
    memory._ready.pop(slot, None)


@pytest.mark.parametrize("terms", [TERMS, LENGTHS_AT_THE_ENDS], ids=["terms", "lengths at the ends"])
@pytest.mark.parametrize("kernel", available_kernels)
def test_numbers_of_any_term_that_are_not_finite_stay_in_their_own_rows(
    kernel: str, terms: list[tuple[str, type]], made: Made, tiny_llama_dir: Path
) -> None:
    names = ["LoRA", "OFT", "BEFT", "VeRA", *dict(terms)]
    rig = build_rig(load(tiny_llama_dir), {name: made[name] for name in names}, kernel=kernel, num_blocks=400,
                    max_num_batched_tokens=512)  # fmt: skip
    rig.bring_in()
    prompts: dict[str | None, list[int]] = {None: PROMPT, **dict.fromkeys(names, PROMPT)}
    clean = run(rig, prompts, max_tokens=1, tenant="clean")
    for name, term in terms:
        with spoiled(rig, name, term):
            beside = run(rig, prompts, max_tokens=1, tenant=f"{name} {term.__name__}")
        assert np.isnan(beside[name]).any(), (name, term)
        for other in ("None", *names):
            assert other == name or beside[other].tobytes() == clean[other].tobytes(), (other, name, term)
    rig.close()


@pytest.mark.parametrize("kernel", ["torch", available_kernels[-1]])
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.02), (torch.int8, 0.1)])
def test_kinds_kept_in_fewer_bits_answer_nearly_alike(
    dtype: torch.dtype, most: float, kernel: str, made: Made, tiny_llama_dir: Path
) -> None:
    adapters = {name: made[name] for name in SERVED}
    rig = build_rig(load(tiny_llama_dir), adapters, kernel=kernel, num_blocks=400, max_num_batched_tokens=256,
                    num_slots=128, keep_as=KeepAs(torch.float32, dtype))  # fmt: skip
    found = run(rig, dict.fromkeys(adapters, PROMPT), max_tokens=1)
    rig.close()
    for name, adapter in adapters.items():
        wanted = logits_of(tiny_llama_dir, adapter, PROMPT)
        difference = torch.from_numpy(found[name]) - wanted
        assert float(difference.square().mean().sqrt() / wanted.std()) < most, name
