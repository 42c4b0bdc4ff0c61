"""What a base offers to adapters, told from its config, without its weights."""

from collections.abc import Mapping

import torch

from manylora.errors import ModelUnusable
from manylora.lora.format.encoders import HeadedModules
from manylora.lora.format.spec import ModuleSpec
from manylora.models import checkpoint
from manylora.models.encoder_loading import is_encoder, offered_modules
from manylora.models.heads import decoder_heads
from manylora.models.image_loading import is_image_model, offered_image_modules
from manylora.models.loading import resolve_model
from manylora.models.mixtures import adaptable_experts
from manylora.models.modules import adaptable_modules, adaptable_norms, stated_shapes, with_past
from manylora.models.speech_loading import is_speech, offered_speech_modules
from manylora.models.text_part import beside_text

__all__ = ["modules_of"]


def modules_of(model: str | None) -> Mapping[str, ModuleSpec]:
    """The base's adaptable modules, from its config alone. Raises ModelUnusable."""
    folder = resolve_model(model)
    if is_encoder(folder):
        return offered_modules(folder)
    if is_speech(folder):
        return offered_speech_modules(folder)
    if is_image_model(folder):
        return offered_image_modules(folder)
    config = checkpoint.read_config(folder, to_serve=True)
    try:
        with torch.device("meta"):
            base = checkpoint.auto_class(config).from_config(config)
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"The config of {folder} cannot be used: {error}") from error
    modules = with_past(adaptable_modules(base), stated_shapes(config))
    modules |= adaptable_experts(base) | adaptable_norms(base)
    aside = tuple(f"{path}." for path in beside_text(base)) if checkpoint.has_more_than_text(config) else ()
    kept = {path: spec for path, spec in modules.items() if not path.startswith(aside)}
    return HeadedModules(kept, decoder_heads(base, folder))
