"""A PostgreSQL server of the tests' own, from the Debian package `postgresql`, on a socket in a folder."""

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
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
    try:
        cluster = Cluster(programs, root, user)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.kill()
    finally:
        shutil.rmtree(root)


class Cluster:
    """A running server, from which each test takes a database of its own. It can be stopped, killed and started."""

    def __init__(self, programs: Path, socket: Path, user: str | None) -> None:
        self._programs = programs
        self._socket = socket
        self._user = user
        self._data = socket / "data"
        subprocess.run(
            [str(programs / "initdb"), "-D", str(self._data), "-U", _USER, "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True, capture_output=True, user=user, cwd=socket,
        )  # fmt: skip

    def _control(self, *arguments: str) -> None:
        command = [str(self._programs / "pg_ctl"), "-D", str(self._data), "-w", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=self._user, cwd=self._socket)

    def start(self) -> None:
        options = f"-k {self._socket} -c listen_addresses='' -c fsync=off"
        self._control("-l", str(self._socket / "log"), "-o", options, "start")

    def kill(self) -> None:
        """End it without a word to anybody who is connected."""
        self._control("-m", "immediate", "stop")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Every process of the server stands still, and its connections stay open."""
        main = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        main.suspend()  # from now on there are no new ones
        workers = main.children()
        for process in workers:
            with suppress(psutil.NoSuchProcess):  # it was on its way out
                process.suspend()
        try:
            yield
        finally:
            for process in (*workers, main):
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def new_database(self) -> str:
        """A new database; its URL, as a user writes it."""
        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(f"host={self._socket} user={_USER} dbname=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://{_USER}@/{name}?host={self._socket}"
