"""The gate: keys and quotas in memory, kept equal to the database."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, TypeVar

from manylora.database.database import Database
from manylora.database.notices import Notices
from manylora.database.replicas import Replicas
from manylora.errors import AuthenticationFailed, ManyloraError, Unavailable
from manylora.identity import PUBLIC_TENANT
from manylora.tenants.buckets import SharedBuckets
from manylora.tenants.interface import Lease, Principal, Role
from manylora.tenants.keys import Key, KeyStore, hash_secret, is_secret_of, parse_key
from manylora.tenants.limits import TenantStore
from manylora.tenants.quotas import Quotas
from manylora.tenants.seal import Seal, reopened
from manylora.tenants.shared_quotas import SharedQuotas

# Last-used times are written together, this often.
_FLUSH_S: Final = 15.0
T = TypeVar("T")
_log = logging.getLogger(__name__)


class TenantGate:
    """Implements `tenants.interface.Gate`. Used on the event loop's thread; queries run on worker threads.

    Other processes (`manylora keys create`, another server) change the same database: `start` follows them.
    """

    def __init__(
        self,
        database: Database,
        seal: Seal | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        replicas: Replicas | None = None,
        count_fallback: Callable[[], None] = lambda: None,
    ) -> None:
        """With `replicas`, the servers on a database that several can use, quotas hold for all of them together.

        `count_fallback` hears of each request that was admitted without them, as the database did not answer. Raises
        StartupError where there was a key once and there is none now.
        """
        self._database = database
        self._seal = seal
        self._is_sealed = False
        self._was_closed = seal is not None and seal.is_set()
        self.key_store = KeyStore(database)
        self.tenant_store = TenantStore(database)
        self._quotas = Quotas(clock)
        self._shared: SharedQuotas | None = None
        if replicas is not None and not database.is_sqlite:
            buckets = SharedBuckets(database, replicas)
            self._shared = SharedQuotas(database, buckets, self._quotas, clock=clock, count_fallback=count_fallback)
        self._keys: dict[str, Key] = {}
        self._lent: dict[str, Key] = {}
        self._used: dict[str, int] = {}
        self._seen = -1
        self._num_untraced = -1
        self._task: asyncio.Task[None] | None = None
        self._load()
        if self._was_closed and not self._keys:
            raise reopened()

    @property
    def is_open(self) -> bool:
        """Whether no key was ever made. Revoking the last key, or losing the database, does not open a server again.

        The mark in the data folder is looked at, too: the first key that a command makes there holds when it returns.
        """
        if self._keys or self._was_closed:
            return False
        if self._seal is None or not self._seal.is_in_folder():
            return True
        self._was_closed = True
        try:
            self._load_all()  # on the caller's thread, once: whoever has the new key is let in with it
        except ManyloraError as error:
            _log.warning("This server has its first key, which cannot be read yet: %s", error.message)
        return False

    def authenticate(self, authorization: str | None) -> Principal:
        """The caller behind `Bearer <key>`. Raises one AuthenticationFailed whatever is wrong with a key."""
        if self.is_open:
            return Principal(PUBLIC_TENANT, Role.ADMIN, weight=self._quotas.limits_of(PUBLIC_TENANT).weight)
        if not authorization or authorization.isspace():
            raise AuthenticationFailed("This server needs an API key: send 'Authorization: Bearer <key>'.")
        scheme, *rest = authorization.split(maxsplit=1)
        parsed = parse_key(rest[0].strip()) if rest and scheme.lower() == "bearer" else None
        key = None if parsed is None else self._keys.get(parsed[0]) or self._lent.get(parsed[0])
        is_valid = is_secret_of(key, "" if parsed is None else parsed[1])
        if key is None or not is_valid:
            raise AuthenticationFailed("The API key is not known, has expired or was revoked.")
        if key.prefix not in self._lent:
            self._used[key.id] = time.time_ns() // 1000
        return Principal(key.tenant, key.role, key.id, self._quotas.limits_of(key.tenant).weight)

    @contextmanager
    def lending(self, tenant: str, borrower: str) -> Iterator[str]:
        """A manager's key of the tenant that this server alone knows, and only in the block; its id is the borrower's.

        An open server asks for none and gets an empty one.
        """
        if self.is_open:
            yield ""
            return
        prefix, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        now = time.time_ns() // 1000
        self._lent[prefix] = Key(borrower, tenant, Role.MANAGER, prefix, hash_secret(secret), now, None, None)
        try:
            yield f"ml_{prefix}_{secret}"
        finally:
            del self._lent[prefix]

    async def admit(self, principal: Principal, prompt_tokens: int, max_completion_tokens: int) -> Lease:
        """Charge a request to its tenant's quotas. Raises QuotaExceeded."""
        tokens = prompt_tokens + max_completion_tokens
        if self._shared is not None:
            return await self._shared.admit(principal.tenant, tokens)
        return self._quotas.admit(principal.tenant, tokens)

    def start(self, notices: Notices | None = None) -> None:
        """Follow the database until `aclose`; `notices` say when other processes changed something."""
        watching = self._watch(notices or Notices(self._database))
        self._task = asyncio.create_task(watching, name="tenants-watch")
        if self._shared is not None:
            self._shared.start()

    async def aclose(self) -> None:
        """Stop following, and write the last-used times that are still to write."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._shared is not None:
            await self._shared.aclose()
        try:
            await self._flush()
        except ManyloraError as error:
            _log.warning("When keys were last used could not be written: %s", error.message)

    async def refresh(self) -> None:
        """Look at the database now."""
        await self._database.run(self._load)

    async def run(self, query: Callable[[], T]) -> T:
        """What a query of `key_store` or `tenant_store` gives, run on a worker thread."""
        return await self._database.run(query)

    async def change(self, change: Callable[[], T]) -> T:
        """`run` for what changes keys or quotas, which hold here when it returns."""
        done = await self._database.run(change)
        await self.refresh()
        return done

    def _load(self) -> None:
        revision, num_untraced = self._database.traced_revision("tenants")
        if revision != self._seen:
            is_traced = revision >= self._seen >= 0 and num_untraced == self._num_untraced
            if not is_traced or not self._load_changes(revision):
                self._load_all()
            self._was_closed = self._was_closed or bool(self._keys)
            self._seen, self._num_untraced = revision, num_untraced
        self._keep_closed()

    def _load_changes(self, revision: int) -> bool:
        """Take over what changed since the last look. False where the last change is in no row."""
        keys, last_key = self.key_store.changed(self._seen)
        limits, last_tenant = self.tenant_store.changed(self._seen)
        if max(last_key, last_tenant) < revision:
            return False
        self._keys.update({key.prefix: key for key in keys})
        self._quotas.update_limits(limits)
        return True

    def _load_all(self) -> None:
        keys = {key.prefix: key for key in self.key_store.changed(-1)[0]}
        self._quotas.set_limits(self.tenant_store.changed(-1)[0])
        if self._keys and not keys:
            _log.error("The database has lost its API keys: nobody is let in until it has some again")
        self._keys = keys

    def _keep_closed(self) -> None:
        """Note outside the database that there are keys, once there are."""
        if self._seal is None or self._is_sealed or not self._keys:
            return
        try:
            self._seal.set()
            self._is_sealed = True
        except ManyloraError as error:
            _log.warning("That this server has keys was not noted, and is tried again: %s", error.message)

    async def _flush(self) -> None:
        used, self._used = self._used, {}
        if not used:
            return
        try:
            await self._database.run(partial(self.key_store.note_used, used))
        except ManyloraError:
            self._used = used | self._used  # later ones stay; written again with the next
            raise

    async def _watch(self, notices: Notices) -> None:
        flushed = time.monotonic()
        while True:
            await notices.wait("tenants")
            try:
                await self.refresh()
                if time.monotonic() - flushed >= _FLUSH_S:
                    await self._flush()
                    flushed = time.monotonic()
            except Unavailable:
                continue  # which the database has said
            except Exception:  # noqa: BLE001 - whatever it is, this goes on looking: a key that was taken back must end
                _log.exception("Keys and quotas stay as they were, times of use are kept; both are tried again")

    def check_integrity(self) -> None:
        self._quotas.check_integrity()
        if self._shared is not None:
            self._shared.check_integrity()
