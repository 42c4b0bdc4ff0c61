"""A PostgreSQL server of the tests' own, where its programs are installed."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

_BINARIES = (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/local/bin"))


@dataclass(frozen=True)
class Postgres:
    """A running server that lets everybody of this machine in."""

    port: int

    def _url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The SQLAlchemy URL of an empty one."""
        name = f"t{uuid.uuid4().hex}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self._url(name)


def binaries() -> Path | None:
    """The folder with `initdb` and `postgres`."""
    found = shutil.which("initdb")
    candidates = [*([Path(found).parent] if found else []), *_BINARIES]
    return next((path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists()), None)


def _as_somebody() -> dict[str, Any]:
    """The server refuses to run as root."""
    if os.geteuid():
        return {}
    user = next(u for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody"))
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextmanager
def running_postgres(folder: Path) -> Iterator[Postgres]:
    """From the programs in `folder`, on a free port, without fsync."""
    who = _as_somebody()
    home = Path(tempfile.mkdtemp(prefix="pg-"))
    if who:
        os.chown(home, who["user"], who["group"])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    data = home / "data"
    make: list[str | Path] = [folder / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"]
    subprocess.run(make, check=True, capture_output=True, cwd="/", **who)
    serve: list[str | Path] = [
        folder / "postgres",
        "-D",
        data,
        "-p",
        str(port),
        "-k",
        home,
        "-c",
        "listen_addresses=127.0.0.1",
        "-F",
    ]
    process = subprocess.Popen(serve, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", **who)
    try:
        _wait(port, process)
        yield Postgres(port)
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(home, ignore_errors=True)


def _wait(port: int, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        assert process.poll() is None, "postgres ended"
        try:
            psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres", connect_timeout=5).close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("postgres does not answer")
