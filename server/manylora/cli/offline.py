"""Validating an adapter without a server: the same reader, against a base of which config and tokenizer are read."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manylora.catalog.archive import unpack
from manylora.catalog.base_names import BaseNames
from manylora.catalog.records import NewVersion
from manylora.catalog.upload import Rules, new_version, report_of
from manylora.engine.interface import TextCodec
from manylora.lora.format.reader import ModuleSpec
from manylora.settings import Settings, load_settings


def validate_offline(path: Path, model: str | None, *, max_rank: int | None = None) -> dict[str, Any]:
    """What the server would say of a folder or an archive, but for the measured effect, which is null.

    Raises InvalidAdapter, TooLarge or ModelUnusable.
    """
    from manylora.models.offered import modules_of

    settings = load_settings(model=model, max_rank=max_rank)
    rules = _rules(modules_of(settings.model), settings)
    with tempfile.TemporaryDirectory() as scratch:
        folder, others = path, list[str]()
        if path.is_file():
            folder = Path(scratch) / "adapter"
            folder.mkdir()
            others = unpack(path, folder, max_bytes=rules.max_bytes)
        adapter = rules.with_vocabulary(rules.read(folder, others), folder, _codec(settings))
        return {
            "digest": adapter.digest,
            "kind": "lora",
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "target_modules": list(adapter.target_modules),
            "size_bytes": adapter.size_bytes,
            "report": report_of(adapter, None)
            | {"base_model_differs": rules.names.differ_from(adapter.base_model_name_or_path)},
        }


def validated(folder: Path, blob: str, modules: Mapping[str, ModuleSpec], settings: Settings) -> NewVersion:
    """A version to register without a server, from files that are in the store. Raises InvalidAdapter or TooLarge."""
    rules = _rules(modules, settings)
    return new_version(folder, rules.read(folder), None, blob=blob)


def _codec(settings: Settings) -> TextCodec:
    """The base's tokenizer. Raises ModelUnusable."""
    from manylora.models.checkpoint import load_tokenizer
    from manylora.models.codec import HuggingFaceCodec
    from manylora.models.image_loading import is_image_model
    from manylora.models.loading import resolve_model
    from manylora.models.no_text import NoText

    folder = resolve_model(settings.model)
    return NoText() if is_image_model(folder) else HuggingFaceCodec(load_tokenizer(folder), ())


def _rules(modules: Mapping[str, ModuleSpec], settings: Settings) -> Rules:
    from manylora.models.loading import resolve_model
    from manylora.models.stored_weights import StoredWeights

    base = StoredWeights(resolve_model(settings.model), modules)
    names = BaseNames((settings.served_name, settings.model))
    max_bytes, max_memory = int(settings.max_adapter_size), int(settings.max_adapter_memory)
    return Rules(modules, settings.max_rank, max_bytes, base, names, max_memory)
