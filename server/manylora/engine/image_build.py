"""From settings to a running engine over an encoder of images."""

import time

import numpy as np

from manylora.engine.async_engine import AsyncEngine
from manylora.engine.encoder_executor import ImageExecutor
from manylora.engine.engine import Engine
from manylora.engine.interface import AdapterSource, ModelInfo
from manylora.engine.pool_build import WholeBuilder
from manylora.errors import InvalidSettings
from manylora.images.picture import Picture, Vision
from manylora.lora.format.encoders import ImageModules
from manylora.lora.memory.occupancy import Occupancy
from manylora.lora.memory.tiers import AdapterTiers
from manylora.metrics import Metrics
from manylora.models.heads import head_plans
from manylora.models.image_loading import LoadedImageModel
from manylora.models.images import noise, size_of, wrap_image_model
from manylora.models.stored_weights import StoredWeights
from manylora.settings import Settings

__all__ = ["ImageBuilder"]


class ImageBuilder(WholeBuilder):
    """The engine of an encoder of images. Each image is an input of as many tokens as it becomes positions."""

    def __init__(self, settings: Settings, base: LoadedImageModel) -> None:
        super().__init__(settings, base)
        self.base = base
        prefix = base.model.base_model_prefix
        plans = head_plans(base.model, StoredWeights(base.folder, ImageModules({}, prefix)), ("SEQ_CLS",))
        self._noise = np.ascontiguousarray(noise(base.model, 0)[0].float().cpu().numpy())
        self.images = wrap_image_model(base.model, base.backend)
        self.context_length = self.images.num_positions
        self._modules = ImageModules(self.images.modules, prefix, plans)
        self._check()

    @property
    def modules(self) -> ImageModules:
        """What an adapter may touch, by path."""
        return self._modules

    def build_core(
        self, source: AdapterSource, metrics: Metrics, occupancy: Occupancy | None = None
    ) -> tuple[Engine, AdapterTiers]:
        """Lay out memory and put the parts together. Raises StartupError."""
        images, kernel = self.images, self.backend.lora
        return self.whole_core(
            source, metrics, occupancy, images.wrapped, lambda *given: ImageExecutor(images, given[0], kernel, given[1])
        )

    def build(self, source: AdapterSource, metrics: Metrics, occupancy: Occupancy | None = None) -> AsyncEngine:
        """The engine with its bridge to asyncio, not started yet; for probes and to warm up it sees noise."""
        engine = super().build(source, metrics, occupancy)
        engine.own_picture = Picture(self._noise, self.context_length)
        return engine

    def _check(self) -> None:
        most, own = self.settings.max_num_batched_tokens, self.context_length
        if own > most:
            raise InvalidSettings(
                f"max_num_batched_tokens: an image of {own} positions runs in one step, which has at most {most}. "
                "Raise --max-num-batched-tokens."
            )
        wanted = self.settings.max_model_len
        if wanted and wanted != own:
            raise InvalidSettings(f"max_model_len: each image has {own} positions, no more and no fewer. Leave it out.")

    def _has_first(self) -> bool:
        """Whether a position of its own, before those of the patches, stands for all of the image."""
        config = self.base.model.config
        patch = getattr(config, "patch_size", None)
        sides = tuple(patch) if isinstance(patch, list | tuple) else (patch, patch)
        if not all(isinstance(each, int) and each > 0 for each in sides):
            return False
        _, height, width = size_of(config)
        return self.context_length > (height // int(sides[0])) * (width // int(sides[1]))

    def model_info(self) -> ModelInfo:
        """The base as callers see it."""
        size = self.images.hidden_size
        return ModelInfo(
            name=self.base.name,
            context_length=self.context_length,
            vocab_size=ImageExecutor.vocab_size,
            created=int(time.time()),
            default_pooling=self.settings.embedding_pooling or ("cls" if self._has_first() else "mean"),
            hidden_size=size,
            dimensions=self._dimensions(size, self.base.model.config),
            kind="pool",
            has_heads=True,
            vision=Vision(self.context_length, self._noise.nbytes, self.base.prepare),
        )
