"""A Hugging Face encoder of images becomes one that runs many adapters' images in one batch.

All images become the same number of positions, so a batch is whole images side by side and the model's own attention
keeps them apart. As with other models nothing is read off a class: passes of the untouched model say which linears and
norms run on all positions and what the model must give, and the wrapped model is held against that before it serves.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from manylora.errors import ModelUnusable
from manylora.kernels.batch import Batch
from manylora.kernels.interface import plan_of
from manylora.lora.format.reader import ModuleSpec
from manylora.models.backends import Backend
from manylora.models.encoder import apart, probe_memory, ragged_batch
from manylora.models.modules import adaptable_modules, adaptable_norms
from manylora.models.probes import PROBE_STRENGTH, ProbeAdapter
from manylora.models.refusals import refusing
from manylora.models.survey import survey_linears
from manylora.models.wrapping import WrappedModel, wrap_surveyed

__all__ = ["ImageModel", "image_modules", "noise", "num_positions", "size_of", "wrap_image_model"]

_NUM_PROBES: Final = 2


@dataclass(frozen=True, slots=True)
class ImageModel:
    """A wrapped encoder of images, each of which becomes `num_positions` positions."""

    wrapped: WrappedModel
    num_positions: int

    @property
    def modules(self) -> dict[str, ModuleSpec]:
        """What an adapter may touch, by path."""
        return self.wrapped.modules

    @property
    def hidden_size(self) -> int:
        return int(self.wrapped.model.config.hidden_size)

    def states(self, batch: Batch, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Every position's hidden state, [n * positions, hidden], and what the pooler makes of each image, [n, hidden].

        `pixels` [n, channels, height, width] are the batch's images; its logit rows are their first positions.
        """
        self.wrapped.context.batch = batch
        output = self.wrapped.model(pixel_values=pixels)
        states: torch.Tensor = output.last_hidden_state
        return states.reshape(-1, states.shape[-1]), getattr(output, "pooler_output", None)


def wrap_image_model(model: PreTrainedModel, backend: Backend) -> ImageModel:
    """Replace linears and norms by ours, in place. Raises ModelUnusable."""
    with refusing(model, "it was looked at"), torch.no_grad():
        pixels = torch.cat([noise(model, seed) for seed in range(_NUM_PROBES)])
        positions = num_positions(model)
        found = survey_linears(model, lambda: _run(model, pixels[:1]), num_tokens=positions, num_logit_rows=1)
        offered = image_modules(model)
        found.modules = {path: spec for path, spec in found.modules.items() if path in offered}
        norms = {path: spec for path, spec in offered.items() if spec.kind == "norm"}
        adapter = ProbeAdapter(found.modules, model.dtype, PROBE_STRENGTH)
        wanted: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for each in pixels:
            with adapter.on_second_row(model):
                wanted.append(_run(model, each.expand(2, *each.shape)))
    with refusing(model, "its parts were replaced"), torch.inference_mode():
        wrapped = wrap_surveyed(model, backend, found, norms)
        for path, module in [(path, each) for path, each in model.named_modules() if isinstance(each, nn.Conv2d)]:
            model.set_submodule(path, _OneByOne(module))
    image_model = ImageModel(wrapped, positions)
    with refusing(model, "it was checked"):
        _check(image_model, pixels, found.modules, wanted)
    return image_model


class _OneByOne(nn.Module):
    """A convolution that takes one image at a time, so that what becomes of it does not depend on its neighbours."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.base(each[None]) for each in pixels])


def size_of(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model with this config sees. Raises ModelUnusable."""
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    both = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(both) != 2 or not all(isinstance(each, int) and each > 0 for each in both):
        raise ModelUnusable(f"The config of the {config.model_type} says no size of its images (image_size).")
    if channels != 3:
        raise ModelUnusable(f"The {config.model_type} sees images of {channels} channels. Served are those of RGB.")
    return channels, int(both[0]), int(both[1])


def noise(model: PreTrainedModel, seed: int) -> torch.Tensor:
    """An image that nobody sent, [1, channels, height, width]; on the meta device one without numbers."""
    shape = (1, *size_of(model.config))
    if next(model.parameters()).is_meta:
        return torch.empty(shape, device=model.device, dtype=model.dtype)
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(model.device, model.dtype)


def num_positions(model: PreTrainedModel) -> int:
    """How many positions each image becomes. Raises ModelUnusable."""
    name = type(model).__name__
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise ModelUnusable(f"{name} takes no pixel_values: it is no encoder of images.")
    states = _run(model, noise(model, 0))[0]
    return int(states.shape[1])


def image_modules(model: PreTrainedModel) -> dict[str, ModuleSpec]:
    """What an adapter may touch of an untouched model, which may be on the meta device, by path.

    Those linears and norms that run on every position, and linears that run once for each image, such as the pooler's.
    Raises ModelUnusable.
    """
    modules = adaptable_modules(model) | adaptable_norms(model)
    rows: dict[str, set[int]] = {path: set() for path in modules}
    handles = [model.get_submodule(path).register_forward_pre_hook(_noting(rows[path])) for path in modules]
    try:
        positions = num_positions(model)
    finally:
        for handle in handles:
            handle.remove()
    found = {
        path: spec
        for path, spec in modules.items()
        if rows[path] == {positions} or (rows[path] == {1} and spec.kind != "norm")
    }
    if not any(rows[path] == {positions} for path in found):
        raise ModelUnusable(f"No linear of {type(model).__name__} runs on every position of an image: not supported.")
    return found


def _noting(counts: set[int]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def note(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        counts.add(args[0].numel() // args[0].shape[-1])

    return note


def _run(model: PreTrainedModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        output = model(pixel_values=pixels)
    states = getattr(output, "last_hidden_state", None)
    if not isinstance(states, torch.Tensor) or states.dim() != 3 or states.shape[-1] != model.config.hidden_size:
        raise ModelUnusable(f"{type(model).__name__} does not give the hidden states of an image's positions.")
    return states, getattr(output, "pooler_output", None)


def _check(
    image_model: ImageModel,
    pixels: torch.Tensor,
    modules: Mapping[str, ModuleSpec],
    wanted: list[tuple[torch.Tensor, torch.Tensor | None]],
) -> None:
    """All images in one batch by the wrapped model, without and with an adapter. Raises ModelUnusable."""
    wrapped, positions = image_model.wrapped, image_model.num_positions
    memory = probe_memory(wrapped, modules)
    slots = np.tile(np.array([-1, 0], dtype=np.int32), len(pixels))
    device = pixels.device
    lens = (positions,) * len(slots)
    batch = ragged_batch(
        torch.zeros(positions * len(slots), dtype=torch.int64, device=device),
        lens,
        torch.arange(len(slots), device=device) * positions,
        plan_of(wrapped.backend.lora, memory, np.repeat(slots, positions)),
        plan_of(wrapped.backend.lora, memory, slots),
    )
    with torch.inference_mode():
        states, pooled = image_model.states(batch, pixels.repeat_interleave(2, dim=0))
    wrapped.context.batch = None
    most = wrapped.backend.format.tolerance(wrapped.model.dtype).model
    expected = torch.cat([each.reshape(-1, each.shape[-1]) for each, _ in wanted])
    pairs = [(states, expected)]
    if pooled is not None:
        pairs.append((pooled, torch.cat([each for _, each in wanted if each is not None])))
    difference = max(apart(*pair) for pair in pairs)
    if not difference <= most:
        raise ModelUnusable(
            f"{type(wrapped.model).__name__} computes something that this server does not reproduce (hidden states "
            f"differ by {difference:.3g} of their spread, {most:.3g} is allowed)."
        )
