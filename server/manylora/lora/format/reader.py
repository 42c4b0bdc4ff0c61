"""Reads and validates an adapter in PEFT's layout: the one reader of start-up import, hot upload and loader.

    folder ── check_listing ──► adapter_config.json ── kinds.reading_of ──► reading of its kind ─┐
                            └► adapter_model.safetensors ── parse ──► tensors ── check_values ───┴─► modules, terms

Safetensors only, no torch, and every problem at once. `docs/adapters.md` says what is served and what is not.
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from manylora.errors import InvalidAdapter, Problem
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format import config as peft_config
from manylora.lora.format import contents, kinds
from manylora.lora.format import folder as listing
from manylora.lora.format import tensors as safetensors_file
from manylora.lora.format.encoders import naming_of, plan_of, tasks_of
from manylora.lora.format.heads import HeadPart, read_head
from manylora.lora.format.kinds import Reading
from manylora.lora.format.problems import Problems, shown
from manylora.lora.format.spec import AdaptedModule, Adapter, Base, BaseWeights, LowRank, ModuleKind, ModuleSpec, Prefix
from manylora.lora.format.tensors import TensorView
from manylora.lora.format.vocabulary import own_num_tokens

__all__ = [
    "AdaptedModule",
    "Adapter",
    "InvalidAdapter",
    "LowRank",
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
    tensors: Mapping[str, TensorView] | None


# What PEFT writes as `target_modules` of an adapter that adapts none.
_NO_TARGETS: Final = "dummy-target-modules"
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


def _beheaded(
    files: _Files, modules: Mapping[str, ModuleSpec], problems: Problems, warnings: list[str]
) -> tuple[_Files, HeadPart | None]:
    """The files without the head that their task has, and the head."""
    plan = None if files.config is None else plan_of(files.config, modules, files.tensors or {})
    if plan is None or files.config is None or files.tensors is None:
        return files, None
    part = read_head(files.config, files.tensors, plan, problems, warnings)
    return _Files(part.config, part.tensors), part


@dataclass(slots=True)
class _HeadAlone:
    """Of an adapter that is a head over the base's own states and adapts no module. Implements `kinds.Reading`."""

    base_model_name_or_path: str | None
    kind: str = "head"
    alpha: float = 0.0
    target_modules: list[str] = field(default_factory=list)
    invocation: tuple[int, ...] = ()

    def modules(
        self, tensors: Mapping[str, TensorView], base: Base, problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        return ()

    def accepted(
        self,
        tensors: Mapping[str, TensorView],
        modules: Mapping[str, ModuleSpec],
        problems: Problems,
        warnings: list[str],
    ) -> tuple[AdaptedModule, ...]:
        return ()

    def is_index(self, name: str) -> bool:
        return False


def _reading(
    files: _Files, part: HeadPart | None, modules: Mapping[str, ModuleSpec], problems: Problems, warnings: list[str]
) -> Reading | None:
    """The config, read; None, with the reasons in `problems`, where that is not possible."""
    if files.config is None:
        return None
    peft_config.check_task(files.config, tasks_of(modules), problems)
    reading = kinds.reading_of(files.config, problems, warnings)
    is_alone = part is not None and not files.tensors and files.config.get("target_modules") == _NO_TARGETS
    if reading is not None and is_alone:
        return _HeadAlone(reading.base_model_name_or_path)
    return reading


def _build(
    reading: Reading,
    modules: tuple[AdaptedModule, ...],
    part: HeadPart | None,
    digest: str,
    size_bytes: int,
    warnings: list[str],
    num_tokens: int | None,
) -> Adapter:
    modules = modules if part is None else (*modules, *part.modules)
    return Adapter(
        rank=max((t.rank // t.num_experts for m in modules for t in m.terms if isinstance(t, LowRank)), default=0),
        alpha=reading.alpha,
        target_modules=reading.target_modules,
        base_model_name_or_path=reading.base_model_name_or_path,
        modules=modules,
        digest=digest,
        size_bytes=size_bytes,
        matched=[module.path for module in modules],
        warnings=warnings,
        kind=reading.kind,
        invocation=reading.invocation,
        head=None if part is None else part.head,
        num_tokens=num_tokens,
    )


def read(
    folder: Path,
    modules: Mapping[str, ModuleSpec],
    *,
    max_rank: int,
    max_size: int,
    max_memory: int | None = None,
    left_aside: Sequence[str] = (),
    base: BaseWeights | None = None,
) -> Adapter:
    """The adapter in `folder`, checked completely against the base's `modules` (by path).

    `max_size` is of its files and `max_memory` of what it takes once it is ready, in bytes. `left_aside` names what lay
    beside the files that were brought into the folder, and copies of the base's numbers are held against `base`. Raises
    InvalidAdapter with every problem found, or TooLarge.
    """
    size_bytes = listing.check_size(folder, max_size)
    problems, warnings = Problems(), list[str]()
    aside = listing.left_aside([*listing.names_in(folder), *left_aside])
    if said := listing.warning_of(aside):
        warnings.append(said)
    listing.check_listing(folder, aside, problems)
    whole = _open(folder, problems)
    files, head = _beheaded(whole, modules, problems, warnings)
    reading = _reading(files, head, modules, problems, warnings)
    found: tuple[AdaptedModule, ...] = ()
    if whole.tensors is not None and files.tensors is not None:
        contents.check_values(whole.tensors, problems, _index_test(reading))
        if reading is not None:
            naming = naming_of(modules, files.tensors)
            offered = Base(naming.outside(modules), max_rank, naming.weights(base))
            found = naming.inside(reading.modules(files.tensors, offered, problems, warnings))
        if not problems.has("wrong_dtype", "wrong_shape"):
            contents.check_effect(found, problems, warnings)
    _check_memory((*found, *(() if head is None else head.modules)), max_memory, problems)
    problems.raise_if_any()
    # What could not be read is a problem, so everything is there from here on.
    assert reading is not None
    assert whole.config is not None
    assert whole.tensors is not None
    digest = contents.digest(peft_config.canonical(whole.config), whole.tensors)
    return _build(reading, found, head, digest, size_bytes, warnings, own_num_tokens(whole.tensors, modules))


def _check_memory(modules: Sequence[AdaptedModule], most: int | None, problems: Problems) -> None:
    """What is made of a small file can be as large as the base."""
    terms = [term for module in modules for term in module.terms]
    taken = sum(matrix.num_bytes for term in terms for matrix in term.matrices)
    taken += sum(4 * term.count * term.past_width for term in terms if isinstance(term, Prefix) and term.past is None)
    if most is not None and taken > most:
        problems.add(
            "unsupported_feature",
            TENSOR_FILE,
            f"Not served: ready for use it takes {taken:,} bytes, since what it does has no small factors; this server "
            f"takes {most:,} (--max-adapter-memory). Adapt fewer modules, or merge it and take a low-rank adapter of "
            "the result (`manylora extract`).",
        )


def _index_test(reading: Reading | None) -> Callable[[str], bool]:
    """Which tensors hold whole numbers; none where it is not known what they are."""
    return (lambda name: False) if reading is None else reading.is_index


def read_trusted(folder: Path, modules: Mapping[str, ModuleSpec], *, digest: str = "") -> Adapter:
    """An adapter that `read` accepted before, again and fast: no value is looked at and nothing is hashed.

    Header, config, names and shapes are still checked, so that a file that was damaged, or a base that was
    changed since, is an InvalidAdapter and never read out of bounds. Which modules it adapts is what its tensors
    say: the config's lists and patterns were held against them by `read`. `digest` is passed on.
    """
    problems, warnings = Problems(), list[str]()
    whole = _open(folder, problems)
    files, head = _beheaded(whole, modules, problems, warnings)
    reading = _reading(files, head, modules, problems, warnings)
    found: tuple[AdaptedModule, ...] = ()
    if reading is not None and files.tensors is not None:
        naming = naming_of(modules, files.tensors)
        found = naming.inside(reading.accepted(files.tensors, naming.outside(modules), problems, warnings))
        is_index = _index_test(reading)
        for name, view in (whole.tensors or {}).items():
            if view.dtype not in contents.SERVED_DTYPES and not is_index(name):
                problems.add("wrong_dtype", f"{TENSOR_FILE}: {shown(name)}", f"It is {view.dtype}.")
    if not problems and not (found or isinstance(reading, _HeadAlone)):
        listing.check_listing(folder, listing.names_in(folder), problems)
        if not problems:
            problems.add("missing_tensor", TENSOR_FILE, "It has none of the tensors that the config asks for.")
    problems.raise_if_any()
    assert reading is not None
    assert whole.tensors is not None
    num_tokens = own_num_tokens(whole.tensors, modules)
    return _build(reading, found, head, digest, listing.size_of(folder), warnings, num_tokens)


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
