"""A real nginx with a configuration of the pages, on a free port."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
PATIENCE_S = 30.0


def program() -> str:
    """nginx of this machine. Without one the test is skipped, but not where CI runs, which installs it."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no nginx")
        pytest.skip("needs nginx (apt-get install nginx-light)")
    return found


def documented(page: Path) -> str:
    """The one configuration that a page has."""
    (text,) = re.findall(r"```nginx\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return str(text)


def configuration(folder: Path, text: str) -> str:
    """What every nginx of one's own needs around a documented configuration."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in kinds)
    user = "user root;\n" if os.geteuid() == 0 else ""
    return (
        f"{user}daemon off;\nmaster_process off;\npid {folder / 'pid'};\nerror_log {folder / 'error.log'};\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}{text}}}\n"
    )


def with_addresses(text: str, replaced: Mapping[str, str]) -> str:
    """A documented configuration with other addresses in it, each of which it must have."""
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    return text


@contextmanager
def nginx_before(server_url: str, folder: Path, *, passes_path_on: bool = False) -> Iterator[str]:
    """Gives the address under which nginx serves the server: `http://127.0.0.1:port/llm`."""
    port = free_port()
    replaced = {"127.0.0.1:8000": server_url.removeprefix("http://"), "listen 80;": f"listen 127.0.0.1:{port};"}
    if passes_path_on:
        replaced["http://manylora/;"] = "http://manylora;"
    with running_nginx(with_addresses(documented(PAGE), replaced), folder, f"http://127.0.0.1:{port}/llm") as url:
        yield url


@contextmanager
def running_nginx(text: str, folder: Path, url: str) -> Iterator[str]:
    """An nginx with this configuration, which serves `url`, once a server behind it answers there."""
    found = program()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nginx.conf"
    path.write_text(configuration(folder, text))
    log = (folder / "output").open("w")
    process = subprocess.Popen([found, "-c", str(path), "-p", str(folder)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((folder / "output").read_text() + (folder / "error.log").read_text())
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        log.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
