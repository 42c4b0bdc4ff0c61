"""A model folder through the product's own front door, and what came out, beside transformers and PEFT in float32."""

import copy
import functools
import json
import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig

from manylora.engine.build import EngineBuilder
from manylora.engine.engine import Engine
from manylora.engine.interface import AdapterRef, SamplingParams
from manylora.engine.sequence import Sequence
from manylora.errors import InvalidAdapter, ModelUnusable
from manylora.lora.format import reader as adapter_format
from manylora.lora.memory.tiers import AdapterTiers
from manylora.metrics import NoMetrics
from manylora.models.checkpoint import auto_class
from manylora.models.loading import load_base
from manylora.models.modules import adaptable_modules, is_plain
from manylora.models.text_part import put_aside
from manylora.settings import Settings
from tests.engine.oracle import NEAR_TIE
from tests.models.zoo import NO_EXPERTS, NOT_ADAPTED, Unbuildable, make_zoo_model, what_runs
from tests.tiny_adapters import write_adapter

LENGTHS = (5, 27, 90)
NUM_ANSWERED = 3
TOLERANCE = 1e-3  # root mean square of the logits' difference, as a share of their spread


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's prompt, its logits [tokens, vocab], and the tokens that followed."""

    prompt: list[int]
    logits: torch.Tensor
    tokens: list[int]


class _Folders:
    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders

    def local_folder(self, ref: AdapterRef) -> Path:
        return self._folders[ref.name]


def settings_for(folder: Path, **values: Any) -> Settings:
    return Settings(
        **{
            "model": str(folder),
            "device": "cpu",
            "dtype": "float32",
            "kv_cache_memory": 2**25,
            "max_num_batched_tokens": 32,
            "max_num_seqs": 16,
            "block_size": 4,
            **values,
        }
    )


def start(settings: Settings, adapters: Mapping[str, Path]) -> tuple[EngineBuilder, Engine, AdapterTiers]:
    """The base loaded, wrapped and checked, and an engine around it. Raises StartupError."""
    builder = EngineBuilder(settings, load_base(settings))
    return (builder, *builder.build_core(_Folders(adapters), NoMetrics()))


def prompts(vocab: int = 300, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(4, vocab, (length,), generator=random).tolist() for length in lengths]


def answer_all(
    folder: Path, adapters: Mapping[str, Path], asked: list[list[int]], **values: Any
) -> dict[tuple[str | None, int], Answer]:
    """Every prompt with every adapter and without one, in one mixed batch, by (adapter, prompt's number).

    Raises StartupError for a base, and InvalidAdapter for an adapter, that is refused.
    """
    settings = settings_for(folder, **values)
    builder, engine, tiers = start(settings, adapters)
    for path in adapters.values():
        adapter_format.read(path, builder.modules, max_rank=settings.max_rank, max_size=2**30)
    asked = [prompt[: builder.context_length - NUM_ANSWERED] for prompt in asked]
    captured: dict[Sequence, torch.Tensor] = {}
    seqs: dict[tuple[str | None, int], Sequence] = {}
    params = SamplingParams(max_tokens=NUM_ANSWERED, temperature=0.0, ignore_eos=True)
    for name in (None, *adapters):
        ref = AdapterRef(f"id-{name}", "public", name, 1, name) if name else None
        for number, prompt in enumerate(asked):
            seq = Sequence(f"{name}-{number}", list(prompt), params, adapter=ref, capture_logits=True)
            seqs[name, number] = seq
            engine.add(seq)
    try:
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                if output.captured is not None:
                    captured[output.seq] = torch.from_numpy(output.captured)
            if not engine.made_progress:
                threading.Event().wait(0.01)
    finally:
        tiers.close()
    return {key: Answer(asked[key[1]], captured[seq], seq.tokens[seq.num_prompt_tokens :]) for key, seq in seqs.items()}


class Oracle:
    """The model in `folder` as transformers and PEFT run it in float32: loaded once, and copied for each adapter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[Path | None, Any] = {}

    @functools.cached_property
    def _base(self) -> Any:
        auto = auto_class(AutoConfig.from_pretrained(self._folder))
        return auto.from_pretrained(self._folder, dtype=torch.float32).eval()

    def copy(self) -> Any:
        """The model by itself, for whoever changes it. Raises ValueError where transformers does not load it."""
        return copy.deepcopy(self._base)

    def running(self, adapter: Path | None) -> Any:
        """What runs with that adapter, or without one. Raises ValueError for an adapter that PEFT does not read."""
        if adapter not in self._running:
            self._running[adapter] = what_runs(self._base) if adapter is None else self._tuned(adapter)
        return self._running[adapter]

    def _tuned(self, adapter: Path) -> Any:
        model = self.copy()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tuned = PeftModel.from_pretrained(model, adapter).eval()
        if any("missing adapter keys" in str(each.message) for each in said):
            raise ValueError("PEFT does not read its own file again")
        return tuned if what_runs(model) is model else what_runs(model)


def make_adapters(folder: Path, oracle: Oracle | None = None) -> dict[str, Path]:
    """Adapters written by PEFT for the model in `folder`, beside it: `linear` on every linear, `ends` on the embedding
    and the head, `experts` on the parameters of a mixture's experts and routers. Without those that PEFT cannot make:
    it knows no linears with a forward of their own, and no Mamba.
    """
    oracle = oracle or Oracle(folder)
    try:
        model = oracle.copy()
    except ValueError:  # a part of a larger model, which transformers saves and does not load by itself
        return {}
    put_aside(model)
    head = model.get_output_embeddings()
    left = NOT_ADAPTED.get(model.config.model_type, ())
    linears, ends = [], []
    for path, spec in adaptable_modules(model).items():
        module = model.get_submodule(path)
        if spec.kind == "embedding" or (module is head and module.bias is None):
            ends.append(path)
        elif module is not head and is_plain(module) and not path.endswith(left):
            linears.append(path)
    # Of mixtures of experts PEFT makes adapters of bare parameters as soon as a feed-forward layer is named.
    narrow = [path for path in linears if "attn" in path or "attention" in path]
    others = [path for path in linears if not path.endswith("out_proj")]  # which PEFT leaves alone beside Mamba
    found: dict[str, Path] = {}
    for name, choices in (("linear", (linears, others, narrow)), ("ends", (ends,))):
        for number, targets in enumerate(choices):
            if targets in choices[:number]:
                continue
            target = folder.parent / f"{name}-{number}"
            try:
                write_adapter(oracle.copy(), target, rank=4, seed=1, targets=targets)
                oracle.running(target)
            except ValueError:
                continue
            if not json.loads((target / "adapter_config.json").read_text()).get("target_parameters"):
                found[name] = target
                break
    is_none = model.config.model_type in NO_EXPERTS
    parameters = [] if is_none else expert_parameters(model)
    has_experts = any(path.endswith("experts") for path, _ in model.named_modules())
    assert is_none or bool(parameters) == has_experts, "which parameters are its experts'?"
    if parameters:
        target = folder.with_name("experts")
        write_adapter(oracle.copy(), target, rank=2, seed=2, targets=[], target_parameters=parameters)
        found["experts"] = target
    return found


def expert_parameters(model: Any) -> list[str]:
    """What of a mixture an adapter's `target_parameters` can name: experts' weights and the routers beside them."""
    stacked = [
        name
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(path, recurse=False)
        if weight.dim() == 3 and len(weight) > 3 and not isinstance(module, torch.nn.Conv1d)
    ]
    owners = {name.rpartition(".")[0].rpartition(".")[0]: len(model.get_parameter(name)) for name in stacked}
    routers = [
        f"{owner}.{name}.weight"
        for owner, count in owners.items()
        for name, module in model.get_submodule(owner).named_children()
        for weight in [getattr(module, "weight", None)]
        if weight is not None and weight.dim() == 2 and len(weight) == count
    ]
    return [*stacked, *routers]


@torch.inference_mode()
def difference(model: Any, answer: Answer) -> str | None:
    """What differs from the oracle, in words; None where nothing does."""
    whole = [*answer.prompt, *answer.tokens]
    logits = model(input_ids=torch.tensor([whole])).logits[0].float()
    length = len(answer.prompt)
    apart = float((answer.logits - logits[:length]).square().mean().sqrt() / logits[:length].std())
    if not apart <= TOLERANCE:
        return f"logits of {length} tokens differ by {apart:.3g} of their spread"
    for step, token in enumerate(answer.tokens):
        row = logits[length - 1 + step]
        if not float(row.max() - row[token]) <= NEAR_TIE * float(row.std()):
            return f"token {step} after {length} is {token}, not {int(row.argmax())}"
    return None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the server makes of a model; `detail` says why.

    `kind`: served, refused, not built (by transformers); or, which must not be: wrong, crashed, adapter refused.
    """

    kind: str
    detail: str = ""


def try_model(folder: Path, adapters: Mapping[str, Path], oracle: Oracle | None = None, **values: Any) -> Outcome:
    oracle = oracle or Oracle(folder)
    try:
        answers = answer_all(folder, adapters, prompts(), **values)
    except ModelUnusable as error:
        return Outcome("refused", without_numbers(str(error), folder))
    except InvalidAdapter as error:
        return Outcome("adapter refused", str(error))
    except Exception as error:  # noqa: BLE001 - told apart from a refusal
        return Outcome("crashed", f"{type(error).__name__}: {error}")
    for name in (None, *adapters):
        model = oracle.running(adapters[name] if name else None)
        for (whose, number), answer in answers.items():
            if whose == name and (what := difference(model, answer)):
                return Outcome("wrong", f"{name}, prompt {number}: {what}")
    return Outcome("served")


def try_type(model_type: str, folder: Path, *, sees: bool = False, **values: Any) -> Outcome:
    """A tiny model of a type, made in `folder`, with its adapters; with `sees` the one of images and text."""
    try:
        make_zoo_model(model_type, folder / "base", sees=sees)
    except Unbuildable as error:
        return Outcome("not built", str(error))
    oracle = Oracle(folder / "base")
    return try_model(folder / "base", make_adapters(folder / "base", oracle), oracle, **values)


def without_numbers(message: str, folder: Path) -> str:
    """A refusal without what differs from machine to machine: figures in brackets, the folder's name."""
    return re.sub(r" \(logits differ[^)]*\)", "", message).replace(str(folder), "The folder")
