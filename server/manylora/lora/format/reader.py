"""Reads and validates an adapter in PEFT's layout: the one reader of start-up import, hot upload and loader.

    folder ── check_listing ──► adapter_config.json ── parse ──► LoraSettings ── resolve ──► targets ─┐
                            └► adapter_model.safetensors ── parse ──► tensors ── check_values ───────┴─► pairs

Safetensors only, no torch, and every problem at once. `docs/adapters.md` says what is served and what is not.
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from manylora.errors import InvalidAdapter, Problem
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format import config as peft_config
from manylora.lora.format import contents, pairing, targets
from manylora.lora.format import folder as listing
from manylora.lora.format import tensors as safetensors_file
from manylora.lora.format.config import LoraSettings
from manylora.lora.format.problems import Problems
from manylora.lora.format.spec import Adapter, BaseWeights, LoraModule, ModuleKind, ModuleSpec
from manylora.lora.format.targets import Target
from manylora.lora.format.tensors import TensorView

__all__ = [
    "Adapter",
    "InvalidAdapter",
    "LoraModule",
    "ModuleKind",
    "ModuleSpec",
    "Problem",
    "TensorView",
    "digest_of",
    "read",
    "read_trusted",
]


@dataclass(frozen=True, slots=True)
class _Files:
    """The two files, parsed; None for one that could not be."""

    config: dict[str, Any] | None
    tensors: dict[str, TensorView] | None


# Errors of this machine, which say nothing of the adapter.
_OUR_TROUBLE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM})


def _open(folder: Path, problems: Problems) -> _Files:
    config = tensors = None
    try:
        if (folder / CONFIG_FILE).is_file():
            config = peft_config.read_json(folder / CONFIG_FILE, problems)
        if (folder / TENSOR_FILE).is_file():
            tensors = safetensors_file.parse(safetensors_file.map_file(folder / TENSOR_FILE), problems)
    except OSError as error:
        if error.errno in _OUR_TROUBLE:
            raise
        problems.add("missing_file", CONFIG_FILE, f"A file cannot be read: {error.strerror or error}.")
    return _Files(config, tensors)


def _pair(
    settings: LoraSettings,
    tensors: dict[str, TensorView],
    modules: Mapping[str, ModuleSpec],
    planned: Mapping[str, Target] | None,
    problems: Problems,
    warnings: list[str],
    base: BaseWeights | None = None,
) -> tuple[LoraModule, ...]:
    if planned is None or not settings.has_plain_layout:
        return ()
    name = settings.base_model_name_or_path
    return pairing.Pairing(planned, modules, name, problems, warnings, base).run(tensors)


def _build(
    settings: LoraSettings, modules: tuple[LoraModule, ...], digest: str, size_bytes: int, warnings: list[str]
) -> Adapter:
    names = settings.target_modules
    return Adapter(
        rank=max(module.rank for module in modules),
        alpha=float(settings.alpha),
        target_modules=[names] if isinstance(names, str) else sorted(names),
        base_model_name_or_path=settings.base_model_name_or_path,
        modules=modules,
        digest=digest,
        size_bytes=size_bytes,
        matched=[module.path for module in modules],
        warnings=warnings,
    )


def read(
    folder: Path,
    modules: Mapping[str, ModuleSpec],
    *,
    max_rank: int,
    max_size: int,
    left_aside: Sequence[str] = (),
    base: BaseWeights | None = None,
) -> Adapter:
    """The adapter in `folder`, checked completely against the base's `modules` (by path).

    `max_size` is in bytes. `left_aside` names what lay beside the files that were brought into the folder, and
    copies of the base's numbers are held against `base`. Raises InvalidAdapter with every problem found, or TooLarge.
    """
    size_bytes = listing.check_size(folder, max_size)
    problems, warnings = Problems(), list[str]()
    aside = listing.left_aside([*listing.names_in(folder), *left_aside])
    if said := listing.warning_of(aside):
        warnings.append(said)
    listing.check_listing(folder, aside, problems)
    files = _open(folder, problems)
    settings = peft_config.parse(files.config, problems, warnings) if files.config is not None else None
    pairs: tuple[LoraModule, ...] = ()
    if files.tensors is not None:
        contents.check_values(files.tensors, problems)
        if settings is not None and not pairing.refuse_experts(files.tensors, modules, problems):
            planned = targets.resolve(settings, modules, max_rank, problems, warnings)
            pairs = _pair(settings, files.tensors, modules, planned, problems, warnings, base)
        if not problems.has("wrong_dtype", "wrong_shape"):
            contents.check_effect(pairs, problems, warnings)
    problems.raise_if_any()
    # What could not be read is a problem, so everything is there from here on.
    assert settings is not None
    assert files.config is not None
    assert files.tensors is not None
    digest = contents.digest(peft_config.canonical(files.config), files.tensors)
    return _build(settings, pairs, digest, size_bytes, warnings)


def read_trusted(folder: Path, modules: Mapping[str, ModuleSpec], *, digest: str = "") -> Adapter:
    """An adapter that `read` accepted before, again and fast: no value is looked at and nothing is hashed.

    Header, config, names and shapes are still checked, so that a file that was damaged, or a base that was
    changed since, is an InvalidAdapter and never read out of bounds. Which modules it adapts is what its tensors
    say: the config's lists and patterns were held against them by `read`. `digest` is passed on.
    """
    problems, warnings = Problems(), list[str]()
    files = _open(folder, problems)
    settings = peft_config.parse(files.config, problems, warnings) if files.config is not None else None
    pairs: tuple[LoraModule, ...] = ()
    if settings is not None and files.tensors is not None:
        planned = targets.as_accepted(settings, modules, pairing.ranks_of(files.tensors), problems)
        pairs = _pair(settings, files.tensors, modules, planned, problems, warnings)
    for pair in pairs:
        if not {pair.a.dtype, pair.b.dtype} <= set(contents.SERVED_DTYPES):
            problems.add("wrong_dtype", TENSOR_FILE, f"{pair.path} is not {', '.join(contents.SERVED_DTYPES)}.")
    if not problems and (settings is None or not pairs):
        listing.check_listing(folder, listing.names_in(folder), problems)
    problems.raise_if_any()
    assert settings is not None
    return _build(settings, pairs, digest, listing.size_of(folder), warnings)


def digest_of(folder: Path) -> str:
    """The digest that `read` would give, without holding the adapter against a base.

    Raises InvalidAdapter where the two files cannot be parsed.
    """
    problems = Problems()
    files = _open(folder, problems)
    if files.config is None or files.tensors is None:
        listing.check_listing(folder, listing.names_in(folder), problems)
    problems.raise_if_any()
    assert files.config is not None
    assert files.tensors is not None
    return contents.digest(peft_config.canonical(files.config), files.tensors)
