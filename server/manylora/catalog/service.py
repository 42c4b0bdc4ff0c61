"""The catalog as the rest of the program uses it: registry, store and quarantine put together.

An adapter's way: quarantine folder → `lora.format.reader.read` → effect probe → store → one registry transaction →
visible. A crash at any point leaves either nothing or the whole adapter; `Catalog.open` sweeps the rest.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from starlette.requests import ClientDisconnect

from manylora.catalog import base_signature, folders, sources
from manylora.catalog.base_names import BaseNames
from manylora.catalog.belonging import check_owner
from manylora.catalog.blobs import Blobs
from manylora.catalog.canary_watch import Canaries
from manylora.catalog.card import card_of
from manylora.catalog.defaults import DefaultsCheck, canonical
from manylora.catalog.directory import Directory, Listed, missing
from manylora.catalog.files import FolderLock
from manylora.catalog.following import Follower
from manylora.catalog.freeing import Freeing
from manylora.catalog.materialise import Recipe, receive_mix
from manylora.catalog.receive import receive_form
from manylora.catalog.records import (
    AdapterRecord,
    ChangePage,
    Folder,
    Payer,
    Published,
    VersionPage,
    VersionRecord,
    Wish,
)
from manylora.catalog.registry import Registry
from manylora.catalog.residency import Pins, Retirement
from manylora.catalog.store import Store, open_store
from manylora.catalog.upload import (
    Brought,
    Charge,
    Quarantine,
    Receive,
    Rules,
    check_description,
    check_note,
    new_version,
    tried,
    wish_of,
)
from manylora.database.database import Database, open_database
from manylora.database.notices import Notices
from manylora.database.replicas import Replicas
from manylora.engine.interface import AdapterRef, EngineClient, Mix, Tier
from manylora.errors import InvalidSettings, ManyloraError
from manylora.identity import ADAPTER_FILES, BROUGHT_FILES, PUBLIC_TENANT, SERVER, TIERS, Author, check_name
from manylora.lora.format.folder import names_in
from manylora.lora.format.reader import Adapter, ModuleSpec
from manylora.lora.format.spec import BaseWeights
from manylora.settings import Settings

_log = logging.getLogger(__name__)


class Catalog:
    """Uploads, versions, names and files of all adapters.

    Built by `open` before the engine (which loads through it: it is an `AdapterSource`), told of the engine by
    `attach`, and used on the event loop from then on. Work that blocks runs on worker threads.
    """

    def __init__(self, database: Database, store: Store, lock: FolderLock, settings: Settings, rules: Rules) -> None:
        self.database = database
        self._store = store
        self._lock = lock
        self._rules = rules
        self._import_allow = settings.import_allow
        self._pin_replicas = settings.pin_replicas
        self._base = base_signature.signature_of(rules.modules)
        self._registry = Registry(database, self._base)
        self._blobs = Blobs(database, self._registry, store)
        self.replicas = Replicas(database, self._base.value)
        self._freeing = Freeing(database, self._registry, self._blobs, self.replicas)
        self._scratch = settings.data_dir / "quarantine"
        self._quarantine = Quarantine(self._scratch, rules)
        self._engine: EngineClient | None = None
        self._retirement: Retirement | None = None
        self._pins: Pins | None = None
        self.following = Follower(database, self._registry, self.refresh)
        self.canaries = Canaries(database, self._registry, self._base)
        self._labelling: asyncio.Task[None] | None = None
        self._is_closing = False
        self._count_upload: Callable[[str, str], None] = lambda _tenant, _result: None
        self._charge_probe: Charge = _charge_nobody
        self._check_defaults: DefaultsCheck = _take_any

    @classmethod
    def open(
        cls,
        settings: Settings,
        modules: Mapping[str, ModuleSpec],
        base: BaseWeights | None = None,
        *,
        base_name: str | None = None,
    ) -> "Catalog":
        """`base` has the modules' own numbers, for adapters that bring copies of them; `base_name` is the served one.

        Opens database and store, and clears away what a crash left. Raises StartupError.
        """
        max_bytes, max_memory = settings.max_adapter_size, settings.max_adapter_memory
        if isinstance(max_bytes, float) or isinstance(max_memory, float):
            raise InvalidSettings(
                "max_adapter_size and max_adapter_memory are sizes in bytes, such as '1GiB', not shares of memory."
            )
        with ExitStack() as stack:  # what was opened is closed again if the rest fails
            lock = FolderLock(settings.data_dir)
            stack.callback(lock.release)
            database = open_database(settings.resolved_database_url, settings.database_timeout_s)
            stack.callback(database.close)
            is_shared = not database.is_sqlite
            store = open_store(settings.resolved_store_url, settings.data_dir / "cache", is_shared=is_shared)
            stack.callback(store.close)
            check_owner(store, database)
            names = BaseNames((base_name, settings.served_name, settings.model))
            rules = Rules(modules, settings.max_rank, max_bytes, base, names, max_memory)
            catalog = cls(database, store, lock, settings, rules)
            catalog._blobs.sweep(settings.orphan_days)
            stack.pop_all()
        return catalog

    @property
    def directory(self) -> Directory:
        """Implements `catalog.interface.AdapterDirectory`."""
        return self._registry.directory

    @property
    def revision(self) -> int:
        """The number of the last change to the catalog that is known here."""
        return self._registry.revision

    @property
    def store(self) -> Store:
        """The store of the adapters' files, where other facts that have to outlive the database are kept too."""
        return self._store

    @property
    def num_orphans(self) -> int:
        """How many adapters' files were in `orphans/` once the catalog was open."""
        return self._blobs.num_orphans

    @property
    def base(self) -> str:
        """The served base's signature, as versions are registered for it."""
        return self._base.value

    def local_folder(self, ref: AdapterRef) -> Path:
        """Implements `engine.interface.AdapterSource`."""
        return self._blobs.local_folder(ref)

    async def attach(
        self,
        engine: EngineClient,
        *,
        count_upload: Callable[[str, str], None] | None = None,
        count_damaged: Callable[[], None] | None = None,
        charge_probe: Charge | None = None,
        check_defaults: DefaultsCheck | None = None,
        notices: Notices | None = None,
    ) -> None:
        """Work with this engine from now on: pin what is pinned, follow other processes' changes.

        `count_upload` hears of every upload's tenant and result, `count_damaged` of stored files that are not sound,
        `charge_probe` of what was run to find an upload's effect; the upload goes on once it has returned.
        `check_defaults` says what is wrong with a version's defaults, `notices` when other processes changed something.
        """
        self._engine = engine
        self._count_upload = count_upload or self._count_upload
        self._charge_probe = charge_probe or _charge_nobody
        self._check_defaults = check_defaults or _take_any
        self._blobs.count_damaged = count_damaged or self._blobs.count_damaged
        self._pins = Pins(engine, self.directory, self.replicas, self._pin_replicas)
        self._retirement = Retirement(engine, self.directory, self._freeing.free)
        await self._freeing.start(self._pins.share)
        self._pins.sync_all()
        self.following.start(notices or Notices(self.database))
        self.canaries.start()
        write_labels = asyncio.to_thread(self._blobs.write_missing_labels, lambda: self._is_closing)
        self._labelling = asyncio.create_task(write_labels, name="catalog-labels")

    async def aclose(self) -> None:
        """Stop background work and close the database. What was not freed yet is set aside at the next start."""
        self._is_closing = True
        if self._labelling is not None:
            await self._labelling
        await self.canaries.aclose()
        await self.following.aclose()
        if self._retirement is not None:
            await self._retirement.aclose()
            await self._freeing.aclose()
        await self._quarantine.aclose()
        await asyncio.to_thread(self.database.close)
        self._store.close()
        self._lock.release()

    # adding

    async def upload(
        self,
        tenant: str,
        body: AsyncIterator[bytes],
        content_type: str,
        content_length: int | None,
        *,
        payer: Payer | None = None,
        author: Author = SERVER,
    ) -> Published:
        """A multipart upload, for `tenant`. Raises InvalidAdapter, TooLarge, QuotaExceeded, InvalidRequest."""

        async def receive(folder: Path) -> tuple[Wish, Brought]:
            limit = self._rules.max_bytes
            received = await receive_form(body, content_type, folder, max_bytes=limit, content_length=content_length)
            wish = self._checked(replace(wish_of(received.fields, tenant, author), payer=payer))
            return wish, await self._quarantine.unpack(received)

        return await self.add(tenant, receive)

    async def import_from(self, wish: Wish, source: str) -> Published:
        """An import from a source on the allow-list. Raises what `upload` and `sources.fetch` raise."""

        async def receive(folder: Path) -> tuple[Wish, Brought]:
            self._checked(wish)
            allow, limit = self._import_allow, self._rules.max_bytes
            others = await asyncio.to_thread(sources.fetch, source, folder, allow=allow, max_bytes=limit)
            return wish, Brought(folder, others)

        return await self.add(wish.tenant, receive)

    async def save_mix(self, wish: Wish, mix: Mix, recipe: Recipe | None = None) -> Published:
        """A version that is a mix, or with a recipe one whose files are made of it. Raises Conflict and as `upload`."""
        if recipe is not None:
            made = partial(receive_mix, self._checked(wish), mix, recipe, self.local_folder, self._rules.modules)
            return await self.add(wish.tenant, made)
        saving = self.database.run(partial(self._registry.publish_mix, self._checked(wish), mix))
        return await self._counted(wish.tenant, saving)

    async def register_folder(self, root: Path) -> list[Published]:
        """Register the PEFT folders at or below `root` for the tenant `public`, each under its own name.

        An unchanged folder costs a `stat`. A broken one is logged with all its problems and not served, while a version
        registered earlier stays; the other folders are registered. Raises StartupError without `root`.
        """
        if self._blobs.missing:
            await asyncio.to_thread(self._blobs.mend_missing, root)
        return await folders.register(root, self._base.value, self._registry.folders, self._add_folder)

    async def _add_folder(self, found: folders.FoundFolder) -> Published | None:
        wish = self._checked(Wish(PUBLIC_TENANT, found.name, activate=True))
        async with self._quarantine.folder() as folder:
            files = {name: found.path / name for name in BROUGHT_FILES if (found.path / name).is_file()}
            if not files.keys() >= set(ADAPTER_FILES):
                await self._quarantine.validate(Brought(found.path))  # says what is there instead, such as a pickle
            await asyncio.to_thread(sources.copy_bounded, files, folder, self._rules.max_bytes)
            brought = Brought(folder, await asyncio.to_thread(names_in, found.path))
            adapter, wish = await self._quarantine.accept(brought, wish, self._checked_defaults, self._attached.codec)
            look = partial(self._registry.was_in_folder, wish, adapter.digest, found.stamp)
            was_there, known = await self.database.run(look)
            if not was_there:
                done = await self._publish(wish, folder, adapter, found.stamp)
            elif known is not None:
                await asyncio.to_thread(self._blobs.mend, folder, known.version.blob)
                await self._labelled(wish, known)
        known = known if was_there else await self._with_pin(done)
        folders.say_kept(found, known)
        return known

    async def add(self, tenant: str, receive: Receive) -> Published:
        """What `receive` brings, taken as an upload is. Raises what `upload` and `receive` raise."""
        return await self._counted(tenant, self._add(receive))

    async def _add(self, receive: Receive) -> Published:
        async with self._quarantine.folder() as quarantine:
            wish, brought = await receive(quarantine)
            adapter, wish = await self._quarantine.accept(brought, wish, self._checked_defaults, self._attached.codec)
            done = await self._publish(wish, brought.folder, adapter)
        return await self._with_pin(done)

    async def _labelled(self, wish: Wish, done: Published) -> None:
        """Have a version's label say the card that came for it again."""
        if wish.card is not None:
            await asyncio.to_thread(self._blobs.relabel, done.version)

    async def _publish(self, wish: Wish, folder: Path, adapter: Adapter, stamp: Folder | None = None) -> Published:
        stored = self._newest_with(wish, adapter.digest)
        if stored is not None:
            await asyncio.to_thread(self._blobs.mend, folder, stored.blob)
        done = await self.database.run(partial(self._registry.republish, wish, adapter.digest, folder=stamp))
        if done is not None:
            await self._labelled(wish, done)
            return done
        size, pinned = adapter.size_bytes, bool(wish.pinned)
        await self.database.run(partial(self._registry.check_quota, wish.tenant, wish.name, size, pinned=pinned))
        async with tried(self._attached, adapter, wish, self._charge_probe) as trial:
            new = await asyncio.to_thread(new_version, folder, adapter, trial.effect)
            publish = partial(self._registry.publish, wish, new, folder=stamp)
            done = await asyncio.to_thread(self._blobs.keep, folder, new.blob, publish)
            if done.is_new:  # else another upload's files are that version's, equal in content and perhaps not in bytes
                trial.published = done.version.ref
        return done

    def _newest_with(self, wish: Wish, digest: str) -> Listed | None:
        """The version that an upload of this content will find to be there already."""
        entry = self.directory.own(wish.tenant, wish.name)
        newest = None if entry is None else entry.versions[max(entry.versions)]
        if newest is None or newest.ref.digest != digest or not newest.is_ready:
            return None
        return newest if wish.defaults in (None, newest.defaults) else None

    async def _with_pin(self, done: Published) -> Published:
        """Pin in the engine what the upload asked to pin. An upload that cannot be pinned stands, unpinned."""
        tenant, name = done.adapter.tenant, done.adapter.name
        try:
            self._pins_attached.sync(tenant, name)
        except ManyloraError as error:
            _log.warning("%s/%s was uploaded and cannot be pinned: %s", tenant, name, error.message)
            record = await self.database.run(partial(self._registry.update, tenant, name, pinned=False))
            return Published(record, done.version, done.is_new)
        return done

    def _checked(self, wish: Wish) -> Wish:
        check_name(wish.name, reserved=self._attached.model.name)
        check_description(wish.description)
        check_note(wish.author.note)
        return wish

    async def _counted(self, tenant: str, adding: Awaitable[Published]) -> Published:
        result = "failed"
        try:
            done = await adding
            result = "created" if done.is_new else "unchanged"
        except ManyloraError as error:
            result = "refused" if error.status < 500 else "failed"
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            result = "cancelled"
            raise
        finally:
            self._count_upload(tenant, result)
        return done

    # reading

    async def get_version(self, tenant: str, name: str, number: int) -> tuple[AdapterRecord, VersionRecord]:
        """The tenant's own adapter and one version of it. Raises AdapterNotFound."""
        return await self.database.run(partial(self._registry.get_version, tenant, name, number))

    async def versions(
        self, tenant: str, name: str, limit: int, before: int | None
    ) -> tuple[AdapterRecord, VersionPage]:
        """The tenant's own adapter with its newest versions, or those older than `before`. Raises AdapterNotFound."""
        return await self.database.run(partial(self._registry.versions, tenant, name, limit, before))

    async def page(
        self, tenants: Sequence[str] | None, limit: int, after: str | None
    ) -> tuple[list[AdapterRecord], bool]:
        """Adapters of these tenants (None: of all) newest first, and whether there are more."""
        return await self.database.run(partial(self._registry.page, tenants, limit, after))

    async def history(self, tenant: str, name: str, limit: int, before: int | None) -> ChangePage:
        """The newest changes to the tenant's own adapter, before the change `before`. Raises AdapterNotFound."""
        return await self.database.run(partial(self._registry.history, tenant, name, limit, before))

    async def changes(self, tenant: str | None, limit: int, before: int | None) -> ChangePage:
        """The newest changes to all that is one tenant's, None: to everything."""
        return await self.database.run(partial(self._registry.changes, tenant, limit, before))

    async def download(self, version: VersionRecord) -> IO[bytes]:
        """The version as a .tar.gz, an open file that the caller closes. Raises AdapterNotFound if it went away."""
        if self.directory.blob_of(version.ref.id) is None:
            raise missing(version.ref.name, version.ref.version)
        return await asyncio.to_thread(self._blobs.pack, version, self._scratch)

    async def card(self, version: VersionRecord) -> str:
        """The version's card, empty where it has none."""
        return await self.database.run(partial(card_of, self.database, version.ref.id))

    def has_other_name(self, version: VersionRecord) -> bool:
        """Whether the adapter names another model as its base than the one that is served."""
        return self._rules.names.differ_from(version.report.get("base_model"))

    def tier_of(self, ref: AdapterRef) -> Tier:
        """Where a version is; of a mix, where the one is that is farthest away."""
        return max(map(self._attached.tier_of, self.directory.refs_of(ref)), key=TIERS.index, default="disk")

    # changing

    async def update(
        self,
        tenant: str,
        name: str,
        *,
        active_version: int | None = None,
        pinned: bool | None = None,
        description: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        if_active: int | None = None,
        author: Author = SERVER,
    ) -> AdapterRecord:
        """Promote, pin, describe and set defaults in one step. Requests that run keep what they began with.

        `if_active` is the version that the caller believes to be active before. Raises AdapterNotFound, Conflict,
        QuotaExceeded, InvalidRequest for a description that cannot be stored, or InvalidAdapter with every reason
        against the defaults.
        """
        check_description(description)
        check_note(author.note)
        text = None if defaults is None else await self._checked_defaults(defaults, tenant)
        update = partial(self._registry.update, tenant, name, if_active=if_active, author=author)
        changed = partial(update, active_version=active_version, pinned=pinned, description=description, defaults=text)
        record = await self.database.run(changed)
        await self._follow(record)
        return record

    async def rollback(
        self, tenant: str, name: str, *, if_active: int | None = None, author: Author = SERVER
    ) -> AdapterRecord:
        """Make the version active again that was before the present one.

        Raises AdapterNotFound, InvalidRequest for a note that cannot be stored, or Conflict.
        """
        check_note(author.note)
        back = partial(self._registry.rollback, tenant, name, if_active=if_active, author=author)
        record = await self.database.run(back)
        await self._follow(record)
        return record

    async def _follow(self, record: AdapterRecord) -> None:
        """Let the label and the pin say what the registry says."""
        await asyncio.to_thread(self._blobs.relabel, record.active)
        try:
            self._pins_attached.sync(record.tenant, record.name)
        except ManyloraError:
            await self.database.run(partial(self._registry.update, record.tenant, record.name, pinned=False))
            raise

    async def _checked_defaults(self, defaults: Mapping[str, Any], tenant: str) -> str:
        text = canonical(defaults)
        await self._check_defaults(defaults, tenant)
        return text

    async def delete(self, tenant: str, name: str, version: int | None = None, *, author: Author = SERVER) -> None:
        """Unpublish now; memory and files go once no running request needs them.

        Raises AdapterNotFound, or Conflict for the active version while there are others.
        """
        gone = await self.database.run(partial(self._registry.delete, tenant, name, version, author=author))
        self._pins_attached.sync(tenant, name)
        for ref in gone:
            self._retirements.begin(ref)

    async def refresh(self) -> None:
        """Take over what other processes changed in the database."""
        if (changes := await self.database.run(self._registry.refresh)) is None:
            return
        self._pins_attached.sync_all(changes.names)
        for ref in changes.gone:
            self._retirements.begin(ref)

    @property
    def _attached(self) -> EngineClient:
        assert self._engine is not None, "attach() comes first"
        return self._engine

    @property
    def _pins_attached(self) -> Pins:
        assert self._pins is not None, "attach() comes first"
        return self._pins

    @property
    def _retirements(self) -> Retirement:
        assert self._retirement is not None, "attach() comes first"
        return self._retirement

    def check_integrity(self) -> None:
        """Assert that registry, directory and store agree, reading everything."""
        self._registry.check_integrity()
        assert all(map(self._store.has, self._registry.blobs())), "files of a blob are missing"


async def _charge_nobody(_tenant: str, _ref: AdapterRef, _num_tokens: int) -> None:
    """Nobody is charged."""


async def _take_any(_defaults: Mapping[str, Any], _tenant: str) -> None:
    """Nobody checks."""
