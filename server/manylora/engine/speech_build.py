"""From settings to a running engine over a model of speech."""

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from manylora.engine.async_engine import AsyncEngine
from manylora.engine.block_manager import BlockManager
from manylora.engine.build import MOST_OF_FREE, Builder, FaultMetrics, in_bytes
from manylora.engine.engine import Engine
from manylora.engine.interface import AdapterSource, ModelInfo
from manylora.engine.scheduler import Scheduler
from manylora.engine.speech_executor import SpeechExecutor
from manylora.engine.speech_runner import SpeechRunner
from manylora.errors import InvalidSettings, NotEnoughMemory
from manylora.identity import AdapterRef
from manylora.lora.format.encoders import SpeechModules
from manylora.lora.format.reader import Adapter, read_trusted
from manylora.lora.memory.occupancy import Occupancy
from manylora.lora.memory.tiers import AdapterTiers
from manylora.metrics import Metrics
from manylora.models.kv_cache import KVCache
from manylora.models.speech import window_bytes, wrap_speech
from manylora.models.speech_loading import LoadedSpeech
from manylora.settings import Settings
from manylora.sound.spectrogram import FRAMES_PER_SECOND
from manylora.sound.tokens import Sound, SpeechInfo

__all__ = ["SpeechBuilder"]

_FRAMES_PER_POSITION: Final = 2


class SpeechBuilder(Builder):
    """The engine of a model of speech."""

    def __init__(self, settings: Settings, base: LoadedSpeech) -> None:
        super().__init__(settings, base)
        self.base = base
        self.context_length = self._context_length()
        self.speech = wrap_speech(base.model, base.backend)

    @property
    def modules(self) -> SpeechModules:
        """What an adapter may touch, by path."""
        return self.speech.modules

    def build_core(
        self, source: AdapterSource, metrics: Metrics, occupancy: Occupancy | None = None
    ) -> tuple[Engine, AdapterTiers]:
        """Lay out memory, check the model against itself, and put the parts together. Raises StartupError."""
        settings, wrapped = self.settings, self.speech.wrapped
        num_windows = self._num_windows()
        shapes, size = wrapped.survey.kv_shapes, settings.block_size
        cache = KVCache(shapes, num_windows * self._blocks_each(), size, self.dtype, self.device)
        self.speech.attach(cache, num_windows)
        memory = self._memory(len(self.modules))
        packer = self._packer(wrapped.sites, wrapped.served)
        tiers = self._tiers(memory, self._reader(source), packer, metrics, occupancy)
        scheduler = Scheduler(
            # Prompts of different sounds are alike, so that no block is ever found again.
            BlockManager(cache.num_blocks, size, share_prefixes=False, num_states=num_windows),
            tiers,
            max_num_seqs=num_windows,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        )
        engine = Engine(
            scheduler,
            SpeechRunner(SpeechExecutor(self.speech, cache, memory, self.backend.lora)),
            decode=self.base.codec.decode,
            eos_ids=frozenset(self.base.codec.eos_ids),
            max_model_len=self.context_length,
            observe=metrics.observe_step,
            faults=FaultMetrics(metrics),
        )
        return engine, tiers

    def build(self, source: AdapterSource, metrics: Metrics, occupancy: Occupancy | None = None) -> AsyncEngine:
        """The engine with its bridge to asyncio, not started yet; for probes and to warm up it hears made-up sound."""
        engine = super().build(source, metrics, occupancy)
        config = self.base.model.config
        frames = _FRAMES_PER_POSITION * config.max_source_positions
        noise = np.random.default_rng(0).standard_normal((config.num_mel_bins, frames))
        engine.own_sound = Sound((0.5 * noise).astype(np.float32), config.max_source_positions)
        return engine

    def _reader(self, source: AdapterSource) -> Callable[[AdapterRef], Adapter]:
        modules = self.modules
        return lambda ref: read_trusted(source.local_folder(ref), modules)

    def _blocks_each(self) -> int:
        return -(-self.context_length // self.settings.block_size)

    def _num_windows(self) -> int:
        """How many transcripts are written at once: as many as may be, and as there is memory for."""
        settings = self.settings
        each = window_bytes(self.base.model.config, self.dtype, self.context_length, settings.block_size)
        room = in_bytes(settings.kv_cache_memory, self.device)
        if isinstance(settings.kv_cache_memory, float) and each <= in_bytes(MOST_OF_FREE, self.device):
            room = max(room, each)  # a share says how much may be taken, not that nothing may be served
        if room < each:
            raise NotEnoughMemory(
                f"What is kept of one window of sound takes {-(-each // 2**20):,} MiB, and the cache has "
                f"{room // 2**20:,}: raise --kv-cache-memory."
            )
        return min(settings.max_num_seqs, room // each)

    def _context_length(self) -> int:
        own, wanted = int(self.base.model.config.max_target_positions), self.settings.max_model_len
        if wanted and wanted > own:
            raise InvalidSettings(f"max_model_len: {wanted} is more than the {own} positions the model is served with.")
        return wanted or own

    def model_info(self) -> ModelInfo:
        """The base as callers see it."""
        config = self.base.model.config
        positions = int(config.max_source_positions)
        return ModelInfo(
            name=self.base.name,
            context_length=self.context_length,
            vocab_size=self.speech.vocab_size,
            created=int(time.time()),
            kind="transcribe",
            speech=SpeechInfo(
                tokens=self.base.tokens,
                window_s=_FRAMES_PER_POSITION * positions / FRAMES_PER_SECOND,
                num_mels=int(config.num_mel_bins),
                num_positions=positions,
            ),
        )
