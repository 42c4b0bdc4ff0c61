"""Builds the image of Dockerfile without a container engine, and runs it locked down as docker-compose.yml does.

    sudo python scripts/check_dockerfile.py WORKDIR [--variant cuda] [--env NAME=VALUE …] [--bind PATH …]

Every RUN line of the stages that the variant needs is executed in a root file system of its own: Debian by
`debootstrap` with its Python, in place of the `python` image, and from there what the file says. The result then
serves: as the image's user, with the root file system read-only, /tmp in memory, /data and /cache as folders outside,
without capabilities. The health check has to pass, a completion to arrive, and SIGTERM to end it with 0.

It needs root, debootstrap and setpriv, and takes some minutes and gigabytes. `--env` is for the build, such as
TORCH_INDEX for a mirror; `--bind` shows a file or folder of this machine inside, such as pip's configuration.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEBIAN = "http://deb.debian.org/debian"
PACKAGES = "python3.11,python3.11-venv,python3-pip,python3.11-dev,ca-certificates"  # pip, since the image has it
RESOLV = Path("/etc/resolv.conf")  # a container's engine puts its own there too
START_S, STOP_S = 600, 60


@dataclass
class Stage:
    """One FROM with what follows it. `base` is an image or an earlier stage."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Image:
    """What the steps so far have made: a root file system and its configuration."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


# reading


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(word, rest) of each instruction, its lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        yield word.upper(), re.sub(r"\s+", " ", rest) if word != "RUN" else rest.strip()


def stages(text: str, **arguments: str) -> list[Stage]:
    """The file's stages, with its ARGs filled in."""
    known: dict[str, str] = {}
    found: list[Stage] = []
    for word, rest in instructions(text):
        if word == "ARG" and not found:
            name, _, default = rest.partition("=")
            known[name] = arguments.get(name, default)
        elif word == "FROM":
            base, _, name = re.sub(r"\$\{(\w+)\}", lambda m: known[m[1]], rest).partition(" AS ")
            found.append(Stage(name or "final", base))
        else:
            found[-1].steps.append((word, rest))
    return found


def needed(every: list[Stage]) -> list[Stage]:
    """The last stage and those it is made from, in the file's order."""
    names = {stage.name: stage for stage in every}
    wanted: set[str] = set()
    waiting = [every[-1].name]
    while waiting:
        stage = names[waiting.pop()]
        wanted.add(stage.name)
        copied = [m[1] for word, rest in stage.steps if word == "COPY" and (m := re.match(r"--from=(\S+)", rest))]
        waiting += [name for name in (stage.base, *copied) if name in names and name not in wanted]
    return [stage for stage in every if stage.name in wanted]


def is_sent(path: str, ignore: str) -> bool:
    """Whether .dockerignore lets a path of the project into the build. The last line that matches decides."""
    parts = Path(path).parts
    parents = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    sent = True
    for line in ignore.split():
        pattern = line.removeprefix("!").removeprefix("**/")
        if any(fnmatch(each, pattern) or fnmatch(Path(each).name, pattern) for each in parents):
            sent = line.startswith("!")
    return sent


# building


class Builder:
    """Executes stages below `folder`. With `is_done`, their files are there from an earlier run."""

    def __init__(self, folder: Path, env: dict[str, str], binds: list[Path], *, is_done: bool = False) -> None:
        self.folder = folder
        self._is_done = is_done
        self._env = env
        self._binds = binds
        self.images: dict[str, Image] = {}

    def build(self, every: list[Stage]) -> Image:
        for stage in every:
            say(f"== stage {stage.name} from {stage.base}")
            self.images[stage.name] = image = self._start(stage)
            with self._visible(image.root):
                for word, rest in stage.steps:
                    self._step(image, word, rest)
        return self.images[every[-1].name]

    def _start(self, stage: Stage) -> Image:
        root = self.folder / stage.name
        parent = self.images.get(stage.base)
        if not self._is_done:
            shutil.rmtree(root, ignore_errors=True)
            source = parent.root if parent else self._debian()
            run("cp", "-a", "--reflink=auto", str(source), str(root))
        if parent is None:
            return Image(root, {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"})
        return Image(root, dict(parent.env), parent.workdir, parent.user, health=parent.health)

    def _debian(self) -> Path:
        """What stands in for python:3.11-slim-bookworm: Debian's minimum, with `python` and `pip`."""
        root = self.folder / "debian"
        if not (root / "usr/local/bin/python").exists():
            shutil.rmtree(root, ignore_errors=True)
            run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), DEBIAN)
            for name in ("python", "python3"):
                (root / "usr/local/bin" / name).symlink_to("/usr/bin/python3.11")
        return root

    @contextmanager
    def _visible(self, root: Path) -> Iterator[None]:
        """/dev, /proc, name resolution and the paths of --bind inside, until the block ends."""
        mounted: list[Path] = []
        try:
            for path in (Path("/dev"), Path("/proc"), RESOLV, *self._binds):
                inside = make_place(root, path)
                run("mount", "--bind", str(path), str(inside))
                mounted.append(inside)
            yield
        finally:
            for inside in reversed(mounted):
                run("umount", str(inside))

    def _step(self, image: Image, word: str, rest: str) -> None:
        if word in ("RUN", "COPY") and self._is_done:
            return
        if word == "RUN":
            command = re.sub(r"^(--mount=\S+\s+)+", "", rest)
            say(f"RUN {command}")
            began = time.monotonic()
            script = f"cd {shlex.quote(image.workdir)} && {command}"
            run(
                "chroot",
                str(image.root),
                "/usr/bin/env",
                "-i",
                *pairs({**image.env, **self._env}),
                "/bin/sh",
                "-c",
                script,
            )
            say(f"   took {time.monotonic() - began:.0f} s")
        elif word == "COPY":
            self._copy(image, rest)
        elif word == "ENV":
            for name, value in re.findall(r'(\w+)=("[^"]*"|\S+)', rest):
                image.env[name] = re.sub(r"\$(\w+)", lambda m: image.env.get(m[1], ""), value.strip('"'))
        elif word == "WORKDIR":
            image.workdir = rest
            (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            image.user = rest
        elif word == "HEALTHCHECK":
            image.health = json.loads(rest.partition(" CMD ")[2])
        elif word in ("ENTRYPOINT", "CMD"):
            setattr(image, "entrypoint" if word == "ENTRYPOINT" else "command", json.loads(rest))

    def _copy(self, image: Image, rest: str) -> None:
        *sources, target = rest.split()
        origin = ROOT
        if sources[0].startswith("--from="):
            origin = self.images[sources.pop(0).removeprefix("--from=")].root
        goal = image.root / (target if target.startswith("/") else f"{image.workdir}/{target}").lstrip("/")
        for source in sources:
            path = origin / source.lstrip("/")
            if origin != ROOT:
                run("cp", "-a", str(path), str(goal.parent))
            elif path.is_dir():
                copy_sent(path, goal)
            else:
                goal.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, goal)


def make_place(root: Path, path: Path) -> Path:
    """Where `path` of this machine is mounted inside; there is something of its kind there."""
    inside = root / path.relative_to("/")
    (inside if path.is_dir() else inside.parent).mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        inside.touch()
    return inside


def copy_sent(folder: Path, goal: Path) -> None:
    """A folder of the project, as far as .dockerignore sends it."""
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and is_sent(str(path.relative_to(ROOT)), ignore):
            copy = goal / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)


# serving


class Container:
    """The image's command on a root file system that cannot be written, as its user, without capabilities."""

    def __init__(self, image: Image, folder: Path, env: dict[str, str], binds: list[Path]) -> None:
        self._image = image
        self._binds = {path: make_place(image.root, path) for path in (RESOLV, *binds)}
        self._env = {**image.env, **env}
        for name in ("data", "cache"):
            volume = folder / f"volume-{name}"
            shutil.rmtree(volume, ignore_errors=True)
            run("cp", "-a", str(image.root / name), str(volume))  # as a named volume begins
        self._folder = folder

    def _command(self, words: list[str]) -> list[str]:
        root, user, group = self._image.root, *self._image.user.split(":")
        mounts = [
            f"mount --bind {root} {root}",
            f"mount -o remount,bind,ro {root}",
            f"mount -t tmpfs tmpfs {root}/tmp",  # noqa: S108  the container's own
            f"mount --bind {self._folder}/volume-data {root}/data",
            f"mount --bind {self._folder}/volume-cache {root}/cache",
            f"mount --bind /proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            *(f"mount --bind {path} {inside}" for path, inside in self._binds.items()),
        ]
        drop = f"setpriv --reuid {user} --regid {group} --clear-groups --bounding-set -all --no-new-privs"
        inside = shlex.join(["env", "-i", *pairs(self._env), *words])
        return ["unshare", "--mount", "sh", "-ec", f"{'; '.join(mounts)}; exec chroot {root} {drop} {inside}"]

    def check(self, port: int) -> None:
        """Start, wait for health, ask, try to write, stop."""
        process = subprocess.Popen(self._command([*self._image.entrypoint, *self._image.command]))
        try:
            began = time.monotonic()
            while subprocess.run(self._command(self._image.health), capture_output=True, check=False).returncode:
                if process.poll() is not None or time.monotonic() - began > START_S:
                    sys.exit(f"never became healthy (exit status {process.poll()})")
                time.sleep(1)
            say(f"healthy after {time.monotonic() - began:.0f} s")
            say(f"user {owner_of(process.pid)}, answer {completion(port)!r}")
            denied = subprocess.run(self._command(["touch", "/opt/x"]), capture_output=True, text=True, check=False)
            say(f"writing outside of the volumes: {denied.stderr.strip()}")
            if not denied.returncode or "Read-only" not in denied.stderr:
                sys.exit("the root file system can be written")
            process.terminate()
            if process.wait(STOP_S):
                sys.exit(f"ended with {process.returncode} on SIGTERM")
            say("ended with 0 on SIGTERM")
        finally:
            process.kill()


def owner_of(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return f"{fields['Uid'].split()[1]}, capabilities {fields['CapEff'].strip()}"


def completion(port: int) -> str:
    from urllib.request import Request, urlopen

    body = {"model": "sql", "temperature": 0, "max_tokens": 24, "messages": [{"role": "user", "content": QUESTION}]}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(request, timeout=120) as answer:  # noqa: S310
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    return text


QUESTION = "Table hotels(city, chain, stars, beds). Show all hotels with more than 3 stars."


# the whole


def pairs(env: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in env.items()]


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--serve-env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bind", action="append", default=[], type=Path)
    parser.add_argument("--serve-only", action="store_true", help="what an earlier run has built")
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    if os.geteuid():
        sys.exit("needs root, to change root file systems")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    every = stages((ROOT / "Dockerfile").read_text(encoding="utf-8"), VARIANT=args.variant)
    build_env = dict(pair.split("=", 1) for pair in args.env)
    image = Builder(folder, build_env, args.bind, is_done=args.serve_only).build(needed(every))
    size = subprocess.run(["du", "-sm", image.root], capture_output=True, text=True, check=True).stdout.split()[0]
    say(f"the image's files take {size} MiB")
    serving = {"MANYLORA_PORT": str(args.port), "MANYLORA_ALLOW_OPEN": "true"}
    serving |= dict(pair.split("=", 1) for pair in args.serve_env)
    Container(image, folder, serving, args.bind).check(args.port)


if __name__ == "__main__":
    main()
