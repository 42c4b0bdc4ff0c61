"""The program as a person meets it: help, versions, and errors in one line."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from manylora import __version__
from manylora.cli.main import build
from manylora.cli.serve import flag_of
from manylora.cli.terminal import sparkline
from manylora.settings import Settings


def run(*words: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "manylora", *words], capture_output=True, text=True, check=False, cwd=cwd, timeout=300
    )


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; sys.argv = ['manylora', '--help']\n"
        "from manylora.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'sqlalchemy', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


def test_version() -> None:
    done = run("--version")

    assert (done.stdout, done.returncode) == (f"manylora {__version__}\n", 0)


def test_every_setting_is_a_flag_with_its_variable_and_default() -> None:
    text = CliRunner().invoke(build(), ["serve", "--help"], env={"COLUMNS": "400"}).output

    for name in Settings.model_fields:
        assert f"[MANYLORA_{name.upper()}]" in text
        assert name == "model" or re.search(rf"^  {flag_of(name)}\b", text, re.MULTILINE), name
    assert "(default: 8000)" in text
    assert "(default: 10%)" in text
    assert "(default: 1GiB)" in text


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["serve", "--port", "http"], 2, "port"),
        (["serve", "--device", "tpu"], 2, "device"),
        (["serve", "--kv-cache-memory", "lots"], 2, "kv_cache_memory"),
        (["serve", "--no-such-flag"], 2, "--no-such-flag"),
        (["serve", "one", "two"], 2, "two"),
        (["fly"], 2, "fly"),
    ],
)
def test_wrong_usage_is_exit_code_2_without_a_traceback(words: list[str], code: int, said: str) -> None:
    done = run(*words)

    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_exist_is_exit_code_1_and_one_line(tmp_path: Path) -> None:
    done = run("serve", "./nowhere", "--port", "0", "--data-dir", str(tmp_path / "data"))

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "'./nowhere'" in errors[0]


def test_a_port_in_use_is_reported_before_the_model_is_looked_for(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        done = run("serve", "./nowhere", "--port", str(port), "--data-dir", str(tmp_path / "data"))

    assert done.returncode == 1
    assert f"Port {port}" in done.stderr
    assert "nowhere" not in done.stderr


def test_a_bad_settings_file_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "manylora.toml").write_text("prot = 1\n")

    done = run("serve", cwd=tmp_path)

    assert done.returncode == 2
    assert "prot" in done.stderr
    assert "Traceback" not in done.stderr


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*path, name))
    if path and not hasattr(command, "commands"):
        yield " ".join(path), command


@pytest.mark.parametrize(("name", "command"), list(_commands(typer.main.get_command(build()))))
def test_every_flag_of_every_command_is_explained_in_a_sentence(name: str, command: Any) -> None:
    assert command.help.strip().endswith((".", ".\n"))
    for one in command.params:
        text = re.sub(r" \[MANYLORA_\w+\]| \(default: .*\)", "", getattr(one, "help", None) or "")
        assert re.fullmatch(r".+\.", text, re.DOTALL), f"{name} {one.name}: {text!r}"


def test_flags_with_few_values_name_them() -> None:
    for command in ("train", "evaluate", "choose-rank"):
        told = CliRunner().invoke(build(), [command, "--help"], env={"COLUMNS": "200"}).output
        for choices in ("--device auto|cpu|cuda", "--render auto|chat|plain", "--dtype auto|bfloat16|float16|float32"):
            assert re.search(rf"{choices.replace('|', '[|]').replace(' ', ' +')}", told), choices


def test_a_curve_of_one_line_goes_from_the_first_value_to_the_last() -> None:
    assert sparkline([]) == ""
    assert sparkline([3.0]) == "▁"
    assert sparkline([8.0, 4.5, 1.0]) == "█▅▁"
    assert sparkline([float(n) for n in range(16)], width=8) == "▁▂▃▄▅▆▇█"
