"""Handwritten digits: a small encoder of images, trained here in seconds, and rows for an adapter that it has not seen.

    python cases/images/digits.py data/digits

writes `base`, a ViT that has learnt to tell the digits 0 to 5 apart, and `train.jsonl` and `test.jsonl`, images of the
digits 6 to 9. No ViT that was trained on photographs comes with a package; this one knows strokes of a pen and nothing
else, which is enough to see an adapter learn, be scored and be served. The images, 1,797 of 8 x 8 pixels by 43
people, are scikit-learn's `load_digits` (E. Alpaydin and C. Kaynak, 1998).
"""

import base64
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

KNOWN, NEW = range(6), range(6, 10)
PER_LABEL = 30  # images of a new digit to learn from; the rest of them is the test
EPOCHS, BATCH, SEED = 12, 64, 0
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}


def pictures() -> tuple[list[Image.Image], NDArray[np.int64]]:
    """All images, and which digit each is."""
    found = load_digits()
    pixels = (found.images * (255 / 16)).round().astype(np.uint8)
    return [Image.fromarray(each).convert("RGB") for each in pixels], found.target.astype(np.int64)


def learn(images: list[Image.Image], labels: NDArray[np.int64], folder: Path) -> None:
    """Train a ViT on images and write it without its head, beside what prepares images for it."""
    torch.manual_seed(SEED)
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_labels=len(set(labels.tolist())),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    model: Any = ViTForImageClassification(config)
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")["pixel_values"]
    wanted = torch.from_numpy(labels)
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            loss = functional.cross_entropy(model(pixel_values=pixels[chosen]).logits, wanted[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.vit.save_pretrained(folder)


def row(image: Image.Image, label: int) -> dict[str, str]:
    """What `manylora train --task image` reads."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"image": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", "label": str(label)}


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")


def make(out: Path) -> None:
    images, labels = pictures()
    known = np.flatnonzero(np.isin(labels, KNOWN))
    learn([images[place] for place in known], labels[known], out / "base")
    places = [np.flatnonzero(labels == digit) for digit in NEW]
    write(out / "train.jsonl", (row(images[i], int(labels[i])) for each in places for i in each[:PER_LABEL]))
    write(out / "test.jsonl", (row(images[i], int(labels[i])) for each in places for i in each[PER_LABEL:]))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
