"""`manylora adapters` and `manylora keys` against a real server process: tables, JSON, exit codes."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from manylora.cli.main import build
from manylora.tenants.interface import Role

from .real_server import Server, serving
from .rig import CONFIG_FILE, files_of, sound_files, tar_of, write_sound

pytestmark = pytest.mark.slow

HOLDERS = (("acme", Role.MANAGER), ("acme", Role.USER), ("rival", Role.MANAGER), ("ops", Role.ADMIN))


class Shell:
    """Runs commands as a user with a key would."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.keys = {
            f"{tenant}:{role}": self.run(
                None, "keys", "create", "--tenant", tenant, "--role", role, "--data-dir", str(server.data)
            ).stdout.strip()
            for tenant, role in HOLDERS
        }

    def run(self, who: str | None, *words: str, url: str | None = None) -> Result:
        env = {"MANYLORA_URL": url or str(self.server.client.base_url), "COLUMNS": "300"}
        env["MANYLORA_KEY"] = self.keys.get(who, who) if who else ""
        return CliRunner().invoke(build(), list(words), env=env)

    def json(self, who: str, *words: str) -> Any:
        result = self.run(who, *words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture(scope="module")
def shell(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with serving(tiny_base, tmp_path_factory.mktemp("server")) as server:
        shell = Shell(server)
        while shell.run("a wrong key", "adapters", "list").exit_code == 0:  # open until it notices the first key
            pass
        yield shell


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sound(tmp_path / "billing", 3.0)


def test_a_folder_is_pushed_shown_promoted_and_deleted(shell: Shell, folder: Path) -> None:
    who = "acme:manager"
    pushed = shell.run(who, "adapters", "push", str(folder), "--description", "Bills")
    assert (pushed.exit_code, pushed.stdout) == (0, "billing@1 is ready and active\n")
    write_sound(folder, 4.0)
    second = shell.run(who, "adapters", "push", str(folder), "--name", "billing", "--note", "a longer training")
    assert second.stdout.splitlines() == [
        "billing@2 is ready and not active",
        "billing@1 answers to the name billing now.",
        '  compare: manylora ask billing@1 --compare billing@2 "…"',
        "  promote: manylora adapters promote billing@2",
    ]
    again = shell.json(who, "adapters", "push", str(folder), "--name", "billing", "--no-activate")
    assert (again["version"], again["active"], again["active_version"]) == (2, False, 1)
    shown = shell.run(who, "adapters", "show", "billing").stdout
    assert "Bills" in shown
    assert [line.split()[0] for line in shown.splitlines() if line[:1].isdigit()] == ["1", "2"]
    assert shell.run(who, "adapters", "promote", "billing@2", "--note", "better").stdout == "billing@2 is active\n"
    assert shell.json(who, "adapters", "show", "billing")["active_version"] == 2
    assert shell.run(who, "adapters", "rollback", "billing", "--note", "worse").stdout == "billing@1 is active\n"
    assert shell.run(who, "adapters", "rollback", "billing").exit_code == 6
    assert shell.json(who, "adapters", "promote", "billing@2")["active_version"] == 2
    told = shell.run(who, "adapters", "history", "billing").stdout
    assert ("rollback @1" in told, "a longer training" in told, "2 → 1" in told) == (True, True, True)
    changes = shell.json(who, "adapters", "history", "billing")
    assert [change["note"] for change in changes] == ["", "worse", "better", "a longer training", ""]
    newest = shell.json(who, "adapters", "history", "billing", "--limit", "1")
    assert [(c["action"], c["from_version"], c["to_version"]) for c in newest] == [("promote", 1, 2)]
    assert shell.run(who, "adapters", "pin", "billing").exit_code == 0
    assert shell.json(who, "adapters", "show", "billing@2")["pinned"] is True
    assert shell.run(who, "adapters", "pin", "billing", "--off").exit_code == 0
    assert shell.run(who, "adapters", "delete", "billing@2", "--yes").exit_code == 6
    assert shell.json(who, "adapters", "delete", "billing") == {"deleted": "billing"}
    assert shell.run(who, "adapters", "show", "billing").exit_code == 4


def test_what_is_not_sent_of_a_folder_is_said(shell: Shell, tmp_path: Path) -> None:
    folder = write_sound(tmp_path / "trained", 7.0)
    (folder / "training_args.bin").write_bytes(b"\x80")
    (folder / "checkpoint-50").mkdir()
    (warning,) = shell.json("acme:manager", "adapters", "push", str(folder))["report"]["warnings"]
    assert "'checkpoint-50/', 'training_args.bin'" in warning
    assert "Left aside" in shell.run("acme:manager", "adapters", "push", str(folder)).output
    assert shell.run("acme:manager", "adapters", "delete", "trained", "--yes").exit_code == 0


def test_an_archive_is_pushed_and_listed(shell: Shell, tmp_path: Path) -> None:
    archive = tmp_path / "letters.tar.gz"
    archive.write_bytes(tar_of(sound_files(5.0)))
    assert shell.run("acme:manager", "adapters", "push", str(archive)).exit_code == 0
    (listed,) = shell.json("acme:user", "adapters", "list")
    assert (listed["name"], listed["tenant"], listed["active_version"]) == ("letters", "acme", 1)
    assert "letters" in shell.run("acme:user", "adapters", "list").stdout
    assert "letters" not in shell.run("rival:manager", "adapters", "list").stdout
    assert "letters" in shell.run("ops:admin", "adapters", "list", "--tenant", "acme").stdout


def test_a_mix_is_saved_and_shown_with_its_parts(shell: Shell, tmp_path: Path) -> None:
    who = "acme:manager"
    for name, seed in (("left", 8.0), ("right", 9.0)):
        assert shell.run(who, "adapters", "push", str(write_sound(tmp_path / name, seed))).exit_code == 0
    saved = shell.run(who, "adapters", "mix", "both", "left=0.7", "right@1")
    assert saved.exit_code == 0, saved.output
    assert saved.stdout.startswith("both@1 is ")
    assert {"0.7 x left@1", "1 x right@1"} == set(saved.stdout.removeprefix("both@1 is ").split(", ")[0].split(" + "))
    assert "0.7 x left@1" in shell.run(who, "adapters", "show", "both").stdout
    assert "0.7 x left@1" in shell.run(who, "adapters", "show", "both@1").stdout
    assert shell.json(who, "adapters", "mix", "both", "left=0.5", "--no-activate")["active"] is False
    assert shell.run(who, "adapters", "mix", "both", "left=much").exit_code == 2
    assert shell.run(who, "adapters", "mix", "both", "left=5").exit_code == 2
    assert shell.run(who, "adapters", "delete", "left", "--yes").exit_code == 6
    for name in ("both", "left", "right"):
        assert shell.run(who, "adapters", "delete", name, "--yes").exit_code == 0


def test_a_canary_is_begun_shown_and_stopped(shell: Shell, tmp_path: Path) -> None:
    who = "acme:manager"
    for number in (1, 2):
        folder = write_sound(tmp_path / f"v{number}", 20.0 + number)
        assert shell.run(who, "adapters", "push", str(folder), "--name", "tried").exit_code == 0
    begun = shell.run(who, "adapters", "canary", "tried@2", "--share", "0.25", "--hours", "2", "--note", "try it")
    assert begun.exit_code == 0, begun.output
    assert begun.stdout.startswith("tried@2 at 0.25 runs until ")
    found = shell.json(who, "adapters", "canary", "tried")
    assert (found["version"], found["active_version"], found["share"], found["ended"]) == (2, 1, 0.25, None)
    assert shell.json(who, "adapters", "show", "tried")["canary"] == {"version": 2, "share": 0.25}
    stopped = shell.run(who, "adapters", "canary", "tried", "--stop")
    assert "(stopped)" in stopped.stdout
    assert "try it" in shell.run(who, "adapters", "history", "tried").stdout
    for wrong in (("tried@2",), ("tried", "--share", "0.1"), ("tried@2", "--share", "0.1", "--stop"), ("no/name",)):
        assert shell.run(who, "adapters", "canary", *wrong).exit_code == 2, wrong
    assert shell.run(who, "adapters", "canary", "tried@1", "--share", "0.1").exit_code == 6


def test_what_is_pushed_comes_back_byte_for_byte(shell: Shell, tmp_path: Path) -> None:
    folder = write_sound(tmp_path / "bytes", 6.0)
    (folder / CONFIG_FILE).write_text(json.dumps(json.loads((folder / CONFIG_FILE).read_text()), indent=7))
    assert shell.run("acme:manager", "adapters", "push", str(folder)).exit_code == 0
    answer = shell.server.client.get(
        "/v1/adapters/bytes/versions/1/download", headers={"authorization": f"Bearer {shell.keys['acme:manager']}"}
    )
    assert answer.status_code == 200
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        tar.extractall(tmp_path / "back", filter="data")
    assert files_of(tmp_path / "back") == files_of(folder)


@pytest.mark.parametrize(
    ("who", "words", "code", "said"),
    [
        ("acme:user", ["adapters", "push", "{sound}"], 5, "role 'manager'"),
        ("nonsense", ["adapters", "list"], 5, "API key"),
        (None, ["adapters", "list"], 5, "Commands take the key from MANYLORA_KEY."),
        (None, ["evaluate", "--server", "{url}", "--adapter", "a", "--data", "{rows}"], 1, "key from MANYLORA_KEY."),
        ("acme:manager", ["adapters", "push", "{bad}"], 3, "bad_config"),
        ("acme:manager", ["adapters", "push", "{sound}", "--name", "Not a name"], 2, "'name' must be"),
        ("acme:manager", ["adapters", "push", "/nowhere"], 2, "neither a folder"),
        ("acme:manager", ["adapters", "show", "absent"], 4, "no adapter 'absent'"),
        ("acme:manager", ["adapters", "show", "a/b"], 2, "not NAME"),
        ("acme:manager", ["adapters", "promote", "absent"], 2, "not NAME@VERSION"),
        ("rival:manager", ["adapters", "push", "{sound}", "--tenant", "acme"], 5, "'admin'"),
    ],
)
def test_an_exit_code_says_what_went_wrong(
    shell: Shell, tmp_path: Path, who: str | None, words: list[str], code: int, said: str
) -> None:
    sound = write_sound(tmp_path / "sound", 7.0)
    bad = write_sound(tmp_path / "bad", r=0)
    (rows := tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    url = shell.server.client.base_url
    result = shell.run(who, *(word.format(sound=sound, bad=bad, rows=rows, url=url) for word in words))
    assert (result.exit_code, result.exception is None or isinstance(result.exception, SystemExit)) == (code, True)
    assert said in result.stderr


def test_each_problem_of_a_push_is_said_once(shell: Shell, tmp_path: Path) -> None:
    bad = write_sound(tmp_path / "bad", r=0)
    refused = shell.run("acme:manager", "adapters", "push", str(bad), "--json")
    (problem, *_) = json.loads(refused.stdout)["error"]["problems"]
    said = shell.run("acme:manager", "adapters", "push", str(bad)).stderr
    assert said.count(problem["message"]) == 1
    assert "error: The adapter was refused: 1 problem, above." in said


@pytest.mark.parametrize(("url", "code"), [("http://127.0.0.1:1", 8), ("127.0.0.1:8000", 2)])
def test_a_server_that_cannot_be_reached_has_its_own_exit_code(shell: Shell, url: str, code: int) -> None:
    result = shell.run("acme:manager", "adapters", "list", url=url)
    assert result.exit_code == code
    assert "MANYLORA_URL" in result.stderr


def test_a_used_up_quota_is_told_with_the_time_to_come_back(shell: Shell, tmp_path: Path) -> None:
    data = ["--data-dir", str(shell.server.data)]
    limits = shell.run(None, "tenants", "set", "rival", "--max-adapters", "0", "--json", *data)
    assert json.loads(limits.stdout)["max_adapters"] == 0
    result = shell.run("rival:manager", "adapters", "push", str(write_sound(tmp_path / "one", 8.0)))
    assert result.exit_code == 7
    assert "quota of adapters (0 of 0)" in result.stderr
    assert "Retry-After: 60 s" in result.stderr


def test_a_revoked_key_is_worthless_within_seconds(shell: Shell) -> None:
    data = ["--data-dir", str(shell.server.data)]
    key = shell.run(None, "keys", "create", "--tenant", "acme", "--json", *data).stdout
    made = json.loads(key)
    while shell.run(made["key"], "adapters", "list").exit_code != 0:
        pass
    revoked = json.loads(shell.run(None, "keys", "revoke", made["prefix"], "--json", *data).stdout)
    assert (revoked["id"], revoked["revoked"] is not None) == (made["id"], True)
    while shell.run(made["key"], "adapters", "list").exit_code != 5:
        pass
    listed = shell.run(None, "keys", "list", *data).stdout
    assert made["prefix"] in listed
    assert made["key"] not in listed


def test_validate_gives_offline_the_report_that_a_push_gives(shell: Shell, tiny_base: Path, folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 999, "content": "<far>"}]}')
    offline = json.loads(
        shell.run(None, "adapters", "validate", str(folder), "--model", str(tiny_base), "--json").stdout
    )
    pushed = shell.json("acme:manager", "adapters", "push", str(folder), "--name", "validated")
    effect = pushed["report"].pop("effect")
    assert effect["max_abs_logit_delta"] > 0
    assert offline["report"].pop("effect") is None
    assert any("<far>" in text for text in offline["report"]["warnings"])
    assert offline == {key: pushed[key] for key in offline}


def test_validate_finds_offline_the_problems_that_a_push_finds(shell: Shell, tiny_base: Path, tmp_path: Path) -> None:
    bad = write_sound(tmp_path / "bad", r=0, surprise=1)
    offline = shell.run(None, "adapters", "validate", str(bad), "--model", str(tiny_base), "--json")
    pushed = shell.run("acme:manager", "adapters", "push", str(bad), "--json")
    assert offline.exit_code == pushed.exit_code == 3
    problems = [json.loads(result.stdout)["error"]["problems"] for result in (offline, pushed)]
    assert problems[0] == problems[1]
    assert {problem["code"] for problem in problems[0]} == {"bad_config", "unknown_config_key"}


def test_the_card_of_a_version_is_shown_as_it_came(shell: Shell, folder: Path) -> None:
    (folder / "README.md").write_text("# 账单\n\n- a [list]\n", encoding="utf-8")
    shell.json("acme:manager", "adapters", "push", str(folder), "--name", "carded")
    for label in ("carded", "carded@1"):
        shown = shell.run("acme:user", "adapters", "show", label, "--card")
        assert (shown.exit_code, shown.stdout) == (0, "# 账单\n\n- a [list]\n")
    assert shell.json("acme:user", "adapters", "show", "carded", "--card")["examples"] == []
    (folder / "README.md").unlink()
    shell.json("acme:manager", "adapters", "push", str(folder), "--name", "cardless")
    missing = shell.run("acme:user", "adapters", "show", "cardless", "--card")
    assert (missing.exit_code, "README.md" in missing.stderr) == (4, True)
