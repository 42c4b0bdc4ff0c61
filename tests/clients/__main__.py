"""`python -m tests.clients [--quick] [NAME…]`: install clients, start a server, run the page's lines, say what came.

Environments are kept in the folder `MANYLORA_CLIENTS` (`build/clients`) and made anew where a version has changed.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from manylora.models import default_model
from tests.clients.table import CLIENTS, PAGE, Client
from tests.default_server import default_server
from tests.pages import ADDRESS, Block, blocks

ROOT = Path(__file__).parents[2]
# Taken away, since the server refuses variables of its prefix that are none of its settings.
HOME = Path(os.environ.pop("MANYLORA_CLIENTS", ROOT / "build" / "clients")).resolve()
INSTALL_S, QUICK_INSTALL_S, START_S, BLOCK_S = 1800, 60, 600, 900


class Failed(Exception):
    """What is to be told of a client that cannot be installed, or whose lines do not do what the page says."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one client. `state` is `works`, `fails` or `not installed`."""

    client: Client
    state: str
    seconds: float
    said: str = ""


# installing


def installed(client: Client, limit_s: float) -> Path:
    """The client's folder: a virtual environment, or one with `node_modules`. Raises Failed."""
    folder = HOME / client.name
    stamp = folder / ".installed"
    wanted = "\n".join([*client.packages, *client.alone])
    if not (stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for command in _install_commands(client, folder):
            _checked(command, folder, os.environ.copy(), limit_s)
        stamp.write_text(wanted)
    return folder


def _install_commands(client: Client, folder: Path) -> Iterator[list[str]]:
    if client.is_node:
        yield ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), *client.packages]
        return
    yield [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    pip += ["--disable-pip-version-check", "--quiet", "install", "--no-compile"]
    if client.alone:
        yield [*pip, "--no-deps", *client.alone]
    if client.borrows_torch:
        yield [*pip, *client.packages, _borrowed_torch(folder)]
    else:
        yield [*pip, *client.packages]


def _borrowed_torch(folder: Path) -> str:
    """Link this environment's torch into another; gives what keeps pip at it, and lets it bring what that needs."""
    torch = distribution("torch")
    [there] = folder.glob("lib/python*/site-packages")
    info = next(path for path in torch.files or () if path.parent.suffix == ".dist-info").parent
    for name in ("torch", "torchgen", "functorch", str(info)):
        path = Path(str(torch.locate_file(name)))
        if path.exists():
            (there / name).symlink_to(path)
    return f"torch=={torch.version}"


# running


def lines_of(client: Client) -> list[Block]:
    """The client's blocks on the page."""
    return [block for block in blocks(PAGE) if block.heading == client.heading]


def run(client: Client, home: Path, address: str) -> None:
    """The client's lines on the page, in order. Raises Failed where they do not print what stands below them."""
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
            "HOME": folder,
            "no_proxy": "127.0.0.1",
            "PYTHONWARNINGS": "ignore",
            # What the page's lines take from elsewhere where they are run by hand.
            "TOKENIZER": str(default_model.ensure()),
            "LITELLM_PORT": str(_free_port()),
        }
        for number, block in enumerate(lines_of(client)):
            if block.kind == "text":
                for line in block.text.splitlines():
                    if line not in said:
                        raise Failed(f"does not say {line!r}: {said[-2000:]}")
                continue
            text = block.text.replace(ADDRESS, address)
            said = _checked(_command(block.kind, text, home, number), work, environment, BLOCK_S)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _command(kind: str, text: str, home: Path, number: int) -> list[str]:
    if kind == "js":
        script = home / f"block-{number}.mjs"  # beside its node_modules
        script.write_text(text)
        return ["node", str(script)]
    program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [str(home / "bin" / "python"), "-c"]}
    return [*program[kind], text]


def _checked(command: list[str], folder: Path, environment: dict[str, str], limit_s: float) -> str:
    """What a command prints. Raises Failed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=limit_s
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{type(error).__name__}: {str(error)[-300:]}") from None
    if done.returncode:
        raise Failed((done.stderr.strip() or done.stdout.strip())[-2000:])
    return done.stdout


def attempt(client: Client, address: str, install_s: float) -> Result:
    began = time.monotonic()
    try:
        home = installed(client, install_s)
    except Failed as why:
        return Result(client, "not installed", time.monotonic() - began, str(why))
    try:
        run(client, home, address)
    except Failed as why:
        return Result(client, "fails", time.monotonic() - began, str(why))
    return Result(client, "works", time.monotonic() - began)


def served(url: str | None, folder: Path) -> AbstractContextManager[str]:
    """The address of the server that the clients ask."""
    return default_server(folder, START_S, "--tool-prompt") if url is None else nullcontext(url)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(client.name for client in CLIENTS))
    parser.add_argument("--url", help="of a server that runs already, in place of one that is started")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only a few that are soon installed, as CI does; one that does not come so soon is no failure",
    )
    asked = parser.parse_args()
    unknown = set(asked.names) - {client.name for client in CLIENTS}
    if unknown:
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    chosen = [c for c in CLIENTS if (not asked.names or c.name in asked.names) and (c.is_quick or not asked.quick)]
    if asked.quick:  # where the index is away, that is soon known
        os.environ.update({"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "10"})
    results = []
    with tempfile.TemporaryDirectory() as folder, served(asked.url, Path(folder)) as address:
        for number, client in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {client.name} …", end=" ", flush=True)
            result = attempt(client, address, QUICK_INSTALL_S if asked.quick else INSTALL_S)
            print(f"{result.state} ({result.seconds:.0f} s)", flush=True)
            if result.said:
                print(result.said, flush=True)
            results.append(result)
    print(f"\n{'client':18}{'state':16}packages")
    for result in results:
        print(f"{result.client.name:18}{result.state:16}{' '.join(result.client.packages)}")
    num_missing = sum(result.state == "not installed" for result in results)
    num_failed = sum(result.state == "fails" for result in results)
    print(f"\n{len(results) - num_missing - num_failed} passed, {num_failed} failed, {num_missing} not installed")
    return int(num_failed > 0 or (num_missing > 0 and not asked.quick))


if __name__ == "__main__":
    sys.exit(main())
