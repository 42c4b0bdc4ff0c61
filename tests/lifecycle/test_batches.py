from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.lifecycle.base import accepts_logits_to_keep, load_base
from manylora.lifecycle.data.batches import answer_nll, collate, epoch_order
from manylora.lifecycle.data.data import Example, Message
from manylora.lifecycle.data.encoding import Encoded
from tests.conftest import ModelMaker


def _encoded(ids: list[int], num_prompt: int) -> Encoded:
    example = Example(1, (Message("user", "q"), Message("assistant", "a")))
    return Encoded(example, tuple(ids), tuple(i >= num_prompt for i in range(len(ids))))


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_visits_every_example_once_in_full_batches(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    batches = epoch_order(lengths, batch_size, seed=seed, epoch=epoch)

    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert len(batches) <= -(-len(lengths) // batch_size) + len(lengths) // (batch_size * 32)
    assert batches == epoch_order(lengths, batch_size, seed=seed, epoch=epoch)


def test_epochs_and_seeds_have_different_orders() -> None:
    lengths = list(range(1, 65))

    orders = {str(epoch_order(lengths, 8, seed=s, epoch=e)) for s in range(2) for e in range(2)}

    assert len(orders) == 4


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_answer_loss_of_a_padded_batch_is_each_example_alone(tiny_model_dir: ModelMaker, architecture: str) -> None:
    base = load_base(str(tiny_model_dir(architecture)), device="cpu", dtype="float32")
    examples = [_encoded([5, 9, 30, 44, 2], 3), _encoded([7, 2], 1), _encoded(list(range(40, 60)), 4)]
    batch = collate(examples, pad_id=base.pad_id, device=base.device)

    with torch.inference_mode():
        sums = answer_nll(base.model, batch, keeps_logits=accepts_logits_to_keep(base.model)).sum(1)

    for example, found in zip(examples, sums, strict=True):
        with torch.inference_mode():
            logprobs = base.model(torch.tensor([example.ids])).logits[0].float().log_softmax(-1)
        wanted = -sum(logprobs[i - 1, example.ids[i]] for i in range(1, len(example)) if example.is_answer[i])
        torch.testing.assert_close(found, torch.as_tensor(wanted), rtol=1e-4, atol=1e-4)
    assert batch.num_targets == sum(e.num_answer_tokens for e in examples)


def test_kept_logits_do_not_change_the_loss(tiny_llama_dir: Path) -> None:
    base = load_base(str(tiny_llama_dir), device="cpu", dtype="float32")
    batch = collate([_encoded([5, 9, 30, 44, 2], 3), _encoded([7, 2], 1)], pad_id=0, device=base.device)

    with torch.inference_mode():
        torch.testing.assert_close(
            answer_nll(base.model, batch, keeps_logits=True), answer_nll(base.model, batch, keeps_logits=False)
        )
