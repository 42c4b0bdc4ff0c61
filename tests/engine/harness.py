"""A whole engine on a tiny model, stepped by hand, for tests that compare it with Hugging Face and PEFT."""

import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from manylora.engine.block_manager import BlockManager
from manylora.engine.drafting import Drafter
from manylora.engine.engine import Engine, Output
from manylora.engine.executor import Executor, LocalExecutor
from manylora.engine.interface import AdapterRef, Mix, SamplingParams
from manylora.engine.model_runner import ModelRunner
from manylora.engine.pieces import Pieces
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Sequence
from manylora.grammars.compiler import GrammarCompiler
from manylora.grammars.vocabulary import Vocabulary
from manylora.identity import CONFIG_FILE
from manylora.kernels import native
from manylora.kernels.batch import Batch
from manylora.lora.format.reader import Adapter, read_trusted
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.packing import KeepAs, PackedAdapter, pack
from manylora.lora.memory.slots import SlotBook
from manylora.lora.memory.tiers import AdapterTiers
from manylora.models import fused
from manylora.models.backends import Backend, choose
from manylora.models.checkpoint import load_tokenizer
from manylora.models.codec import HuggingFaceCodec
from manylora.models.kv_cache import KVCache
from manylora.models.layers import LayerParts
from manylora.models.loading import load_base
from manylora.models.selfcheck import SelfCheck
from manylora.models.wrapping import WrappedModel, wrap
from manylora.settings import Settings
from tests.tiny_models import END_OF_TURN, VOCAB_SIZE


class OwnLayers:
    """`LayerKernel` that takes the place of none: the model's own layers stay."""

    def begin(self, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> None: ...

    def layer(self, parts: LayerParts, keys: torch.Tensor, values: torch.Tensor) -> None: ...


def backends_here() -> dict[str, Backend]:
    """`torch` and `fused`: as a server has them, without and with the C++ kernels; `native`: the model's own layers."""
    found = {"torch": choose(Settings(device="cpu", kernels="torch"))}
    if native.is_available():
        cpp = choose(Settings(device="cpu"))
        found |= {"native": replace(cpp, layers=OwnLayers()), "fused": cpp}
    return found


BACKENDS = backends_here()
TORCH = BACKENDS["torch"]
PIECE_SIZE = 8  # of prompts, where layers keep a state
available_kernels = list(BACKENDS)


def load(folder: Path, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> PreTrainedModel:
    """The base as a server loads it: whatever the server would refuse, no test can serve."""
    return load_base(Settings(model=str(folder), device="cpu", dtype=dtype)).model


def grammars_of(folder: Path, num_rows: int = VOCAB_SIZE) -> GrammarCompiler:
    """A compiler for the model in `folder`, as a server has it."""
    tokenizer = load_tokenizer(folder)
    codec = HuggingFaceCodec(tokenizer, [END_OF_TURN])
    encode = partial(codec.encode, add_special_tokens=False)
    return GrammarCompiler(lambda: Vocabulary(codec.compiled_json(), num_rows, (END_OF_TURN,)), encode, 2**28)


@dataclass
class Rig:
    """The parts of a running engine, and what it has produced. `logits`: the last step's, when recorded."""

    engine: Engine
    scheduler: Scheduler
    tiers: AdapterTiers
    wrapped: WrappedModel
    refs: dict[str, AdapterRef]
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    loaded: threading.Event = field(default_factory=threading.Event)
    is_exact: bool = False  # a row is the same to the last bit in any batch

    def add(
        self,
        request_id: str,
        prompt: Iterable[int],
        adapter: str | Mapping[str, float] | None = None,
        *,
        tenant: str | None = None,
        **params: object,
    ) -> Sequence:
        """Queue a request, for an adapter or for several with a weight each, of a tenant of the same name unless told.

        `params` are SamplingParams' fields, greedy and 16 tokens unless told.
        """
        options = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True, **params}
        sampling = SamplingParams(**options)  # type: ignore[arg-type]
        if adapter is None or isinstance(adapter, str):
            mix = Mix.of(self.refs[adapter] if adapter else None)
        else:
            mix = Mix.weighted((self.refs[name], weight) for name, weight in adapter.items())
        seqs = [
            Sequence(request_id, list(prompt), sampling, index=i, adapter=mix, tenant=tenant or mix.name or "public")
            for i in range(sampling.n)
        ]
        for seq in seqs:
            seq.seed = seqs[0].seed
        seqs[0].followers = seqs[1:]
        self.engine.add(seqs[0])
        return seqs[0]

    def bring_in(self) -> None:
        """Have every adapter on the device: who runs beside whom does not rest on how long loads take, then."""
        for ref in self.refs.values():
            while self.tiers.acquire(ref) is None:
                self.loaded.wait(5)
                self.loaded.clear()
            self.tiers.release(ref)

    def step(self) -> list[Output]:
        outputs = self.engine.step()
        for output in outputs:
            self.outputs.setdefault(f"{output.seq.request_id}/{output.seq.index}", []).append(output)
        self.scheduler.check_integrity()
        self.tiers.check_integrity()
        if not self.engine.made_progress and self.engine.has_work:
            self.loaded.wait(5)
            self.loaded.clear()
        return outputs

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine did not finish")

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return [t for o in self.outputs[f"{request_id}/{index}"] for t in o.delta.token_ids]

    def text(self, request_id: str, index: int = 0) -> str:
        return "".join(o.delta.text for o in self.outputs[f"{request_id}/{index}"])

    def close(self) -> None:
        self.engine.close()
        self.tiers.close()


def done_to_prompts(folder: Path) -> tuple[int, tuple[int, ...]]:
    """An adapter's virtual tokens and those that invoke it, as its config says."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    return config.get("num_virtual_tokens") or 0, tuple(config.get("alora_invocation_tokens") or ())


def packer_of(wrapped: WrappedModel, keep: KeepAs) -> Callable[[Adapter], PackedAdapter]:
    def packer(adapter: Adapter) -> PackedAdapter:
        dtype = keep.dtype_of(adapter)
        return pack(adapter, wrapped.sites, dtype, base=wrapped.served.__getitem__, has_scales=keep.has_scales(dtype))

    return packer


def checked_model(
    model: PreTrainedModel, backend: Backend, num_blocks: int, block_size: int, *, poison: bool
) -> tuple[WrappedModel, KVCache]:
    wrapped = wrap(model, backend)
    dtype = backend.cache_dtype(model.dtype)
    cache = KVCache(wrapped.survey.kv_shapes, num_blocks, block_size, dtype, torch.device("cpu"))
    if poison:
        for room in (*cache.keys, *cache.values):
            room.fill_(float("nan") if dtype.is_floating_point else -1)  # which as a scale is NaN as well
    wrapped.attach_cache(cache)
    check = SelfCheck(wrapped, cache)
    fused.exchange(wrapped, check.proven(fused.candidates(wrapped, cache)))
    check.check()
    return wrapped, cache


def refs_of(adapters: Mapping[str, Path]) -> dict[str, AdapterRef]:
    """Each public, in its first version, and with what its config says that it does to prompts."""
    return {
        name: AdapterRef(f"id-{name}", "public", name, 1, name, *done_to_prompts(folder))
        for name, folder in adapters.items()
    }


def _tiers(
    wrapped: WrappedModel,
    book: SlotBook,
    memory: DeviceMemory,
    adapters: Mapping[str, Path],
    keep: KeepAs,
    loaded: threading.Event,
) -> AdapterTiers:
    folders = {f"id-{name}": folder for name, folder in adapters.items()}
    return AdapterTiers(
        book,
        memory,
        host_bytes=2**28,
        read=lambda ref: read_trusted(folders[ref.id], wrapped.modules),
        pack=packer_of(wrapped, keep),
        on_change=loaded.set,
    )


def build_rig(
    model: PreTrainedModel,
    adapters: Mapping[str, Path] | None = None,
    *,
    kernel: str | Backend = "torch",
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 48,
    max_prompt_logits: int | None = None,
    prefix_cache: bool = True,
    num_slots: int = 64,
    slot_bytes: int = 2**28,
    decode: Callable[..., str] | None = None,
    poison: bool = True,
    eos_ids: frozenset[int] = frozenset(),
    keep_as: KeepAs | None = None,
    drafter: Drafter | None = None,
    num_snapshots: int = 16,
    executor: Callable[[Executor], Executor] = lambda local: local,
) -> Rig:
    """An engine whose cache starts out full of NaN, so that reading a position nobody wrote shows at once."""
    backend = kernel if isinstance(kernel, Backend) else BACKENDS[kernel]
    wrapped, cache = checked_model(model, backend, num_blocks, block_size, poison=poison)
    keep = keep_as or KeepAs(model.dtype, model.dtype)
    book = SlotBook(num_slots, slot_bytes, backend.lora.places_per_slab)
    memory = DeviceMemory(len(wrapped.modules), num_slots, torch.device("cpu"))
    pieces = Pieces(PIECE_SIZE, wrapped.survey.continues) if wrapped.states else None
    loaded = threading.Event()
    tiers = _tiers(wrapped, book, memory, adapters or {}, keep, loaded)
    blocks = BlockManager(
        num_blocks,
        block_size,
        share_prefixes=prefix_cache,
        num_states=max_num_seqs if wrapped.states else 0,
        border=math.lcm(PIECE_SIZE, block_size),
        num_snapshots=num_snapshots if wrapped.states else 0,
    )
    scheduler = Scheduler(
        blocks,
        tiers,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_prompt_logits=max_prompt_logits,
        drafter=drafter,
        num_kept=memory.num_kept,
        pieces=pieces,
    )
    engine = Engine(
        scheduler,
        ModelRunner(executor(LocalExecutor(wrapped, cache, memory, backend.lora)), pieces=pieces),
        decode=decode or (lambda ids: "".join(chr(0x4E00 + i) for i in ids)),
        eos_ids=eos_ids,
        max_model_len=num_blocks * block_size,
    )
    refs = refs_of(adapters or {})
    return Rig(engine, scheduler, tiers, wrapped, refs, loaded=loaded, is_exact=backend is not TORCH)
