"""The commands as a person meets them: bad input is one line that names the fault, and leaves nothing behind."""

import hashlib
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from manylora.cli.main import build
from tests.lifecycle.helpers import label_rows, write_rows
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tiny_model

GOOD = '{"prompt": "a", "completion": "b"}\n'
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "missing field": ("a.jsonl", (GOOD + '{"prompt": "x"}\n').encode(), "row 2: missing completion"),
    "empty file": ("a.jsonl", b"", "a.jsonl is empty"),
    "header only": ("a.csv", b"text,label\n", "a.csv is empty"),
    "one class": ("a.csv", b"text,label\nx,good\ny,good \n", "only the label 'good'"),
    "too long": ("a.jsonl", json.dumps({"prompt": "x" * 900, "completion": "b"}).encode(), "row 1 has"),
    "long answer": ("a.jsonl", json.dumps({"prompt": "x", "completion": "b" * 400}).encode(), "row 1's answer"),
    "not UTF-8": ("a.jsonl", GOOD.encode() + b'{"prompt": "\xff", "completion": "b"}', "row 2 is not UTF-8"),
    "half a character": (
        "a.jsonl",
        b'{"prompt": "\\ud83d", "completion": "b"}',
        "row 1: prompt holds half a",
    ),
    "a list": ("a.jsonl", b'[\n{"prompt": "a", "completion": "b"}]', "a list over several lines is a .json file"),
    "not JSON": ("a.jsonl", GOOD.encode() + b"{", "row 2, column 2 is not JSON"),
    "not parquet": ("a.parquet", b"PAR1", "not a readable parquet file"),
    "unknown kind": ("a.txt", GOOD.encode(), "must be a .jsonl, .csv or .parquet file"),
}


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(build(), [str(word) for word in words], env={"COLUMNS": "300"})


def train(data: Path, out: Path, base: Path, *more: str) -> Result:
    fixed = ("--model", base, "--device", "cpu", "--dtype", "float32", "--max-length", "128", "--epochs", "1")
    return run("train", "--data", data, "--out", out, *fixed, *more)


def everything_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on the size of files makes every larger write fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", ["train", "choose-rank", "evaluate"])
@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_data_ends_in_a_message_that_names_it_and_leaves_nothing(
    fault: str, command: str, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    if command == "evaluate" and fault == "one class":
        pytest.skip("held-out rows of one class can be scored")
    name, content, words = BAD_FILES[fault]
    (tmp_path / name).write_bytes(content)
    flags = ["--base"] if command == "evaluate" else ["--folds", "2"] if command == "choose-rank" else []
    if command == "choose-rank" and fault in ("too long", "long answer"):
        (tmp_path / name).write_bytes(content + b"\n" + GOOD.encode())

    done = run(
        command, "--data", tmp_path / name, "--out", tmp_path / "out" / "a", "--model", tiny_llama_dir,
        "--max-length", "128", *flags,
    )  # fmt: skip

    assert done.exit_code == 1, done.output
    assert words in done.stderr
    assert everything_in(tmp_path / "out") == []


def test_loss_that_is_no_number_names_step_and_rows(tmp_path: Path) -> None:
    broken = make_tiny_model("llama", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    data = write_rows(tmp_path / "a.jsonl", label_rows())

    done = train(data, tmp_path / "out" / "a", broken)

    assert done.exit_code == 1
    assert "diverged at step 1 (loss nan) on rows" in done.stderr
    assert everything_in(tmp_path / "out") == []


@pytest.mark.parametrize("command", ["train", "extract", "compress", "merge", "merge into base"])
def test_full_disk_is_said_and_leaves_nothing(command: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", label_rows())
    folder = make_adapter(tiny_llama_dir, tmp_path / "adapter", rank=8)
    out = tmp_path / "out" / "a"
    tuned = tmp_path / "tuned"
    if command == "extract":
        assert run("merge", "--adapter", folder, "--base", tiny_llama_dir, "--out", tuned).exit_code == 0
    words: dict[str, list[Any]] = {
        "train": ["train", "--data", data, "--model", tiny_llama_dir, "--epochs", "1", "--max-length", "128"],
        "extract": ["extract", "--base", tiny_llama_dir, "--tuned", tuned, "--rank", "8"],
        "compress": ["compress", folder, "--rank", "4"],
        "merge": ["merge", "--adapter", folder, "--adapter", folder, "--method", "cat"],
        "merge into base": ["merge", "--adapter", folder, "--base", tiny_llama_dir],
    }

    with full_disk():
        done = run(*words[command], "--out", out)

    assert done.exit_code == 1, done.output
    assert "could not be written" in done.stderr
    assert everything_in(tmp_path / "out") == []


def test_the_key_does_not_get_into_the_card(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: Any) -> None:
    data = write_rows(tmp_path / "a.jsonl", label_rows())
    words = ["train", "--data", str(data), "--model", str(tiny_llama_dir), "--out", str(tmp_path / "a")]
    words += ["--epochs", "1", "--key", "sk-secret", "--dtype", "float32", "--max-length", "128"]
    monkeypatch.setattr(sys, "argv", ["manylora", *words])

    assert run(*words).exit_code == 0

    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "manylora train --data" in card
    assert "--epochs 1 --dtype float32" in card
    assert "secret" not in card


def test_server_that_is_not_there_is_said_before_the_training(tmp_path: Path, tiny_llama_dir: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", label_rows())

    done = train(data, tmp_path / "out", tiny_llama_dir, "--publish", "a", "--server", "http://127.0.0.1:9")

    assert done.exit_code == 1
    assert "The server at http://127.0.0.1:9 cannot be reached" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", "nan"], "--lr must be positive"),
        (["--alpha", "0"], "--alpha must be positive"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--threads", "0"], "--threads must be positive"),
        (["--warmup", "2"], "--warmup is a share"),
        (["--device", "tpu"], "--device must be one of"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--render", "xml"], "--render must be one of"),
    ],
)
def test_number_out_of_range_is_one_line(words: list[str], said: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", label_rows())

    done = train(data, tmp_path / "out", tiny_llama_dir, *words)

    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr


def test_commands_print_tables_and_json(tmp_path: Path, tiny_llama_dir: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", label_rows()[::4])
    folder = make_adapter(tiny_llama_dir, tmp_path / "adapter", rank=4)
    fixed = ["--model", str(tiny_llama_dir), "--max-length", "128", "--max-tokens", "4", "--dtype", "float32"]

    table = run("evaluate", "--data", data, "--base", "--adapter", folder, *fixed)
    as_json = run("evaluate", "--data", data, "--base", *fixed, "--json")
    shown = run("inspect", folder, "--against", folder)
    ranks = run("choose-rank", "--data", data, "--ranks", "1,2", "--folds", "2", "--epochs", "1",
                "--model", tiny_llama_dir, "--max-length", "128", "--out", tmp_path / "a")  # fmt: skip

    assert [r.exit_code for r in (table, as_json, shown, ranks)] == [0, 0, 0, 0]
    assert "macro_recall" in table.stdout
    assert "fruit" in table.stdout
    assert json.loads(as_json.stdout)["contenders"].keys() == {"base"}
    assert "cosine of the changes 1.000 over 14 modules" in shown.stdout
    assert "chosen: rank" in ranks.stdout


def test_ctrl_c_ends_with_130_and_leaves_nothing(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "adapter", rank=8)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("manylora.lifecycle.weights.compress.write_adapter", interrupted)
    done = run("compress", folder, "--rank", "4", "--out", tmp_path / "out" / "a")

    assert (done.exit_code, done.stderr) == (130, "compress 14/14\ninterrupted\n")
    assert everything_in(tmp_path / "out") == []


@pytest.mark.slow
def test_killed_training_resumes_to_the_uninterrupted_result(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """kill -9 in the middle of it; then bit for bit what it would have been."""
    data = write_rows(tmp_path / "a.jsonl", label_rows())
    words: list[str | Path] = [sys.executable, "-m", "manylora", "train", "--data", data, "--eval", data]
    words += ["--model", tiny_llama_dir]
    words += ["--dtype", "float32", "--device", "cpu", "--threads", "1", "--max-length", "128", "--dropout", "0.1"]
    words += ["--epochs", "8", "--checkpoint-every", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    with subprocess.Popen([*words, "--out", killed], stderr=subprocess.DEVNULL) as process:
        checkpoint = tmp_path / ".killed.checkpoint.safetensors"
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -9, "it was over before it could be killed"
    assert not killed.exists()
    subprocess.run([*words, "--out", killed, "--resume"], check=True, capture_output=True)
    subprocess.run([*words, "--out", whole], check=True, capture_output=True)

    reports = [json.loads((tmp_path / f"{name}.report" / "train.json").read_text()) for name in ("killed", "whole")]
    assert reports[0]["train_loss"] == reports[1]["train_loss"]
    assert reports[0]["eval_loss"] == reports[1]["eval_loss"]
    one, other = (load_file(out / "adapter_model.safetensors") for out in (killed, whole))
    assert all(bool((one[name] == other[name]).all()) for name in one)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_preview_shows_what_is_learnt_and_trains_nothing(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = [
        {"question": "a?", "completion": "1"},
        {"question": "a?", "completion": "2"},
        {"question": "b", "completion": "3"},
    ]
    data = write_rows(tmp_path / "a.jsonl", rows)

    done = train(data, tmp_path / "out", tiny_llama_dir, "--map", "prompt=question", "--preview", "2")

    assert done.exit_code == 0, done.output
    assert "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n[[1<|im_end|>]]" in done.stdout
    assert "row 2: " in done.stdout
    assert "row 3: " not in done.stdout
    assert "want a different answer, which cannot be learnt for sure: 2 (rows 1, 2)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_of_flags_stands_in_for_those_that_are_not_typed(tmp_path: Path, tiny_llama_dir: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{**row, "why": "x"} for row in label_rows()[::3]])
    settings = tmp_path / "train.toml"
    settings.write_text(
        f"""
        data = {str(data)!r}
        eval = {str(data)!r}
        model = {str(tiny_llama_dir)!r}
        rank = 2
        epochs = 1
        targets = ["q_proj", "v_proj"]
        max-length = 128
        map = ["text=text", "label=label"]
        dtype = "float32"
        sample = 2
        """
    )
    out = tmp_path / "out"

    done = run("train", "--config", settings, "--out", out, "--rank", "3")

    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.report" / "train.json").read_text())
    assert (report["settings"]["lora"]["rank"], report["settings"]["lora"]["targets"]) == (3, ["q_proj", "v_proj"])
    assert report["settings"]["schedule"]["epochs"] == 1
    assert [(one["step"], one["row"]) for one in report["samples"]] == [(report["steps"], 1), (report["steps"], 2)]
    assert f"step {report['steps']}, row 2: " in done.stderr
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert report["data_sha256"] == {"data": digest, "eval": digest}
    assert digest in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnak = 3", "rnak is no flag of this command"),
        ('key = "secret"', "key is no flag of this command, or one to be typed"),
        ("rank = ", "cannot be read as TOML"),
        ("[lora]\nrank = 3", "lora is no flag"),
        ("[rank]\na = 3", "rank must be a value or a list"),
    ],
)
def test_a_faulty_file_of_flags_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "train.toml").write_text(text)
    done = run("train", "--config", tmp_path / "train.toml", "--data", "x", "--out", "y")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr


def test_samples_need_held_out_rows(tmp_path: Path, tiny_llama_dir: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", label_rows())
    done = train(data, tmp_path / "out", tiny_llama_dir, "--sample", "2")
    assert (done.exit_code, "--sample is a number of rows of --eval" in done.stderr) == (1, True)


def test_scores_are_written_into_the_card_and_take_the_place_of_earlier_ones(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    data = write_rows(tmp_path / "a.jsonl", label_rows()[::4])
    folder = make_adapter(tiny_llama_dir, tmp_path / "adapter", rank=4)
    (folder / "README.md").write_text("# One\n\n## How it was made\n\nBy hand.\n")
    words: list[str | Path] = [
        "evaluate",
        "--data",
        data,
        "--model",
        tiny_llama_dir,
        "--base",
        "--adapter",
        folder,
        "--max-length",
        "128",
    ]
    words += ["--metrics", "accuracy,perplexity", "--max-tokens", "4", "--dtype", "float32", "--card"]
    cards = []

    for _ in range(2):
        done = run(*words)
        assert done.exit_code == 0, done.output
        cards.append((folder / "README.md").read_text())

    assert cards[0] == cards[1]
    assert re.search(
        r"^# One\n\n## Scores\n\n\| \| base \| adapter \| p \|\n\| --- \| --- \| --- \| --- \|\n", cards[0]
    )
    assert "\n| perplexity | " in cards[0]
    assert "On 8 examples of a.jsonl, greedy" in cards[0]
    assert cards[0].endswith("\n## How it was made\n\nBy hand.\n")


def test_a_card_that_is_no_text_is_said_before_the_work(tmp_path: Path, tiny_llama_dir: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", label_rows())
    folder = make_adapter(tiny_llama_dir, tmp_path / "adapter", rank=4)
    (folder / "README.md").write_bytes("# 名\n".encode("gb18030"))
    done = run("evaluate", "--data", data, "--model", tmp_path / "none", "--adapter", folder, "--card")
    assert (done.exit_code, "is no UTF-8 text" in done.stderr) == (1, True), done.output


def test_a_card_is_written_into_a_folder_and_not_into_a_server(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", label_rows())
    done = run("evaluate", "--data", data, "--server", "http://127.0.0.1:9", "--adapter", "x", "--card")
    assert (done.exit_code, "--card writes into folders" in done.stderr) == (1, True)
