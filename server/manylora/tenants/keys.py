"""API keys: `ml_<prefix>_<secret>`, made once, shown once, kept as a hash.

The secret is 256 random bits, so nobody can guess it from its hash, whatever the hash's speed. A slow hash
(bcrypt, Argon2) protects short passwords that people choose; here it would only slow every request down.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import BindParameter, bindparam, select, tuple_, update

from manylora.database.changes import add_change
from manylora.database.database import Database, revision_in
from manylora.database.tables import KeyRow
from manylora.errors import Conflict, InvalidRequest, NotFound, quoted
from manylora.identity import OPERATOR, Author
from manylora.tenants.interface import Role

MAX_KEY_NAME: Final = 100  # characters
_KEY: Final = re.compile(r"ml_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# Compared with when no such key exists, so that the answer takes as long as for a wrong secret.
_NO_HASH: Final = "0" * 64

# Times of use in one transaction: it holds their rows until it ends.
_NOTED_AT_ONCE: Final = 1000


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key; times in Unix microseconds. `prefix` is the part that may be shown again."""

    id: str
    tenant: str
    role: Role
    prefix: str
    secret_hash: str
    created: int
    last_used: int | None
    revoked: int | None
    expires: int | None = None
    name: str = ""

    def is_over(self, now_us: int) -> bool:
        """Whether it was revoked, or its time has come."""
        return self.revoked is not None or (self.expires is not None and self.expires <= now_us)


def parse_key(text: str) -> tuple[str, str] | None:
    """Prefix and secret of a key as its holder sends it."""
    match = _KEY.fullmatch(text)
    return (match[1], match[2]) if match else None


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def is_secret_of(key: Key | None, secret: str) -> bool:
    """Whether the secret is that of a key which holds still, in a time that tells nothing of either."""
    expected = _NO_HASH if key is None else key.secret_hash
    is_same = hmac.compare_digest(expected, hash_secret(secret))
    return is_same and key is not None and not key.is_over(time.time_ns() // 1000)


def check_tenant(tenant: str) -> None:
    """Refuse what cannot be a tenant's name. Raises InvalidRequest."""
    if not _TENANT.fullmatch(tenant):
        raise InvalidRequest(
            f"'{quoted(tenant)}' cannot be a tenant: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit.",
            param="tenant",
        )


class KeyStore:
    """The keys in the database. Methods block."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant: str,
        role: Role,
        *,
        name: str = "",
        expires: int | None = None,
        author: Author = OPERATOR,
        must_keep_admin: bool = False,
    ) -> tuple[Key, str]:
        """A new key and its full text, which cannot be had again. `expires`: in Unix microseconds.

        Raises InvalidRequest; or Conflict with `must_keep_admin`, where it is the first key and no admin's, so that
        nobody could make another one over HTTP.
        """
        check_tenant(tenant)
        check_key_name(name)
        prefix, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        row = KeyRow(
            id=f"key_{secrets.token_hex(12)}",
            tenant=tenant,
            role=role.value,
            prefix=prefix,
            secret_hash=hash_secret(secret),
            created=time.time_ns() // 1000,
            last_used=None,
            revoked=None,
            expires=expires,
            name=name,
        )
        with self._database.write("tenants") as session:
            row.revision = revision_in(session, "tenants")
            is_first = session.execute(select(KeyRow.id).limit(1)).first() is None
            if must_keep_admin and is_first and role is not Role.ADMIN:
                raise Conflict(
                    "This would be the first key, after which nobody is let in without one: make one with the role "
                    "'admin' first, or no other could be made over HTTP."
                )
            session.add(row)
            add_change(session, author, "key", tenant, row.id, "create")
        return _key(row), f"ml_{prefix}_{secret}"

    def changed(self, since: int) -> tuple[list[Key], int]:
        """The keys that changes after revision `since` made or revoked, and the last of these; with -1 all keys."""
        with self._database.read(is_long=True) as session:
            rows = session.execute(select(KeyRow).where(KeyRow.revision > since)).scalars().all()
            return [_key(row) for row in rows], max((row.revision for row in rows), default=-1)

    def list(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        with self._database.read(is_long=True) as session:
            return [_key(row) for row in session.execute(select(KeyRow).order_by(KeyRow.created)).scalars()]

    def get(self, key_id: str) -> Key:
        """The key with this id. Raises NotFound."""
        with self._database.read() as session:
            row = session.get(KeyRow, key_id)
            if row is None:
                raise _missing_key("GET /v1/keys lists them.")
            return _key(row)

    def page(self, tenant: str | None, limit: int, after: str | None) -> tuple[Sequence[Key], bool]:
        """At most `limit` keys of a tenant (None: of all) behind the key `after`, newest first; are there more?

        One range of an index, so a page costs the same at any depth. Raises InvalidRequest for an `after` that is no
        key's id.
        """
        query = select(KeyRow)
        if tenant is not None:
            query = query.where(KeyRow.tenant == tenant)
        with self._database.read() as session:
            if after is not None:
                last = session.get(KeyRow, after)
                if last is None:
                    raise InvalidRequest("'after' must be the id of the last key of the page before.", param="after")
                query = query.where(tuple_(KeyRow.created, KeyRow.id) < tuple_(last.created, last.id))
            query = query.order_by(KeyRow.created.desc(), KeyRow.id.desc()).limit(limit + 1)
            rows = session.execute(query).scalars().all()
            return [_key(row) for row in rows[:limit]], len(rows) > limit

    def revoke(self, name: str, *, author: Author = OPERATOR) -> Key:
        """End a key, named by id, prefix or in full. Revoking again changes nothing. Raises NotFound."""
        parsed = parse_key(name)
        prefix = parsed[0] if parsed else name.removeprefix("ml_")
        with self._database.write("tenants") as session:
            query = select(KeyRow).where((KeyRow.id == name) | (KeyRow.prefix == prefix))
            row = session.execute(query).scalar_one_or_none()
            if row is None:
                raise _missing_key("`manylora keys list` shows ids and prefixes.")
            if row.revoked is None:
                row.revoked = time.time_ns() // 1000
                add_change(session, author, "key", row.tenant, row.id, "revoke")
            row.revision = revision_in(session, "tenants")
        return _key(row)

    def note_used(self, times: dict[str, int]) -> None:
        """Store last-used times (Unix microseconds) by key id, without telling other servers of a change.

        The keys are in order, so that two servers which write the same ones never wait for each other, and a later
        time stays, whoever writes last.
        """
        used: BindParameter[int] = bindparam("used")
        later = update(KeyRow).where(
            KeyRow.id == bindparam("key_id"), (KeyRow.last_used.is_(None)) | (KeyRow.last_used < used)
        )
        rows = [{"key_id": key_id, "used": times[key_id]} for key_id in sorted(times)]
        for start in range(0, len(rows), _NOTED_AT_ONCE):
            with self._database.write(None) as session:
                session.connection().execute(later.values(last_used=used), rows[start : start + _NOTED_AT_ONCE])


def check_key_name(name: str) -> None:
    """Raises InvalidRequest for one that is too long or cannot be shown in one line."""
    if len(name) > MAX_KEY_NAME or not name.isprintable():
        raise InvalidRequest(f"A key's name has up to {MAX_KEY_NAME} printable characters.", param="name")


def _missing_key(advice: str) -> NotFound:
    return NotFound(f"There is no such key. {advice}")


def _key(row: KeyRow) -> Key:
    return Key(
        id=row.id,
        tenant=row.tenant,
        role=Role(row.role),
        prefix=row.prefix,
        secret_hash=row.secret_hash,
        created=row.created,
        last_used=row.last_used,
        revoked=row.revoked,
        expires=row.expires,
        name=row.name,
    )
