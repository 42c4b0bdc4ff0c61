"""What the registry keeps of an adapter's own tokens: counted, and read where somebody asks for it."""

import io
import json
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from manylora.catalog import records
from manylora.identity import CONFIG_FILE, OWN_TOKENS_FILE, TOKENIZER_FILE, OwnToken, Vocabulary
from manylora.lora.format.reader import digest_of
from manylora.settings import Settings
from manylora.tenants.limits import TenantStore

from .rig import running, sound_files

pytestmark = pytest.mark.anyio


def with_tokens(num: int, seed: float = 1.0) -> dict[str, bytes]:
    added = [{"id": 90 + n, "content": f"<{n:0100}>"} for n in range(num)]
    return {**sound_files(seed), TOKENIZER_FILE: json.dumps({"added_tokens": added}).encode()}


def text_of(num: int) -> str:
    own = Vocabulary.of(None, [OwnToken(90 + n, f"<{n:0100}>", normalized=False) for n in range(num)])
    assert own is not None
    return own.text


@contextmanager
def statements() -> Iterator[list[str]]:
    """Everything that databases are asked meanwhile."""
    found: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        found.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", note)


async def test_a_vocabulary_counts_in_the_size_and_the_quota(settings: Settings) -> None:
    async with running(settings, "acme:manager") as rig:
        bare = (await rig.push("bare", sound_files(), "acme:manager")).json()["size_bytes"]
        large = (await rig.push("large", with_tokens(50), "acme:manager")).json()
        assert large["size_bytes"] == bare + len(text_of(50).encode())
        shown = (await rig.call("GET", "/v1/adapters/large", "acme:manager")).json()
        assert shown["size_bytes"] == large["size_bytes"]
        kept = bare + large["size_bytes"]
        TenantStore(rig.catalog.database).change("acme", max_adapter_bytes=kept + bare + len(text_of(40)) - 1)
        refused = await rig.push("more", with_tokens(40, 2.0), "acme:manager")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
        assert (await rig.push("more", with_tokens(39, 2.0), "acme:manager")).status_code == 201
        rig.catalog.check_integrity()


async def test_vocabularies_are_read_for_whoever_runs_or_downloads_them(settings: Settings) -> None:
    async with running(settings, "acme:manager") as rig:
        for seed in (1.0, 2.0):
            await rig.push("x", with_tokens(3, seed), "acme:manager", activate="true")
        with statements() as asked:
            for path in ("", "/x", "/x/versions/1"):
                answer = await rig.call("GET", f"/v1/adapters{path}", "acme:manager")
                assert answer.status_code == 200
        assert any("versions.digest" in each for each in asked)
        assert not any("vocabulary" in each for each in asked)
    async with running(settings) as rig:
        await rig.make_keys("acme:manager")
        found = rig.catalog.directory.resolve("acme", "x").vocabulary
        assert found is not None
        assert found.text == text_of(3)
        entry = rig.catalog.directory.own("acme", "x")
        assert entry is not None
        assert entry.versions[1].ref.vocabulary is found  # one for both versions
        archive = (await rig.call("GET", "/v1/adapters/x/versions/1/download", "acme:manager")).content
        with tarfile.open(fileobj=io.BytesIO(archive)) as members:
            file = members.extractfile(OWN_TOKENS_FILE)
            assert file is not None
            assert file.read().decode() == text_of(3)


def test_a_vocabulary_that_nobody_has_is_not_kept() -> None:
    text = text_of(7)
    held = records._vocabulary(text)
    assert records._vocabulary(text_of(7)) is held
    assert text in records._VOCABULARIES
    del held
    assert text not in records._VOCABULARIES


def say_registered_before(settings: Settings, digest: str, defaults: str) -> None:
    """As if the adapter's one version and its folder's content came from before tokenizers were looked at."""
    key = f"{digest}+{sha256(defaults.encode()).hexdigest()[:16]}" if defaults else digest
    with sqlite3.connect(settings.data_dir / "registry.sqlite3") as database:
        database.execute("UPDATE versions SET digest = ?, defaults = ?, vocabulary = ''", (digest, defaults))
        database.execute("UPDATE folder_contents SET digest = ?", (key,))
    database.close()


NESTED = {"logit_bias": {"7": 1.0, "5": 2.0}, "temperature": 0.0}


@pytest.mark.parametrize(
    ("defaults", "num_tokens", "is_left"),
    [(NESTED, 0, True), (None, 2, True), (None, 2, False), (NESTED, 2, True)],
    ids=["order of names", "tokens", "tokens of what is active", "both"],
)
async def test_what_was_known_in_another_way_before_undoes_no_decision(
    settings: Settings, tmp_path: Path, defaults: dict[str, Any] | None, num_tokens: int, is_left: bool
) -> None:
    """A folder whose files count in other ways since an upgrade is looked at again."""
    folder = tmp_path / "adapters" / "x"
    folder.mkdir(parents=True)
    files = with_tokens(num_tokens) if num_tokens else sound_files()
    files |= {} if defaults is None else {"manylora.json": json.dumps(defaults).encode()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    async with running(settings) as rig:
        await rig.catalog.register_folder(folder.parent)
    text = json.dumps(defaults, sort_keys=True, separators=(",", ":")) if defaults else ""
    say_registered_before(settings, digest_of(folder), text)
    async with running(settings) as rig:
        if is_left:
            assert (await rig.push("x", sound_files(2.0), activate="true")).json()["version"] == 2
        (folder / CONFIG_FILE).touch()
        await rig.catalog.register_folder(folder.parent)
        shown = (await rig.call("GET", "/v1/adapters/x")).json()
        assert len(shown["versions"]) == 1 + is_left + bool(num_tokens)  # with its tokens it is another
        assert shown["active_version"] == (2 if is_left or num_tokens else 1)
        rig.catalog.check_integrity()
        await rig.catalog.register_folder(folder.parent)
        assert (await rig.call("GET", "/v1/adapters/x")).json() == shown
