"""The steps between bytes that came in and a version that may be named: quarantine, validate, try.

Everything happens in a folder of its own below `quarantine/`, which is removed whatever the outcome, and swept
at start.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from manylora.catalog.archive import unpack
from manylora.catalog.base_names import BaseNames
from manylora.catalog.card import lineage_in, read_card
from manylora.catalog.defaults import not_used, read_file
from manylora.catalog.files import blob_of_folder
from manylora.catalog.receive import Received
from manylora.catalog.records import MAX_DESCRIPTION, MAX_NOTE, NewVersion, Payer, Wish, new_id
from manylora.engine.interface import AdapterRef, Effect, EngineClient, TextCodec
from manylora.errors import InvalidAdapter, InvalidRequest, ManyloraError, Problem, quoted
from manylora.faults import file_errors
from manylora.files import clear_folder, remove_tree
from manylora.identity import ADAPTER_FILES, Author, Vocabulary
from manylora.lora.format import reader as lora_format
from manylora.lora.format.added_tokens import read_added_tokens
from manylora.lora.format.reader import Adapter, ModuleSpec
from manylora.lora.format.spec import BaseWeights, Head

# Hears what a tenant's upload has run, of which adapter and how many tokens; returns once that is kept for good.
Charge = Callable[[str, AdapterRef, int], Awaitable[None]]
# Makes text of the defaults that came for a tenant's adapter, once they are found to be right.
CheckedDefaults = Callable[[Mapping[str, Any], str], Awaitable[str]]

_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}
# Each validation holds an adapter's tensors; a few at once keep the processors busy.
_MAX_VALIDATIONS: Final = 2
_REMOVE_AGAIN_S: Final = 0.5
_LABELS_SHOWN: Final = 64  # of a head, in the report
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """What an adapter is measured against: the base's modules and the limits."""

    modules: Mapping[str, ModuleSpec]
    max_rank: int
    max_bytes: int
    base: BaseWeights | None = None
    names: BaseNames = field(default_factory=BaseNames)
    max_memory: int | None = None

    def read(self, folder: Path, left_aside: Sequence[str] = ()) -> Adapter:
        """Validate the files in `folder`; `left_aside` lay beside them. Raises InvalidAdapter with every problem."""
        adapter = lora_format.read(
            folder,
            self.modules,
            max_rank=self.max_rank,
            max_size=self.max_bytes,
            max_memory=self.max_memory,
            left_aside=left_aside,
            base=self.base,
        )
        warning = self.names.warning(adapter.base_model_name_or_path)
        adapter.warnings.extend([] if warning is None else [warning])
        return adapter

    def with_vocabulary(self, adapter: Adapter, folder: Path, codec: TextCodec) -> Adapter:
        """With what is its own of the tokenizer in `folder`, which counts as content and in its size.

        `codec` is the base's.
        """
        added = read_added_tokens(folder, adapter.warnings)
        num_rows = next((spec.in_features for spec in self.modules.values() if spec.kind == "embedding"), 0)
        most = adapter.num_tokens or num_rows
        own = codec.vocabulary_of(added.tokens, added.end, adapter.num_tokens, most, adapter.warnings)
        size_bytes = adapter.size_bytes + _size_of(own)
        if own is None or not own.tokens:
            return replace(adapter, vocabulary=own, size_bytes=size_bytes)
        former, digest = adapter.digest, sha256(f"{adapter.digest} {own.text}".encode()).hexdigest()
        return replace(adapter, vocabulary=own, digest=digest, former_digest=former, size_bytes=size_bytes)


@dataclass(frozen=True, slots=True)
class Brought:
    """An adapter's files in a folder of ours, and the names of what lay beside them."""

    folder: Path
    left_aside: Sequence[str] = ()


# Fills a folder of the quarantine, and says where what is in it goes.
Receive = Callable[[Path], Awaitable[tuple[Wish, Brought]]]


class Quarantine:
    """Folders for uploads in progress, and the queue for the validator."""

    def __init__(self, root: Path, rules: Rules) -> None:
        self._root = root
        self._rules = rules
        self._validations = asyncio.Semaphore(_MAX_VALIDATIONS)
        self._removing: set[asyncio.Task[None]] = set()
        with file_errors("The folder for uploads cannot be made"):
            clear_folder(root)

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[Path]:
        """A new empty folder, removed at the end. Raises StorageFull or StoreUnavailable for any trouble with files."""
        with file_errors("The upload cannot be taken"):
            folder = self._root / secrets.token_hex(8)
            try:
                folder.mkdir()
                yield folder
            finally:
                await self._remove(folder)

    async def _remove(self, folder: Path) -> None:
        await asyncio.to_thread(remove_tree, folder)
        if folder.exists():  # not even its entries could be listed: out of descriptors, for example
            task = asyncio.create_task(self._remove_later(folder), name=f"remove {folder.name}")
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)

    async def _remove_later(self, folder: Path) -> None:
        while folder.exists():
            await asyncio.sleep(_REMOVE_AGAIN_S)
            await asyncio.to_thread(remove_tree, folder)

    async def aclose(self) -> None:
        """Leave what could not be removed to the next start."""
        for task in self._removing:
            task.cancel()
        await asyncio.gather(*self._removing, return_exceptions=True)

    async def validate(self, brought: Brought) -> Adapter:
        """Read and check the files, a few uploads at a time. Raises InvalidAdapter with every problem."""
        async with self._validations:
            return await asyncio.to_thread(self._rules.read, brought.folder, brought.left_aside)

    async def accept(
        self, brought: Brought, wish: Wish, checked: CheckedDefaults, codec: TextCodec
    ) -> tuple[Adapter, Wish]:
        """The adapter, and the wish with what came beside it. Raises InvalidAdapter with all problems."""
        problems: list[Problem] = []
        adapter, text = None, None
        try:
            beside = await asyncio.to_thread(not_used, brought.folder, brought.left_aside)
            adapter = await self.validate(replace(brought, left_aside=beside))
        except InvalidAdapter as error:
            problems += error.problems
        try:
            defaults = await asyncio.to_thread(read_file, brought.folder)
            text = None if defaults is None else await checked(defaults, wish.tenant)
        except InvalidAdapter as error:
            problems += error.problems
        if adapter is None or problems:
            raise InvalidAdapter(problems)
        card, warning = await asyncio.to_thread(read_card, brought.folder)
        adapter.warnings.extend([] if warning is None else [warning])
        lineage = await asyncio.to_thread(lineage_in, card or "")
        async with self._validations:
            adapter = await asyncio.to_thread(self._rules.with_vocabulary, adapter, brought.folder, codec)
        return adapter, replace(wish, defaults=text, card=card, lineage=lineage)

    async def unpack(self, received: Received) -> Brought:
        """The adapter's files, from either form of upload. Raises InvalidAdapter or TooLarge."""
        if not received.has_archive:
            return Brought(received.adapter_folder, received.left_aside)
        async with self._validations:
            target, max_bytes = received.adapter_folder, self._rules.max_bytes
            others = await asyncio.to_thread(unpack, received.archive, target, max_bytes=max_bytes)
        return Brought(target, [*others, *received.left_aside])


@dataclass(slots=True)
class Trial:
    """What the engine found. Once the adapter is `published`, that version takes over what host memory holds of it."""

    effect: Effect
    published: AdapterRef | None = None


@asynccontextmanager
async def tried(engine: EngineClient, adapter: Adapter, wish: Wish, charge: Charge) -> AsyncIterator[Trial]:
    """What the adapter does to the base, tried under a reference that nobody else knows, at the payer's expense.

    Raises InvalidAdapter (`no_effect`, `not_finite`).
    """
    virtual, invocation = adapter.num_virtual_tokens, adapter.invocation
    ref = AdapterRef(
        new_id("probe"),
        wish.tenant,
        wish.name,
        0,
        adapter.digest,
        virtual,
        invocation,
        vocabulary=adapter.vocabulary,
    )
    published: AdapterRef | None = None
    try:
        trial = Trial(await _measured(engine, ref, adapter, wish.payer, charge))
        yield trial
        published = trial.published
    finally:
        try:
            await engine.forget(ref, heir=published)
        except ManyloraError as error:
            if published is None:
                raise
            _log.warning("%s/%s is published, and what was tried stays in memory: %s", wish.tenant, wish.name, error)


async def _measured(
    engine: EngineClient, ref: AdapterRef, adapter: Adapter, payer: Payer | None, charge: Charge
) -> Effect:
    tenant, weight = (ref.tenant, 1.0) if payer is None else (payer.tenant, payer.weight)
    effect = await engine.measure_effect(ref, adapter, tenant=tenant, weight=weight)
    if payer is not None:  # for what was run, whatever it says
        await charge(payer.tenant, ref, effect.num_tokens_run)
    if not (math.isfinite(effect.max_abs_logit_delta) and math.isfinite(effect.kl)):
        message = "With this adapter the model's logits are not finite. Its weights are too large; train it again."
        raise InvalidAdapter([Problem("not_finite", "effect", message)])
    if effect.max_abs_logit_delta == 0:
        message = (
            "Its head gives different texts the same scores, so it would tell nothing. Was it saved before training?"
            if adapter.head is not None
            else "The logits with this adapter equal the base model's, so it would do nothing. "
            "Was it saved before training (B is zero), or is its alpha 0?"
        )
        raise InvalidAdapter([Problem("no_effect", "effect", message)])
    return effect


def new_version(folder: Path, adapter: Adapter, effect: Effect | None, *, blob: str | None = None) -> NewVersion:
    """What the registry keeps of a validated adapter. Without `blob` it hashes the files: from a worker thread."""
    return NewVersion(
        id=new_id("version"),
        digest=adapter.digest,
        blob=blob or blob_of_folder(folder),
        kind=adapter.kind,
        rank=adapter.rank,
        alpha=adapter.alpha,
        target_modules=tuple(adapter.target_modules),
        size_bytes=sum((folder / name).stat().st_size for name in ADAPTER_FILES) + _size_of(adapter.vocabulary),
        report=report_of(adapter, effect),
        virtual_tokens=adapter.num_virtual_tokens,
        invocation=adapter.invocation,
        head="" if adapter.head is None else adapter.head.task,
        vocabulary="" if adapter.vocabulary is None else adapter.vocabulary.text,
        former_digest=adapter.former_digest,
    )


def _size_of(vocabulary: Vocabulary | None) -> int:
    """Bytes that the registry keeps of it."""
    return 0 if vocabulary is None else len(vocabulary.text.encode())


def report_of(adapter: Adapter, effect: Effect | None) -> dict[str, Any]:
    """The validation report of the API. Offline there is no effect: nothing ran."""
    measured = None if effect is None else asdict(effect)
    named = adapter.base_model_name_or_path
    return {
        "matched": list(adapter.matched),
        "warnings": list(adapter.warnings),
        "effect": measured,
        "base_model": None if named is None else quoted(named),
        **({} if adapter.head is None else {"head": _head(adapter.head)}),
    }


def _head(head: Head) -> dict[str, Any]:
    """What of a head is told to whoever looks at the adapter."""
    told = list(head.labels[:_LABELS_SHOWN])
    return {"task": head.task, "problem": head.problem, "num_labels": len(head.labels), "labels": told}


def wish_of(fields: Mapping[str, str], tenant: str, author: Author) -> Wish:
    """What the form's text fields ask for. Raises InvalidRequest."""
    if "name" not in fields:
        raise InvalidRequest("The field 'name' is required.", param="name")
    pinned, activate = (_boolean(fields, key) for key in ("pinned", "activate"))
    author = replace(author, note=fields.get("note", ""))
    return Wish(tenant, fields["name"], fields.get("description"), pinned, activate, author=author)


def check_description(text: str | None) -> None:
    """Raises InvalidRequest for one that is too long, or that not every database can store."""
    _check_text("description", text or "", MAX_DESCRIPTION)


def check_note(text: str) -> None:
    """As `check_description`, for what somebody notes about a change."""
    _check_text("note", text, MAX_NOTE)


def _check_text(param: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise InvalidRequest(f"'{param}' is longer than {longest} characters.", param=param)
    if "\0" in text:
        raise InvalidRequest(
            f"'{param}' holds the character U+0000, which cannot be stored. Leave it out.", param=param
        )


def _boolean(fields: Mapping[str, str], key: str) -> bool | None:
    if key not in fields:
        return None
    value = _BOOLEANS.get(fields[key].strip().lower())
    if value is None:
        raise InvalidRequest(f"'{key}' must be 'true' or 'false'.", param=key)
    return value
