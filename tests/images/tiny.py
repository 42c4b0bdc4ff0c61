"""Tiny random encoders of images, adapters that PEFT writes for them, and pictures in files of every kind."""

import base64
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BeitConfig,
    CLIPVisionConfig,
    Dinov2Config,
    PretrainedConfig,
    ViTConfig,
)

from tests.tiny_models import draw_weights

SIZE, HIDDEN = 32, 48
_SHARED = {
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 8,
}
CONFIGS: Mapping[str, tuple[type[PretrainedConfig], Mapping[str, Any]]] = {
    "vit": (ViTConfig, _SHARED | {"pooler_output_size": HIDDEN}),
    "beit": (BeitConfig, _SHARED | {"use_relative_position_bias": True}),
    "dinov2": (Dinov2Config, _SHARED),
    "clip": (CLIPVisionConfig, _SHARED | {"projection_dim": 16}),
}
PREFIXES = {"vit": "vit", "beit": "beit", "dinov2": "dinov2"}
_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": SIZE, "width": SIZE}},
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
    },
}


def make_image_model(kind: str, folder: Path, *, processor: str = "vit", **overrides: Any) -> Path:
    """Save a random encoder with what prepares its images; returns the folder."""
    config_class, fields = CONFIGS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config_class(**{**fields, **overrides}), dtype=torch.float32)
        draw_weights(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSORS[processor]))
    return folder


def make_image_adapter(
    base: Path, folder: Path, labels: list[str], *, rank: int = 4, targets: Any = "all-linear", seed: int = 0
) -> Path:
    """Save an adapter as PEFT's users train it on images: without a task, its head in modules_to_save."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForImageClassification.from_pretrained(base, dtype=torch.float32, num_labels=len(labels))
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=["classifier"])
        tuned = get_peft_model(model, config)
        with torch.no_grad():
            for weight in tuned.parameters():
                if weight.requires_grad:
                    weight.normal_(0.0, (0.5 / weight.shape[-1]) ** 0.5)
        tuned.save_pretrained(folder)
    path = folder / "adapter_config.json"
    named = {"id2label": {str(number): label for number, label in enumerate(labels)}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    return folder


def picture(seed: int, width: int = 40, height: int = 60) -> Image.Image:
    """A picture of blots, RGB."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file with the image."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def url_of(data: bytes, kind: str = "image/png") -> str:
    """A data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part_of(data: bytes) -> dict[str, Any]:
    """An `image_url` part."""
    return {"type": "image_url", "image_url": {"url": url_of(data)}}


@torch.inference_mode()
def wanted_scores(base: Path, adapter: Path, count: int, images: list[Image.Image]) -> np.ndarray:
    """The oracle: scores [n, labels] of transformers' classifier with PEFT's adapter, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForImageClassification.from_pretrained(base, dtype=torch.float32, num_labels=count)
        tuned = PeftModel.from_pretrained(model, adapter).eval()
    found: np.ndarray = tuned(pixel_values=prepared(base, images)).logits.numpy()
    return found


@torch.inference_mode()
def wanted_states(base: Path, images: list[Image.Image]) -> torch.Tensor:
    """The oracle: hidden states [n, positions, hidden] of the bare model."""
    model = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    states: torch.Tensor = model(pixel_values=prepared(base, images)).last_hidden_state
    return states


def prepared(base: Path, images: list[Image.Image]) -> torch.Tensor:
    """What transformers' own processor makes of the images."""
    pixels: torch.Tensor = AutoImageProcessor.from_pretrained(base, backend="pil")(images, return_tensors="pt")[
        "pixel_values"
    ]
    return pixels
