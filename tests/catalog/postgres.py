"""A PostgreSQL server of the tests' own, from the Debian package `postgresql`, on a socket in a folder."""

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

# PostgreSQL refuses to run as root; the package makes this user.
_USER = "postgres"


def programs() -> Path | None:
    """The folder with `initdb` and `postgres`; None where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@contextmanager
def running(programs: Path) -> Iterator["Cluster"]:
    """A fresh, empty server, gone at the end."""
    root = Path(tempfile.mkdtemp(prefix="manylora-postgres-", dir="/tmp"))  # short: a socket's path has 107 bytes
    user = None
    if os.geteuid() == 0:
        user = _USER
        pwd.getpwnam(user)
        shutil.chown(root, user)
    data = root / "data"
    try:
        subprocess.run(
            [str(programs / "initdb"), "-D", str(data), "-U", _USER, "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True, capture_output=True, user=user, cwd=root,
        )  # fmt: skip
        options = f"-k {root} -c listen_addresses='' -c fsync=off"
        ctl = [str(programs / "pg_ctl"), "-D", str(data), "-w"]
        subprocess.run([*ctl, "-l", str(root / "log"), "-o", options, "start"], check=True, stdout=subprocess.DEVNULL,
                       user=user, cwd=root)  # fmt: skip
        try:
            yield Cluster(root)
        finally:
            subprocess.run([*ctl, "-m", "immediate", "stop"], check=True, capture_output=True, user=user, cwd=root)
    finally:
        shutil.rmtree(root)


class Cluster:
    """A running server, from which each test takes a database of its own."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def new_database(self) -> str:
        """A new database; its URL, as a user writes it."""
        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(f"host={self._socket} user={_USER} dbname=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://{_USER}@/{name}?host={self._socket}"
