"""A step that raises: who is not to blame gets the tokens it would have got, and nothing is lost."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.engine.interface import FinishReason
from manylora.engine.recovery import Fault, Unrecoverable
from manylora.errors import AdapterNotFinite, ModelNotFinite, SequenceFailed
from tests.engine.faults import PHASES, Faults
from tests.engine.harness import Rig, available_kernels, build_rig, load
from tests.engine.oracle import check_served
from tests.tiny_adapters import make_adapter, make_adapter_that_spoils
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.usefixtures("quick_collections")  # one for each step that has no memory

NAMES = [None, "tuned", None, "other", "tuned", None, "other"]
PROMPTS = [[3 + 7 * i, *range(20 + i, 20 + 4 * i)] for i in range(len(NAMES))]
GUILTY = 3


@pytest.fixture(scope="module")
def adapters(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(tiny_llama_dir, root / name, seed=i) for i, name in enumerate(("tuned", "other"))}


@pytest.fixture(scope="module", params=available_kernels)
def faults_of_all_tests(
    request: pytest.FixtureRequest, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> Iterator[Faults]:
    """One engine for all tests: each leaves it as it found it, or the next one fails."""
    rig = build_rig(load(tiny_llama_dir), adapters, kernel=request.param, num_blocks=120)
    ask_all(rig, "clean")
    rig.run()
    yield Faults(rig).install()
    rig.close()


@pytest.fixture
def faults(faults_of_all_tests: Faults) -> Iterator[Faults]:
    faults_of_all_tests.clear()
    yield faults_of_all_tests
    faults_of_all_tests.clear()
    check_nothing_is_held(faults_of_all_tests.rig)


@pytest.fixture
def rig(faults: Faults) -> Rig:
    faults.rig.outputs = {name: found for name, found in faults.rig.outputs.items() if name.startswith("clean")}
    return faults.rig


def ask_all(rig: Rig, run: str) -> None:
    for i, (prompt, name) in enumerate(zip(PROMPTS, NAMES, strict=True)):
        rig.add(f"{run}{i}", prompt, name, max_tokens=12, seed=i, temperature=0.0 if i % 2 else 0.8, prompt_logprobs=2)


def scores(rig: Rig, request_id: str) -> list[Any]:
    return [entry for output in rig.outputs[f"{request_id}/0"] for entry in output.delta.prompt_logprobs]


def check_same(rig: Rig, tiny_llama_dir: Path, adapters: dict[str, Path], but: int | None = None) -> None:
    """Every request but one got what it gets without faults."""
    for i, name in enumerate(NAMES):
        if i == but:
            continue
        assert rig.outputs[f"faulty{i}/0"][-1].delta.finish_reason is FinishReason.LENGTH
        found, expected = rig.tokens(f"faulty{i}"), rig.tokens(f"clean{i}")
        if rig.is_exact:
            assert found == expected
            assert scores(rig, f"faulty{i}") == scores(rig, f"clean{i}")
        elif i % 2:
            check_served(tiny_llama_dir, adapters[name] if name else None, PROMPTS[i], found)
        else:
            assert len(found) == len(expected)
        assert len(scores(rig, f"faulty{i}")) == len(PROMPTS[i])


def check_nothing_is_held(rig: Rig) -> None:
    assert not rig.engine.has_work
    assert rig.scheduler.blocks.num_used == 0
    assert not any(resident["users"] for resident in rig.tiers.residents())


@pytest.mark.parametrize("num_tokens", [0, 5])
@pytest.mark.parametrize("phase", PHASES)
def test_the_sequence_that_a_step_fails_for_ends_alone(
    phase: str, num_tokens: int, rig: Rig, faults: Faults, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    ask_all(rig, "faulty")
    faults.of(phase, f"faulty{GUILTY}", num_tokens)
    rig.run()

    *before, last = rig.outputs[f"faulty{GUILTY}/0"]
    assert last.delta.finish_reason is FinishReason.ERROR
    assert isinstance(last.error, SequenceFailed)
    assert (last.error.status, last.error.code) == (500, "engine_step_failed")
    assert phase in last.error.message
    assert "Broken" in last.error.message
    num_delivered = num_tokens - 1 if phase == "deliver" and num_tokens else num_tokens  # the failing token is its own
    assert [t for o in before for t in o.delta.token_ids] == rig.tokens(f"clean{GUILTY}")[:num_delivered]
    check_same(rig, tiny_llama_dir, adapters, but=GUILTY)
    check_nothing_is_held(rig)
    assert faults.counted == [(phase, "isolated")]


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("phase", PHASES[:3])
def test_a_fault_that_does_not_come_again_ends_nobody(
    phase: str, call: int, rig: Rig, faults: Faults, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    ask_all(rig, "faulty")
    faults.after(phase, call, call + 1)
    rig.run()
    check_same(rig, tiny_llama_dir, adapters)
    check_nothing_is_held(rig)
    assert faults.counted == [(phase, "retried")]


@pytest.mark.parametrize("phase", PHASES[:3])
def test_a_fault_without_anybodys_input_ends_the_engine(phase: str, rig: Rig, faults: Faults) -> None:
    ask_all(rig, "faulty")
    rig.step()
    faults.when[phase] = lambda _seqs: True
    with pytest.raises(Unrecoverable) as raised:
        rig.run()
    assert type(raised.value.__cause__).__name__ == "Broken"
    rig.engine.abort(list(rig.scheduler.sequences()))
    assert faults.counted == [(phase, "fatal")]


def test_a_fault_that_all_sequences_have_in_common_leaves_the_engine_alive(rig: Rig, faults: Faults) -> None:
    """Such as an adapter that everybody uses: the engine runs what is nobody's, so it goes on."""
    ask_all(rig, "faulty")
    faults.when["forward"] = lambda seqs: any(s.request_id.startswith("faulty") for s in seqs)
    rig.run()
    assert all(isinstance(rig.outputs[f"faulty{i}/0"][-1].error, SequenceFailed) for i in range(len(NAMES)))
    check_nothing_is_held(rig)
    ask_all(rig, "later")
    rig.run()
    assert all(len(rig.tokens(f"later{i}")) == 12 for i in range(len(NAMES)))


def test_what_a_failed_sequence_has_computed_is_not_found_again(rig: Rig, faults: Faults) -> None:
    prompt = list(range(30, 70))
    rig.add("sound", prompt)
    rig.run()
    rig.add("again", prompt)
    rig.run()
    assert rig.outputs["again/0"][0].delta.num_cached_tokens == 36
    rig.add("bad", prompt)
    faults.of("forward", "bad", 3)
    rig.run()
    rig.add("after", prompt)
    rig.run()
    assert rig.outputs["after/0"][0].delta.num_cached_tokens == 0
    assert rig.tokens("after") == rig.tokens("sound")


def test_a_request_beside_a_failed_one_keeps_the_prefix_that_both_have(rig: Rig, faults: Faults) -> None:
    """The blocks are the survivor's for as long as it runs, and nobody else's afterwards either."""
    prompt = list(range(130, 170))
    rig.add("first", prompt, max_tokens=2)
    rig.run()
    rig.add("bad", prompt)
    rig.add("good", prompt, max_tokens=30)
    faults.of("forward", "bad", 3)
    rig.run()
    assert len(rig.tokens("good")) == 30
    assert rig.tokens("good")[:2] == rig.tokens("first")
    rig.add("after", prompt, max_tokens=30)
    rig.run()
    assert rig.outputs["after/0"][0].delta.num_cached_tokens == 0
    check_nothing_is_held(rig)


# memory


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("the device fell off"), False),
        (OSError("Cannot allocate memory"), False),
    ],
)
def test_what_is_raised_for_want_of_memory_is_known(error: Exception, is_memory: bool) -> None:
    assert Fault.of("forward", error).is_memory is is_memory


@pytest.mark.parametrize("most", [3, 10])
def test_where_memory_is_short_a_step_is_made_smaller_and_everybody_is_answered(
    most: int,
    rig: Rig,
    faults: Faults,
    tiny_llama_dir: Path,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask_all(rig, "faulty")
    forward = rig.engine.runner.forward

    def small(scheduled: Any) -> Any:
        if sum(item.num_tokens for item in scheduled) > most:
            raise MemoryError
        return forward(scheduled)

    monkeypatch.setattr(rig.engine.runner, "forward", small)
    rig.run()
    check_same(rig, tiny_llama_dir, adapters)
    check_nothing_is_held(rig)
    assert {result for _, result in faults.counted} == {"retried"}


def test_what_memory_is_too_short_for_even_alone_fails_alone(rig: Rig, faults: Faults) -> None:
    ask_all(rig, "faulty")
    faults.error = MemoryError
    faults.of("forward", f"faulty{GUILTY}", 4)
    rig.run()
    failed = [i for i in range(len(NAMES)) if rig.outputs[f"faulty{i}/0"][-1].error is not None]
    assert failed == [GUILTY]
    check_nothing_is_held(rig)


def test_the_tensors_of_a_step_that_failed_are_gone_when_it_is_tried_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exception has its frames, and those would hold them."""
    seen: list[Any] = []
    sample = rig.engine.runner.sample

    def failing(scheduled: Any, logits: torch.Tensor) -> Any:
        if len(seen) < 3:
            assert all(ref() is None for ref in seen)
            seen.append(weakref.ref(logits))
            raise MemoryError
        return sample(scheduled, logits)

    monkeypatch.setattr(rig.engine.runner, "sample", failing)
    ask_all(rig, "faulty")
    rig.run()
    assert len(seen) == 3
    assert all(len(rig.tokens(f"faulty{i}")) == 12 for i in range(len(NAMES)))


# planning


@pytest.mark.parametrize("what", ["allocate", "take_prefix"])
@pytest.mark.parametrize("call", [1, 4, 9])
def test_planning_that_is_interrupted_anywhere_goes_on_from_there(
    what: str, call: int, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    """Few blocks, so that sequences are preempted, too: all run at once, since their adapters are there already."""
    rig = build_rig(load(tiny_llama_dir), adapters, kernel=available_kernels[-1], num_blocks=24)
    expected = build_rig(load(tiny_llama_dir), adapters, kernel=available_kernels[-1], num_blocks=24)
    manager = rig.scheduler.blocks
    real, count = getattr(manager, what), iter(range(1, 10**6))

    def interrupted(*args: Any) -> Any:
        if next(count) in (call, call + 7):
            raise OSError("interrupted")
        return real(*args)

    for each in (rig, expected):
        for name in ("tuned", "other"):
            each.add(f"before-{name}", [3], name, max_tokens=1)
        each.run()
    setattr(manager, what, interrupted)
    for each in (rig, expected):
        ask_all(each, "r")
        each.run()
        check_nothing_is_held(each)
        each.close()
    assert expected.scheduler.num_preemptions
    failed = [i for i in range(len(NAMES)) if rig.outputs[f"r{i}/0"][-1].error is not None]
    assert not failed
    if rig.is_exact:
        assert all(rig.tokens(f"r{i}") == expected.tokens(f"r{i}") for i in range(len(NAMES)) if i not in failed)


@pytest.mark.parametrize("calls", [(1,), (1, 2)])
def test_planning_that_fails_for_nobody_ends_nothing(calls: tuple[int, ...], rig: Rig, faults: Faults) -> None:
    faults.after("schedule", *calls)
    assert rig.step() == []
    assert faults.counted == [("schedule", "retried")]
    rig.add("later", PROMPTS[0], max_tokens=3)
    rig.run()
    assert len(rig.tokens("later")) == 3


def test_planning_that_fails_once_more_when_the_last_sequence_has_failed_ends_nothing(rig: Rig, faults: Faults) -> None:
    rig.add("only", PROMPTS[0])
    faults.of("schedule", "only")
    faults.after("schedule", 5)  # two plans, one of nobody, one of it alone, and then the one without it
    rig.run()
    assert isinstance(rig.outputs["only/0"][-1].error, SequenceFailed)
    assert faults.calls["schedule"] >= 5
    faults.clear()
    rig.add("later", PROMPTS[0], max_tokens=3)
    rig.run()
    assert len(rig.tokens("later")) == 3


def test_an_adapter_that_cannot_be_asked_for_fails_its_own_sequences(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = rig.tiers.acquire

    def broken(ref: Any, *rest: Any) -> int | None:
        if ref.name == "other":
            raise KeyError("lost")
        return acquire(ref, *rest)

    monkeypatch.setattr(rig.tiers, "acquire", broken)
    ask_all(rig, "r")
    rig.run()
    for i, name in enumerate(NAMES):
        assert isinstance(rig.outputs[f"r{i}/0"][-1].error, SequenceFailed) == (name == "other")
    check_nothing_is_held(rig)


# logits that are no numbers


@pytest.mark.parametrize("kernel", available_kernels)
def test_logits_that_are_no_numbers_end_their_own_sequence_with_an_error(
    kernel: str, tiny_llama_dir: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = make_adapter_that_spoils(tiny_llama_dir, tmp_path / "bad", 77)
    rig = build_rig(load(tiny_llama_dir), {"bad": folder, "other": adapters["other"]}, kernel=kernel, num_blocks=120)
    faults = Faults(rig).install()
    for i, (prompt, name) in enumerate([([5, 77, 6], "bad"), ([5, 76, 6], "bad"), ([5, 77, 6], None)]):
        rig.add(f"r{i}", prompt, name)
        rig.add(f"scored{i}", prompt, name, max_tokens=0, prompt_logprobs=3)
    # The first token of output is the one that spoils.
    rig.add("later", [5, 76, 6], "bad", logit_bias=((77, 100.0),))
    rig.run()
    for request_id in ("r0", "scored0"):
        (only,) = rig.outputs[f"{request_id}/0"]
        assert isinstance(only.error, AdapterNotFinite)
        assert (only.error.status, only.error.code) == (500, "adapter_not_finite")
        assert "bad" in only.error.message
    for i in (1, 2):
        assert len(rig.tokens(f"r{i}")) == 16
        assert len(scores(rig, f"scored{i}")) == 3
    assert rig.tokens("later") == [77]
    assert isinstance(rig.outputs["later/0"][-1].error, AdapterNotFinite)
    assert faults.spoiled == ["bad"] * 3
    for mix in ({"bad": 1.0, "other": 0.5}, {"bad": 2.0}):  # what somebody made of it may be its maker's fault
        rig.add("mixed", [5, 77, 6], mix)
        rig.run()
        assert isinstance(rig.outputs["mixed/0"][-1].error, AdapterNotFinite)
    assert faults.spoiled == ["bad"] * 3
    assert not faults.counted
    check_nothing_is_held(rig)
    rig.close()


def test_a_base_whose_logits_are_no_numbers_is_said_to_be_the_cause(tiny_llama_dir: Path) -> None:
    rig = build_rig(load(tiny_llama_dir), kernel=available_kernels[-1])
    forward = rig.engine.runner.forward
    rig.engine.runner.forward = lambda scheduled: forward(scheduled) * float("inf")  # type: ignore[method-assign]
    rig.add("r", [1, 2, 3], temperature=0.0)
    rig.run()
    error = rig.outputs["r/0"][-1].error
    assert isinstance(error, ModelNotFinite)
    assert error.code == "model_not_finite"


# token ids without an embedding


@pytest.mark.parametrize("kernel", available_kernels)
def test_no_token_without_an_embedding_is_sampled(kernel: str, tmp_path: Path) -> None:
    """Of a head with more rows than the embedding, the rows beyond are no tokens: the next step could not run them."""
    folder = make_tiny_model("llama", tmp_path / "wide")
    model = load(folder)
    head = model.get_output_embeddings()
    wide = torch.nn.Linear(head.in_features, head.out_features + 40, bias=False)
    with torch.no_grad():
        wide.weight[: head.out_features] = head.weight
        wide.weight[head.out_features :] = head.weight[:40] * 3
    model.set_output_embeddings(wide)
    rig, narrow = build_rig(model, kernel=kernel), build_rig(load(folder), kernel=kernel)
    for each in (rig, narrow):
        for i in range(4):
            each.add(f"r{i}", [i, 7, 9], temperature=1.0 * (i % 2), seed=i, logprobs=5, prompt_logprobs=5)
        each.run()
    assert rig.wrapped.vocab_size == narrow.wrapped.vocab_size == head.out_features
    for i in range(4):
        assert rig.tokens(f"r{i}") == narrow.tokens(f"r{i}")
        assert all(t < head.out_features for entry in scores(rig, f"r{i}") for t, _ in entry.top)
