"""Connections to PostgreSQL on which nothing waits for ever. Imported only where the driver is installed.

A server that is stopped, or behind a network that swallows packets, closes no connection and answers nothing, and no
time-out of its own fires. So the driver's end watches the silence: after `timeout_s` of it an operation fails and its
connection is given up. The server's end is told to give up as well, so that it keeps no lock for a client that left.
"""

import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import psycopg
from psycopg import errors
from sqlalchemy import Engine, event

from manylora.faults import NoAnswer

__all__ = ["Connection", "connect_in_time", "listening"]

R = TypeVar("R")
_LEAST_CONNECT_S: Final = 2  # libpq's own
_KEEP_ALIVE: Final = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}


class Silence(psycopg.OperationalError, NoAnswer):
    """The server has said nothing for too long."""


class Connection(psycopg.Connection[Any]):
    """`timeout_s` is the longest silence within one operation."""

    timeout_s: float = math.inf

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """Every operation of the driver comes through here. Raises Silence."""
        return super().wait(self._watched(gen), *args, **kwargs)

    def _watched(self, gen: Any) -> Any:
        try:
            wanted = next(gen)
            heard = time.monotonic()
            while True:
                is_ready = yield wanted  # 0, a few times a second, while there is nothing
                now = time.monotonic()
                if is_ready:
                    heard = now
                elif now - heard > self.timeout_s:
                    self.close()  # what it would say later belongs to nobody
                    raise Silence(f"it has not answered for {self.timeout_s:g} s")
                wanted = gen.send(is_ready)
        except StopIteration as done:
            return done.value


@asynccontextmanager
async def listening(engine: Engine, channels: Sequence[str], timeout_s: float) -> AsyncIterator[AsyncIterator[str]]:
    """The channels that are notified, as they are, on a connection outside the pool; a dead network ends it.

    Raises ConnectionError where none can be made, or the one that there was is gone.
    """
    args, options = engine.dialect.create_connect_args(engine.url)
    limits = {"connect_timeout": max(_LEAST_CONNECT_S, math.ceil(timeout_s)), **_KEEP_ALIVE}
    try:
        connection = await psycopg.AsyncConnection.connect(*args, **{**limits, **options}, autocommit=True)
        try:
            for channel in channels:
                await connection.execute(f"LISTEN {channel}".encode())
            yield (notice.channel async for notice in connection.notifies())
        finally:
            await connection.close()
    except psycopg.Error as error:
        raise ConnectionError("the database cannot be listened to") from error


def connect_in_time(engine: Engine, timeout_s: float) -> None:
    """Give up connecting, locks and silent statements after `timeout_s`."""

    def connect(_dialect: object, _record: object, args: Any, options: dict[str, Any]) -> Connection:
        options.setdefault("connect_timeout", max(_LEAST_CONNECT_S, math.ceil(timeout_s)))
        try:
            connection = Connection.connect(*args, **options)
        except errors.ConnectionTimeout as error:
            raise Silence("no connection to it could be made in time") from error
        connection.timeout_s = timeout_s
        limits = {"statement_timeout": 2 * timeout_s, "lock_timeout": timeout_s, "tcp_user_timeout": timeout_s}
        for name, seconds in limits.items():
            connection.execute("SELECT set_config(%s, %s, false)", (name, str(math.ceil(seconds * 1000))))
        connection.commit()
        return connection

    event.listen(engine, "do_connect", connect)
