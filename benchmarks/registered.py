"""Data folders with many registered adapters, made without a server: through the catalog's own store and registry.

The files are validated and stored as at an upload; only the probe of their effect is left out.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from manylora.catalog.base_signature import signature_of
from manylora.catalog.blobs import Blobs
from manylora.catalog.records import Wish
from manylora.catalog.registry import Registry
from manylora.catalog.store import open_store
from manylora.catalog.upload import Rules, new_version
from manylora.database.database import open_database
from manylora.engine.interface import Effect
from manylora.models.offered import modules_of
from manylora.settings import Settings

__all__ = ["register_fleet", "register_small"]


def register_fleet(model: Path, data_dir: Path, fleet: Path) -> None:
    """Register every PEFT folder below `fleet` for the tenant `public`; those that are there already stay."""
    _register(model, data_dir, sorted(config.parent for config in fleet.glob("*/adapter_config.json")))


def register_small(model: Path, data_dir: Path, count: int) -> None:
    """Register `count` different adapters of rank 1 on one linear, a few kilobytes each."""
    folders = data_dir.with_name(data_dir.name + "-folders")
    modules = modules_of(str(model))
    path, spec = next((path, spec) for path, spec in modules.items() if path.endswith("q_proj"))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [path]}
    for number in range(count):
        folder = folders / f"s{number:05d}"
        if folder.is_dir():
            continue
        folder.mkdir(parents=True)
        draw = np.random.default_rng(number)
        pair = {"A": (1, spec.in_features), "B": (spec.out_features, 1)}
        save_file(
            {f"base_model.model.{path}.lora_{k}.weight": draw.normal(0, 0.1, shape).astype(np.float32)
             for k, shape in pair.items()},
            folder / "adapter_model.safetensors",
        )  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    _register(model, data_dir, sorted(folders.iterdir()))


def _register(model: Path, data_dir: Path, folders: Iterable[Path]) -> None:
    settings = Settings(model=str(model), data_dir=data_dir)
    modules = modules_of(str(model))
    rules = Rules(modules, settings.max_rank, int(settings.max_adapter_size))
    database = open_database(settings.resolved_database_url)
    store = open_store(settings.resolved_store_url, data_dir / "cache")
    registry = Registry(database, signature_of(modules))
    blobs = Blobs(database, registry, store)
    try:
        for folder in folders:
            if registry.directory.own("public", folder.name) is None:
                new = new_version(folder, rules.read(folder), Effect(0, 1.0, 1.0))
                blobs.keep(folder, new.blob, partial(registry.publish, Wish("public", folder.name), new))
    finally:
        store.close()
        database.close()
