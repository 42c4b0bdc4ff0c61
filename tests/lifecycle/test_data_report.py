"""What a look at rows finds before anything learns from them: each number by a row that is known to be so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manylora.cli.main import build
from manylora.lifecycle.data.report import MAX_ROWS_NAMED, Found, personal_kinds, report_of
from tests.lifecycle.helpers import write_rows

ROWS = [
    {"text": "a good film", "label": "good"},
    {"text": "a bad film", "label": "bad"},
    {"text": "a good film", "label": "good"},
    {"text": "a bad film", "label": "good"},
    {"text": "write to ann@example.org", "label": "bad"},
    {"text": "", "label": "bad"},
    {"text": "pay by 4111 1111 1111 1111", "label": "bad"},
    {"text": "?!", "label": "bad"},
]


def test_every_number_of_a_report_has_its_rows(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    held_out = write_rows(tmp_path / "eval.jsonl", [ROWS[1], {"text": "new", "label": "bad"}])

    report, rows = report_of(train)
    other, _ = report_of(held_out, learnt=rows)

    assert (report.used, report.refused) == (7, Found(1, (6,)))
    assert report.faults == ("row 6: text is empty",)
    assert report.repeated == Found(1, (3,))
    assert report.contrary == Found(2, (2, 4))
    assert report.empty == Found(1, (8,))
    assert report.labels == {"good": 3, "bad": 4}
    assert report.personal == {"card": Found(1, (7,)), "email": Found(1, (5,))}
    assert report.shared is None
    assert other.shared == Found(1, (1,))
    assert report.lengths["longest_row"] == 7
    assert report.lengths["longest"] == len("pay by 4111 1111 1111 1111bad")
    told = json.dumps(report.numbers(), ensure_ascii=False)
    assert not any(word in told for word in ("good", "bad", "film", "ann")), "numbers quote no row"


def test_of_many_rows_the_first_are_named() -> None:
    found = Found.of([*range(100, 0, -1), 5])
    assert (found.count, found.rows) == (100, tuple(range(1, MAX_ROWS_NAMED + 1)))


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("mail bob.smith+x@mail.example.co.uk now", ["email"]),
        ("call +49 30 1234 5678 or 13812345678", ["phone"]),
        ("card 4111-1111-1111-1111", ["card"]),
        ("card 4111-1111-1111-1112", []),
        ("000000000000000000", []),
        ("DE89 3704 0044 0532 0130 00", ["iban"]),
        ("DE88 3704 0044 0532 0130 00", []),
        ("身份证 11010519491231002X 号", ["resident_id"]),
        ("身份证 110105194912310021 号", []),
        ("078-05-1120", ["social_security"]),
        ("sk-abcdefghijklmnop1234", ["secret"]),
        ("-----BEGIN RSA PRIVATE KEY-----", ["secret"]),
        ("on 2024-05-01 at 10:30, 12,345,678 of 3.14159265358979", []),
        ("a@b, @home, user@", []),
    ],
)
def test_personal_data_is_known_by_its_form_and_its_check_digits(text: str, kinds: list[str]) -> None:
    assert [kind for kind in personal_kinds(text) if kind != "phone" or kind in kinds] == kinds


def test_no_text_takes_long() -> None:
    texts = ["a" * 200_000 + "@", "1 " * 100_000, "AA11 " * 50_000, "+1-" * 60_000, "@" + "a." * 90_000]
    code = (
        "import json, resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (60, 60)); "
        "from manylora.lifecycle.data.report import personal_kinds; "
        "[list(personal_kinds(text)) for text in json.load(sys.stdin)]"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(texts), text=True, check=False)
    assert done.returncode == 0, "it would be ended after a minute of CPU time"


def test_the_command_shows_it_and_ends_with_1_where_a_row_is_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke
    train = str(write_rows(tmp_path / "train.jsonl", ROWS))
    shown = run(build(), ["data", "check", train])
    assert shown.exit_code == 1
    assert "row 6: text is empty" in shown.output
    sound = str(write_rows(tmp_path / "sound.jsonl", ROWS[:5]))
    found = run(build(), ["data", "check", sound, "--eval", sound, "--json"])
    assert found.exit_code == 0
    first, second = json.loads(found.output)
    assert (first["rows"]["used"], first["shared"], second["shared"]["count"]) == (5, None, 5)
    assert first["label_counts"] == {"good": 3, "bad": 2}
    strange = str(write_rows(tmp_path / "strange.jsonl", [{"question": "a"}]))
    refused = run(build(), ["data", "check", strange])
    assert refused.exit_code == 2
