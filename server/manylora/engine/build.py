"""From settings to a running engine: the base is loaded, wrapped and checked, memory is laid out."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from manylora.engine.async_engine import AsyncEngine
from manylora.engine.block_manager import BlockManager
from manylora.engine.engine import Engine
from manylora.engine.executor import LocalExecutor
from manylora.engine.heads import HeadReader
from manylora.engine.interface import AdapterSource, ModelInfo, Pooling, TextCodec
from manylora.engine.lookup import LookupDrafter
from manylora.engine.model_runner import ModelRunner
from manylora.engine.pieces import Pieces
from manylora.engine.recovery import FaultEvents
from manylora.engine.room import Pace, PromptCost
from manylora.engine.scheduler import Scheduler
from manylora.errors import InvalidSettings, ModelUnusable, NotEnoughMemory
from manylora.grammars.compiler import GrammarCompiler, GrammarEvents
from manylora.grammars.masks import MaskMaker
from manylora.grammars.vocabulary import Vocabulary
from manylora.identity import AdapterRef, Tier
from manylora.log import get_logger
from manylora.lora.format.encoders import HeadedModules
from manylora.lora.format.heads import HeadPlan
from manylora.lora.format.reader import Adapter, read_trusted
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.occupancy import Occupancy
from manylora.lora.memory.packing import KeepAs, PackedAdapter, pack
from manylora.lora.memory.slots import SlotBook
from manylora.lora.memory.tiers import AdapterTiers, TierEvents
from manylora.metrics import Metrics
from manylora.models import fused
from manylora.models.backends import Backend, free_bytes
from manylora.models.heads import decoder_heads
from manylora.models.kv_cache import KVCache, bytes_per_block
from manylora.models.loading import LoadedBase
from manylora.models.modules import first_position
from manylora.models.positions import UNSTATED_LIMIT, batch_limit, position_limit
from manylora.models.selfcheck import SelfCheck
from manylora.models.served_base import ServedModule
from manylora.models.wrapping import WrappedModel, wrap
from manylora.settings import Settings

NUM_LOADERS = 8  # adapters read at a time, of one tenant half as many: files that come slowly hold up nobody else
_log = get_logger("manylora.engine")
_ATTENTION_RATE = (
    0.55  # multiplications per second of a prompt's attention, over those of matmuls; measured in bfloat16
)
_MOST_IN_PIECE = 64  # tokens of a prompt that a layer with a state runs at once: what chunked recurrences are made for
_SHARE_OF_SNAPSHOTS = 0.25  # of the cache's memory, for copies of states
MOST_OF_FREE = 0.5  # memory that one sequence may take where the cache's share of it would be less


class BaseCodec(TextCodec, Protocol):
    """What the engine needs of a base's tokenizer beside the API."""

    eos_ids: frozenset[int]

    def compiled_json(self) -> str | None:
        """All of a compiled tokenizer as JSON; None where there is none."""
        ...

    def faults(self, vocab_size: int) -> list[str]:
        """What is to be said of it at the start."""
        ...


class Base(Protocol):
    """A base in memory, of whatever kind."""

    @property
    def model(self) -> Any: ...

    @property
    def codec(self) -> BaseCodec: ...

    @property
    def backend(self) -> Backend: ...


class _TierMetrics(TierEvents):
    def __init__(self, metrics: Metrics, occupancy: Occupancy) -> None:
        self._metrics = metrics
        self._occupancy = occupancy

    def on_load(self, ref: AdapterRef, tier: Tier, seconds: float) -> None:
        self._metrics.observe_adapter_load(ref.tenant, ref.name, tier, seconds)

    def on_failure(self, ref: AdapterRef) -> None:
        self._metrics.count_load_failure(ref.tenant, ref.name)

    def on_eviction(self, ref: AdapterRef, tier: Tier) -> None:
        self._metrics.count_eviction(ref.tenant, ref.name, tier)

    def on_enter(self, ref: AdapterRef) -> None:
        self._occupancy.enter(ref)

    def on_leave(self, ref: AdapterRef) -> None:
        self._occupancy.leave(ref)


class FaultMetrics(FaultEvents):
    """Faults as metrics count them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def on_step_failure(self, phase: str, result: str) -> None:
        self._metrics.count_step_failure(phase, result)

    def on_not_finite(self, ref: AdapterRef) -> None:
        self._metrics.count_not_finite(ref.tenant, ref.name)


class _GrammarMetrics(GrammarEvents):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def on_request(self, kind: str, is_known: bool) -> None:
        self._metrics.count_structured_request(kind, is_known)

    def on_compile(self, seconds: float, result: str) -> None:
        self._metrics.observe_grammar_compile(seconds, result)


class Builder:
    """What the engines of all kinds of models have in common.

    Builds in two steps, since the catalog must know the base's modules before the engine can ask it for files.
    """

    def __init__(self, settings: Settings, base: Base) -> None:
        self.settings = settings
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        self.backend = base.backend
        self.device = base.backend.device
        self.dtype: torch.dtype = base.model.dtype
        self._codec = base.codec

    def build_core(
        self, source: AdapterSource, metrics: Metrics, occupancy: Occupancy | None = None
    ) -> tuple[Engine, AdapterTiers]:
        """Lay out memory, check the model against itself, and put the parts together. Raises StartupError."""
        raise NotImplementedError

    def model_info(self) -> ModelInfo:
        """The base as callers see it."""
        raise NotImplementedError

    def build(self, source: AdapterSource, metrics: Metrics, occupancy: Occupancy | None = None) -> AsyncEngine:
        """The engine with its bridge to asyncio, not started yet. `occupancy` hears who is in a slot."""
        engine, tiers = self.build_core(source, metrics, occupancy)
        model = self.model_info()
        for fault in self._codec.faults(model.vocab_size):
            _log.warning("tokenizer", fault=fault)
        max_open = self.settings.max_num_seqs + self.settings.max_queue
        return AsyncEngine(
            engine,
            tiers,
            model,
            self._codec,
            self._grammars(metrics, model.vocab_size),
            max_open=max_open,
            tenant_share=self.settings.tenant_queue_share,
            before_step=self.backend.before_step,
        )

    def _memory(self, num_sites: int) -> DeviceMemory:
        return DeviceMemory(num_sites, self.settings.max_slots, self.device, self.backend.allocate)

    def _tiers(
        self,
        memory: DeviceMemory,
        read: Callable[[AdapterRef], Adapter],
        pack: Callable[[Adapter], PackedAdapter],
        metrics: Metrics,
        occupancy: Occupancy | None,
    ) -> AdapterTiers:
        settings = self.settings
        budget = in_bytes(settings.adapter_memory, self.device)
        book = SlotBook(settings.max_slots, budget, self.backend.lora.places_per_slab)
        return AdapterTiers(
            book,
            memory,
            host_bytes=in_bytes(settings.host_tier_memory, torch.device("cpu")),
            read=read,
            pack=pack,
            events=_TierMetrics(metrics, occupancy or Occupancy()),
            num_threads=NUM_LOADERS,
        )

    def _grammars(self, metrics: Metrics, vocab_size: int) -> GrammarCompiler:
        codec = self._codec
        return GrammarCompiler(
            lambda: Vocabulary(codec.compiled_json(), vocab_size, tuple(sorted(codec.eos_ids))),
            partial(codec.encode, add_special_tokens=False),
            in_bytes(self.settings.grammar_memory, torch.device("cpu")),
            _GrammarMetrics(metrics),
        )

    def _packer(
        self, sites: Mapping[str, int], served: Mapping[str, ServedModule]
    ) -> Callable[[Adapter], PackedAdapter]:
        backend = self.backend
        keep = KeepAs.choose(
            self.settings.lora_dtype,
            self.dtype,
            beside=backend.format.beside(self.dtype),
            mixes_dtypes=backend.lora.mixes_dtypes,
        )

        def packer(adapter: Adapter) -> PackedAdapter:
            dtype = keep.dtype_of(adapter)
            return pack(adapter, sites, dtype, base=served.__getitem__, has_scales=keep.has_scales(dtype))

        return packer

    def _dimensions(self, whole: int, config: object) -> tuple[int, ...]:
        """To how many numbers embeddings may be cut, as the settings and the model's config say."""
        wanted = self.settings.matryoshka_dimensions
        if max(wanted, default=0) > whole:
            raise InvalidSettings(f"matryoshka_dimensions: an embedding of this model has {whole} numbers.")
        stated = getattr(config, "matryoshka_dimensions", None) or ()
        return tuple(sorted({*wanted, *(int(size) for size in stated if 0 < int(size) <= whole)}))


class EngineBuilder(Builder):
    """The engine of a decoder."""

    def __init__(self, settings: Settings, base: LoadedBase) -> None:
        super().__init__(settings, base)
        self.base = base
        self.context_length = self._context_length()
        heads = decoder_heads(base.model, base.folder)
        self.wrapped: WrappedModel = wrap(base.model, base.backend, context_length=self.context_length)
        self._modules = HeadedModules(self.wrapped.modules, heads)

    @property
    def modules(self) -> HeadedModules:
        """What an adapter may touch, by path."""
        return self._modules

    def build_core(
        self, source: AdapterSource, metrics: Metrics, occupancy: Occupancy | None = None
    ) -> tuple[Engine, AdapterTiers]:
        """Lay out memory, check the model against itself, and put the parts together. Raises StartupError."""
        settings = self.settings
        pieces = self._pieces()
        num_snapshots = self._num_snapshots()
        cache = self._cache(num_snapshots)
        self.wrapped.attach_cache(cache)
        self._prove(cache)
        plans = self.modules.heads
        sites = with_heads(self.wrapped.sites, plans)
        memory = self._memory(len(sites))
        packer = self._packer(sites, self.wrapped.served)
        tiers = self._tiers(memory, self._reader(source), packer, metrics, occupancy)
        scheduler = Scheduler(
            BlockManager(
                cache.num_blocks,
                settings.block_size,
                share_prefixes=settings.prefix_cache,
                share_public=settings.prefix_sharing == "public",
                num_states=0 if pieces is None else settings.max_num_seqs,
                border=0 if pieces is None else math.lcm(pieces.size, settings.block_size),
                num_snapshots=num_snapshots,
                snapshot_bytes=self.wrapped.survey.state_bytes,
            ),
            tiers,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_prompt_logits=self._max_prompt_logits(),
            prompt_cost=self._prompt_cost(),
            pace=Pace(),
            # A state cannot take back tokens that turn out wrong.
            drafter=LookupDrafter(settings.draft_tokens) if settings.draft_tokens and pieces is None else None,
            pieces=pieces,
            num_kept=memory.num_kept,
        )
        engine = Engine(
            scheduler,
            ModelRunner(
                LocalExecutor(self.wrapped, cache, memory, self.backend.lora, HeadReader(memory, plans, sites)),
                pieces=pieces,
            ),
            decode=self.base.codec.decode,
            eos_ids=frozenset(self.base.codec.eos_ids),
            max_model_len=self.context_length,
            observe=metrics.observe_step,
            faults=FaultMetrics(metrics),
            masks=MaskMaker(self.base.codec.eos_ids),
        )
        return engine, tiers

    def _prove(self, cache: KVCache) -> None:
        """Check the model against itself: every fused layer before it takes a layer's place, then all together."""
        check = SelfCheck(self.wrapped, cache)
        candidates = fused.candidates(self.wrapped, cache)
        originals = fused.exchange(self.wrapped, check.proven(candidates))
        try:
            check.check()
        except ModelUnusable:
            if not originals:
                raise
            fused.exchange(self.wrapped, originals)
            check.check()
        self.wrapped.survey.probes.clear()  # tens of megabytes of logits, which nobody asks for any more

    def _reader(self, source: AdapterSource) -> Callable[[AdapterRef], Adapter]:
        modules = self.modules
        return lambda ref: read_trusted(source.local_folder(ref), modules)

    def _max_prompt_logits(self) -> int:
        """Of how many tokens of prompts a step may make the logits; of one at least."""
        per_token = self.wrapped.vocab_size * torch.float32.itemsize  # in which some models make them whatever they are
        return max(1, in_bytes(self.settings.prompt_logits_memory, self.device) // per_token)

    def _prompt_cost(self) -> PromptCost:
        """By the base's arithmetic: what attention multiplies for each position, beside what linears do for a token."""
        survey = self.wrapped.survey
        stated = getattr(self.base.model.config.get_text_config(), "num_attention_heads", None)
        linears = sum(
            spec.in_features * spec.out_features
            for spec in self.modules.values()
            if spec.kind != "embedding" and not spec.is_parameter and spec.path not in survey.on_logit_rows
        )
        heads = stated if isinstance(stated, int) else 0
        attention = sum(max(heads, s.num_heads) * (s.head_dim + s.value_dim) for s in survey.kv_shapes)
        if not attention:
            return PromptCost()
        return PromptCost(_ATTENTION_RATE * linears / attention, tuple(options.window for options in survey.options))

    def _context_length(self) -> int:
        own = position_limit(self.base.model.config)
        if own:
            own -= first_position(self.base.model)
        wanted = self.settings.max_model_len
        if own and wanted and wanted > own:
            raise InvalidSettings(f"max_model_len: {wanted} is more than the {own} positions the model is served with.")
        most = batch_limit(self.base.model.config)
        if most and self.settings.max_num_batched_tokens > most:
            raise InvalidSettings(f"max_num_batched_tokens: this model computes at most {most} tokens in one pass.")
        if not wanted and not own:
            _log.warning("context_length_assumed", tokens=UNSTATED_LIMIT, change_with="--max-model-len")
        return wanted or own or UNSTATED_LIMIT

    def _pieces(self) -> Pieces | None:
        """The pieces in which layers that keep states run prompts; None where no layer keeps one.

        A step has room for one beside a token of every other sequence, and for the logits of one, so that every prompt
        gets on.
        """
        survey = self.wrapped.survey
        if not survey.keepers:
            return None
        beside = max(1, self.settings.max_num_batched_tokens - self.settings.max_num_seqs)
        most = min(beside, self._max_prompt_logits())
        return Pieces(min(_MOST_IN_PIECE, 1 << (most.bit_length() - 1)), survey.continues)

    def _num_snapshots(self) -> int:
        """Copies of states that prompts with the same beginning share: in a part of what one sequence does not need.

        None where two modules keep theirs in one layer, as one has run a prompt's pieces before the other begins.
        """
        survey, settings = self.wrapped.survey, self.settings
        if not survey.state_bytes or len(set(survey.keepers.values())) < len(survey.keepers):
            return 0
        per_block = bytes_per_block(survey.kv_shapes, settings.block_size, self.backend.cache_dtype(self.dtype))
        needed = -(-self.context_length // settings.block_size) * per_block
        room = in_bytes(settings.kv_cache_memory, self.device) - self._states_bytes()
        return max(0, min(int(room * _SHARE_OF_SNAPSHOTS), room - needed)) // survey.state_bytes

    def _cache(self, num_snapshots: int = 0) -> KVCache:
        settings = self.settings
        shapes = self.wrapped.survey.kv_shapes
        dtype = self.backend.cache_dtype(self.dtype)
        per_block = bytes_per_block(shapes, settings.block_size, dtype)
        needed = -(-self.context_length // settings.block_size)
        states = self._states_bytes() + num_snapshots * self.wrapped.survey.state_bytes
        room = in_bytes(settings.kv_cache_memory, self.device) - states
        if not per_block:  # no layer attends: blocks hold nothing and are only counted
            return KVCache(shapes, needed * settings.max_num_seqs, settings.block_size, dtype, self.device)
        num_blocks = max(0, room) // per_block
        may_take = in_bytes(MOST_OF_FREE, self.device) - states
        if isinstance(settings.kv_cache_memory, float) and needed * per_block <= may_take:
            num_blocks = max(num_blocks, needed)  # a share says how much may be taken, not that nothing may be served
        if num_blocks < needed:
            raise NotEnoughMemory(
                f"The KV cache has room for {num_blocks * settings.block_size} tokens and one sequence of "
                f"{self.context_length} needs {-(-needed * per_block // 2**10):,} KiB: raise --kv-cache-memory "
                "or lower --max-model-len."
            )
        return KVCache(shapes, num_blocks, settings.block_size, dtype, self.device)

    def _states_bytes(self) -> int:
        """What the states of all sequences take, as they are before a step and after it. Raises NotEnoughMemory."""
        one = 2 * self.wrapped.survey.state_bytes
        whole = one * self.settings.max_num_seqs
        if whole > in_bytes(self.settings.kv_cache_memory, self.device):
            raise NotEnoughMemory(
                f"The layers of this model that keep a state take {-(-one // 2**10):,} KiB for each of the "
                f"{self.settings.max_num_seqs} sequences: lower --max-num-seqs or raise --kv-cache-memory."
            )
        return whole

    def _default_pooling(self) -> Pooling:
        wanted = self.settings.embedding_pooling
        if wanted == "cls":
            raise InvalidSettings("embedding_pooling: a decoder's first token has seen no other. Use last or mean.")
        return wanted or "last"

    def model_info(self) -> ModelInfo:
        """The base as callers see it."""
        generation = self.base.generation
        return ModelInfo(
            name=self.base.name,
            context_length=self.context_length,
            vocab_size=self.wrapped.vocab_size,
            created=int(time.time()),
            default_temperature=generation.temperature,
            default_top_p=generation.top_p,
            default_top_k=generation.top_k,
            default_repetition_penalty=generation.repetition_penalty,
            default_pooling=self._default_pooling(),
            hidden_size=self.wrapped.hidden_size,
            dimensions=self._dimensions(self.wrapped.hidden_size, self.base.model.config.get_text_config()),
            has_heads=bool(self.modules.heads),
        )


def with_heads(sites: Mapping[str, int], plans: Mapping[str, HeadPlan]) -> dict[str, int]:
    """The sites of a base's modules and, behind them, those of the layers of all heads."""
    layers = [site for plan in plans.values() for site in plan.sites]
    return {**sites, **{site: len(sites) + number for number, site in enumerate(layers)}}


def in_bytes(size: int | float, device: torch.device) -> int:
    """A size setting in bytes: a float is a share of the memory that is free on `device` now."""
    if isinstance(size, int):
        return size
    return int(free_bytes(device) * size)
