"""From settings to a running engine over an encoder: no cache, no sampling, one step for each input."""

import time
from collections.abc import Callable

from manylora.engine.block_manager import BlockManager
from manylora.engine.build import Builder, FaultMetrics, with_heads
from manylora.engine.encoder_executor import EncoderExecutor, WholeExecutor
from manylora.engine.encoder_runner import EncoderRunner
from manylora.engine.engine import Engine
from manylora.engine.heads import HeadReader
from manylora.engine.interface import AdapterSource, ModelInfo
from manylora.engine.scheduler import Scheduler
from manylora.errors import InvalidSettings
from manylora.lora.format.encoders import EncoderModules
from manylora.lora.format.reader import read_trusted
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.occupancy import Occupancy
from manylora.lora.memory.tiers import AdapterTiers
from manylora.metrics import Metrics
from manylora.models.encoder import EncoderModel, first_position, wrap_encoder
from manylora.models.encoder_loading import LoadedEncoder
from manylora.models.heads import head_plans
from manylora.models.positions import UNSTATED_LIMIT, position_limit
from manylora.models.stored_weights import StoredWeights
from manylora.models.wrapping import WrappedModel
from manylora.settings import Settings

__all__ = ["PoolBuilder", "WholeBuilder"]


class WholeBuilder(Builder):
    """What the engines of encoders have in common: whole inputs, each of which ends with its step."""

    context_length: int

    @property
    def modules(self) -> EncoderModules:
        """What an adapter may touch, by path."""
        raise NotImplementedError

    def whole_core(
        self,
        source: AdapterSource,
        metrics: Metrics,
        occupancy: Occupancy | None,
        wrapped: WrappedModel,
        executor: Callable[[DeviceMemory, HeadReader], WholeExecutor],
    ) -> tuple[Engine, AdapterTiers]:
        """Lay out memory and put the parts together. Raises StartupError."""
        settings, plans, modules = self.settings, self.modules.heads, self.modules
        sites = with_heads(wrapped.sites, plans)
        memory = self._memory(len(sites))
        packer = self._packer(sites, wrapped.served)
        tiers = self._tiers(
            memory, lambda ref: read_trusted(source.local_folder(ref), modules), packer, metrics, occupancy
        )
        scheduler = Scheduler(
            # One block for each place in the batch: inputs leave nothing behind that others could use.
            BlockManager(settings.max_num_seqs, self.context_length, share_prefixes=False),
            tiers,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            runs_whole=True,
        )
        engine = Engine(
            scheduler,
            EncoderRunner(executor(memory, HeadReader(memory, plans, sites))),
            decode=self._codec.decode,
            eos_ids=frozenset(),
            max_model_len=self.context_length,
            observe=metrics.observe_step,
            faults=FaultMetrics(metrics),
        )
        return engine, tiers


class PoolBuilder(WholeBuilder):
    """The engine of an encoder of texts."""

    def __init__(self, settings: Settings, base: LoadedEncoder) -> None:
        super().__init__(settings, base)
        self.base = base
        self.context_length = self._context_length()
        stored = StoredWeights(base.folder, EncoderModules({}, base.model.base_model_prefix))
        plans = head_plans(base.model, stored)
        self.encoder: EncoderModel = wrap_encoder(base.model, base.backend, context_length=self.context_length)
        self._modules = EncoderModules(self.encoder.modules, base.model.base_model_prefix, plans)

    @property
    def modules(self) -> EncoderModules:
        """What an adapter may touch, by path."""
        return self._modules

    def build_core(
        self, source: AdapterSource, metrics: Metrics, occupancy: Occupancy | None = None
    ) -> tuple[Engine, AdapterTiers]:
        """Lay out memory and put the parts together. Raises StartupError."""
        encoder, kernel = self.encoder, self.backend.lora
        return self.whole_core(
            source,
            metrics,
            occupancy,
            encoder.wrapped,
            lambda *given: EncoderExecutor(encoder, given[0], kernel, given[1]),
        )

    def _context_length(self) -> int:
        """The longest input: all of it runs in one step."""
        config, settings = self.base.model.config, self.settings
        own, most = position_limit(config), settings.max_num_batched_tokens
        if own:
            own -= first_position(self.base.model)
        wanted = settings.max_model_len
        if own and wanted and wanted > own:
            raise InvalidSettings(f"max_model_len: {wanted} is more than the {own} positions the model is served with.")
        if wanted and wanted > most:
            raise InvalidSettings(
                f"max_model_len: an input of {wanted} tokens runs in one step, which has at most {most}. Raise "
                "--max-num-batched-tokens."
            )
        stated = self.base.sentence.max_tokens
        return wanted or min(each for each in (own or UNSTATED_LIMIT, stated, most) if each)

    def model_info(self) -> ModelInfo:
        """The base as callers see it."""
        sentence = self.base.sentence
        return ModelInfo(
            name=self.base.name,
            context_length=self.context_length,
            vocab_size=self.encoder.vocab_size,
            created=int(time.time()),
            default_pooling=self.settings.embedding_pooling or sentence.pooling or "mean",
            hidden_size=self.encoder.hidden_size,
            dimensions=self._dimensions(self.encoder.hidden_size, self.base.model.config),
            kind="pool",
            normalizes=sentence.normalizes,
            has_heads=True,
        )
