"""TRL's own loss on the pairs of `test_preferences`, recorded in `trl_dpo.json` for where TRL is not installed.

    pip install --target build/trl --no-deps trl datasets dill multiprocess xxhash pandas
    PYTHONPATH=build/trl python -m tests.lifecycle.trl_dpo

TRL's trainer wraps the base itself, so that its reference is the base; weights are set by a formula, on either side,
and no dropout is on. What is recorded of a gradient is the length of each parameter's.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from manylora.lifecycle.base import load_base
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.train.train import add_lora
from tests.lifecycle.helpers import tiny_config, write_rows
from tests.tiny_models import make_tiny_model

RECORDED: Final = Path(__file__).with_suffix(".json")


def set_weights(model: torch.nn.Module) -> None:
    """The same on every machine: no draw decides them."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            places = torch.arange(parameter.numel(), dtype=torch.float64).view_as(parameter)
            wave = torch.sin((places + 1) ** 1.5 * 0.37 + number)
            parameter.copy_(1 + wave * 0.1 if "norm" in name else wave * 0.2)


def as_trl(pairs: Sequence[Encoded]) -> list[dict[str, Any]]:
    """Pairs as TRL has them: the prompt's tokens and either answer's."""
    found = []
    for one in pairs:
        assert one.rejected is not None
        found.append({
            "prompt_ids": list(one.prompt_ids),
            "chosen_ids": list(one.ids[one.first_answer :]),
            "rejected_ids": list(one.rejected.ids[one.rejected.first_answer :]),
        })  # fmt: skip
    return found


def main() -> None:
    import trl
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from tests.lifecycle.test_preferences import BETA, ROWS, trainer_of

    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(Path(folder) / "train.jsonl", ROWS)
        base_dir = make_tiny_model("llama", Path(folder) / "base")
        config = replace(tiny_config(data, Path(folder) / "out", base_dir), method="dpo", beta=BETA)
        ours = trainer_of(config)
        pairs = as_trl(list(ours._train))
        base = load_base(config.base, device="cpu", dtype="float32")
        lora = add_lora(load_base(config.base, device="cpu", dtype="float32"), config.lora).peft_config["default"]
        asked = trl.DPOConfig(
            output_dir=folder, beta=BETA, bf16=False, use_cpu=True, report_to=[], disable_dropout=True,
            gradient_checkpointing=False, max_steps=1,
        )  # fmt: skip
        # It wants rows of its own, and a stream of them has no fingerprint to compute.
        rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]).to_iterable_dataset()
        theirs = trl.DPOTrainer(
            base.model, args=asked, train_dataset=rows, processing_class=base.tokenizer, peft_config=lora,
        )  # fmt: skip
        set_weights(theirs.model)
        theirs.model.eval()
        loss = theirs.compute_loss(theirs.model, DataCollatorForPreference(pad_token_id=base.pad_id)(pairs))
        torch.autograd.backward(loss)
        lengths = {n: float(p.grad.norm()) for n, p in theirs.model.named_parameters() if p.grad is not None}
        told = {name: values[-1] for name, values in theirs._metrics["eval"].items()}
    recorded = {
        "trl": trl.__version__, "beta": BETA, "pairs": pairs, "loss": float(loss.detach()),
        "margin": told["rewards/margins"], "gradient": lengths,
    }  # fmt: skip
    RECORDED.write_text(json.dumps(recorded) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
