"""Every command without the packages of the extras: it does its work, or says before it in one line what to install.

All commands run in one process of their own, in which none of these packages can be found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import typer

from manylora.cli.main import build
from manylora.packages import install_command
from tests.images.tiny import make_image_model
from tests.lifecycle.helpers import label_rows, write_rows
from tests.speech.tiny import make_whisper
from tests.tiny_adapters import make_adapter

ROOT: Final = Path(__file__).parents[1]
# What the extras of pyproject.toml bring.
HIDDEN: Final = (
    "aiohttp", "locust", "matplotlib", "opentelemetry.exporter", "opentelemetry.sdk", "peft", "psycopg", "pyarrow",
    "ray", "s3fs", "scipy", "sklearn", "soundfile", "soxr", "PIL",
)  # fmt: skip
DONE, FAILED, NOT_FOUND, UNREACHABLE = 0, 1, 4, 8
# What a command that asks a server says where there is none.
NOBODY: Final = (UNREACHABLE, "cannot be reached")
# By command, and what is added to its name: the arguments, the exit code, and what is printed or what is missing.
COMMANDS: Final[dict[str, tuple[str, int, str | tuple[str, ...]]]] = {
    "recipe": ("list", DONE, "city-zh"),
    "train": ("--data {rows} --out {out}/a --model {model}", FAILED, ("peft", "matplotlib")),
    "evaluate :parquet": ("--data {rows}.parquet --model {model} --base", FAILED, ("pyarrow.parquet",)),
    "choose-rank": ("--data {rows} --out {out}/a --model {model}", FAILED, ("peft", "sklearn", "matplotlib")),
    "evaluate": ("--data {rows} --model {model} --adapter {adapter}", FAILED, ("peft", "sklearn")),
    "evaluate :pictures": ("--data {rows} --model {model} --base --out {out}/a", FAILED, ("sklearn", "matplotlib")),
    "extract": ("--base {model} --tuned {model} --out {out}/a --rank 1", FAILED, "nothing to extract"),
    "compress": ("{adapter} --rank 1 --out {out}/small", DONE, "MB"),
    "merge": ("--adapter {adapter} --base {model} --out {out}/whole", DONE, "logit difference"),
    "inspect": ("{adapter}", DONE, "q_proj"),
    "inspect :against": ("{adapter} --against {adapter} --png {out}/a", FAILED, ("scipy", "matplotlib")),
    "ask": ("base hello", *NOBODY),
    "usage": ("", *NOBODY),
    "data check": ("{rows}", DONE, "rows"),
    "adapters push": ("{adapter}", *NOBODY),
    "adapters list": ("", *NOBODY),
    "adapters show": ("x", *NOBODY),
    "adapters canary": ("x@1 --share 0.1", *NOBODY),
    "adapters promote": ("x@1", *NOBODY),
    "adapters rollback": ("x", *NOBODY),
    "adapters history": ("x", *NOBODY),
    "adapters pin": ("x", *NOBODY),
    "adapters set": ("x temperature=0", *NOBODY),
    "adapters mix": ("x a b=0.5", *NOBODY),
    "adapters delete": ("x --yes", *NOBODY),
    "adapters validate": ("{adapter} --model {model}", DONE, "sound"),
    "keys create": ("--tenant acme --data-dir {data}", DONE, "ml_"),
    "keys list": ("--data-dir {data}", DONE, "acme"),
    "keys revoke": ("key_0 --data-dir {data}", NOT_FOUND, "no such key"),
    "keys reopen": ("--yes --data-dir {data}", DONE, "open again"),
    "tenants set": ("acme --weight 2 --data-dir {data}", DONE, "acme"),
    "tenants list": ("--data-dir {data}", DONE, "acme"),
    "adapters verify": ("--data-dir {data}", DONE, "0 checked"),
    "adapters rescan": ("--data-dir {data} --model {model}", FAILED, "store"),
    "adapters orphans": ("--data-dir {data}", DONE, "set aside"),
    "jobs submit": ("{rows}", *NOBODY),
    "jobs list": ("", *NOBODY),
    "jobs show": ("x", *NOBODY),
    "jobs events": ("x", *NOBODY),
    "jobs cancel": ("x", *NOBODY),
    "jobs pause": ("x", *NOBODY),
    "jobs resume": ("x", *NOBODY),
    "worker": ("{model} --data-dir {data}", FAILED, ("peft", "matplotlib")),
    "cluster": ("{model} --database-url postgresql://nowhere/x --data-dir {out}/d", FAILED, ("ray",)),
    "serve :jobs": ("{model} --jobs 1 --data-dir {out}/d", FAILED, ("peft", "matplotlib")),
    "serve :tracing": ("{model} --tracing --data-dir {out}/d", FAILED, ("opentelemetry.sdk", "opentelemetry.exporter")),
    "serve :images": ("{images} --data-dir {out}/d", FAILED, ("PIL",)),
    "serve :speech": ("{speech} --data-dir {out}/d", FAILED, ("soundfile", "soxr")),
    "serve :s3": ("{model} --store-url s3://bucket/x --data-dir {out}/d", FAILED, ("s3fs",)),
    "serve :postgresql": ("{model} --database-url postgresql://nowhere/x --data-dir {out}/d", FAILED, ("psycopg",)),
}
LOADTEST: Final = ("run", "replay", "report", "trace", "list", "overhead", "fleet")


def names_of(command: Any, *before: str) -> list[str]:
    """All commands of the program, `adapters push` and so on."""
    inside = getattr(command, "commands", None)
    if inside is None:
        return [" ".join(before)]
    return [name for word, found in inside.items() for name in names_of(found, *before, word)]


def test_every_command_is_here() -> None:
    assert sorted({name.partition(" :")[0] for name in COMMANDS}) == sorted(names_of(typer.main.get_command(build())))


@pytest.fixture(scope="module")
def results(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int | None, str]]:
    folder = tmp_path_factory.mktemp("extras")
    places = {
        "model": tiny_llama_dir, "speech": make_whisper(folder / "speech"),
        "images": make_image_model("vit", folder / "images"),
        "adapter": make_adapter(tiny_llama_dir, folder / "adapter", rank=2),
        "rows": write_rows(folder / "rows.jsonl", label_rows()), "out": folder / "out", "data": folder / "data",
    }  # fmt: skip
    (folder / "rows.jsonl.parquet").write_bytes(b"PAR1")
    commands = {
        name: ["manylora.cli.main", *name.partition(" :")[0].split(), *words.format(**places).split()]
        for name, (words, _, _) in COMMANDS.items()
    }
    commands |= {f"loadtest {name}": ["manylora_loadtest.__main__", name] for name in LOADTEST}
    done = subprocess.run(
        [sys.executable, "-m", "tests.without_extras"],
        input=json.dumps({"hidden": HIDDEN, "commands": commands}),
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=1800,
        env={**os.environ, "MANYLORA_URL": "http://127.0.0.1:9", "MANYLORA_DTYPE": "float32", "COLUMNS": "300"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int | None, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_or_says_what_to_install(name: str, results: dict[str, tuple[int | None, str]]) -> None:
    code, said = results[name]
    _, expected, what = COMMANDS[name]

    assert (code, "Traceback" in said) == (expected, False), said
    if isinstance(what, tuple):
        assert said.rstrip().endswith(install_command(*what))
    else:
        assert what in said
        assert "pip install" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADTEST)
def test_the_load_test_says_what_to_install(name: str, results: dict[str, tuple[int | None, str]]) -> None:
    code, said = results[f"loadtest {name}"]

    assert (code, said) == (1, f"The load test needs aiohttp. Install it with: {install_command('aiohttp')}")
