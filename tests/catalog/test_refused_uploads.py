"""Uploads that are refused: each with its code, nothing left in the store, and the server goes on."""

import gzip
import io
import stat
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from starlette.types import Message

from manylora.catalog.archive import unpack
from manylora.engine.interface import Effect
from manylora.errors import InvalidAdapter, TooLarge
from manylora.settings import Settings
from tests.lora.malformed import MALFORMED

from .rig import CONFIG_FILE, TENSOR_FILE, CatalogEngine, Rig, running, sound_files, tar_of

pytestmark = pytest.mark.anyio

# Not what a form of files can carry: no file at all, a pipe. Archives of them are below.
_ONLY_IN_ARCHIVES = {"empty folder", "tensors are a pipe"}
AS_FILES = [case for case in MALFORMED if case[0] not in _ONLY_IN_ARCHIVES]


async def _assert_nothing_stayed(rig: Rig, name: str = "x") -> None:
    assert rig.stored() == []
    assert (await rig.call("GET", "/v1/adapters")).json()["data"] == []
    assert (await rig.call("GET", f"/v1/adapters/{name}")).status_code == 404
    rig.catalog.check_integrity()
    await rig.assert_answers()


async def test_a_refused_upload_is_counted(settings: Settings) -> None:
    async with running(settings) as rig:
        assert (await rig.push("x", {**sound_files(), CONFIG_FILE: b"{}"})).status_code == 422
        await _assert_nothing_stayed(rig)
        assert 'uploads_total{result="refused",tenant="public"} 1.0' in rig.metrics.render().decode()


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for info, data in members:
            info.size = len(data) if info.type == tarfile.REGTYPE else info.size
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return out.getvalue()


def _info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def _with(*extra: tuple[tarfile.TarInfo, bytes]) -> bytes:
    return _tar(*((_info(name), data) for name, data in sound_files().items()), *extra)


def _zip(members: dict[str, bytes], *, mode: int = stat.S_IFREG, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as bundle:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode | 0o644) << 16
            bundle.writestr(info, data, compression)
    return out.getvalue()


def _raw_zip_name(name: bytes) -> bytes:
    """A zip whose member has a name that zipfile would not write."""
    placeholder = b"z" * len(name)
    return _zip({placeholder.decode(): b"x"}).replace(placeholder, name)


def _negative_size() -> bytes:
    block = bytearray(_info("x").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (-(2**20)).to_bytes(12, "big", signed=True)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return tar_of(sound_files(), mode="w")[:-10240] + bytes(block) + b"\0" * 10240


def _encrypted_zip() -> bytes:
    data = bytearray(_zip(sound_files()))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def _pax_bomb() -> bytes:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 3 * 2**20
    return gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + b"0" * header.size + b"\0" * 1024)


def _sparse() -> bytes:
    info = tarfile.TarInfo(TENSOR_FILE)
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 0)
    block[483:495] = b"%011o\0" % 2**32
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + b"\0" * 1024


ARCHIVES = [
    ("not an archive", b"hello, I am text" * 64, "unsafe_archive"),
    ("empty", b"", "unsafe_archive"),
    ("bzip2", b"BZh91AY&SY" + b"\0" * 600, "unsafe_archive"),
    ("gzip cut short", tar_of(sound_files())[:-40], "unsafe_archive"),
    ("gzip with a wrong checksum", tar_of(sound_files())[:-8] + b"\0" * 8, "unsafe_archive"),
    ("gzip of text", gzip.compress(b"hello" * 300), "unsafe_archive"),
    ("tar cut short", tar_of(sound_files(), mode="w")[:1500], "missing_file"),
    ("tar cut short in a file", tar_of(sound_files(), mode="w")[:2000], "unsafe_archive"),
    ("tar of nothing", tar_of({}), "missing_file"),
    ("tar with a parent path", _with((_info("../evil"), b"x")), "unsafe_archive"),
    ("tar with an inner parent path", _with((_info("a/../../evil"), b"x")), "unsafe_archive"),
    ("tar with an absolute path", _with((_info("/etc/cron.d/evil"), b"x")), "unsafe_archive"),
    ("tar with a symbolic link", _with((_info("l", tarfile.SYMTYPE, "/etc/passwd"), b"")), "unsafe_archive"),
    ("tar with the config a link", _tar((_info(CONFIG_FILE, tarfile.SYMTYPE, "/etc/passwd"), b"")), "unsafe_archive"),
    ("tar with a hard link", _with((_info("l", tarfile.LNKTYPE, TENSOR_FILE), b"")), "unsafe_archive"),
    ("tar with a device", _with((_info("d", tarfile.CHRTYPE), b"")), "unsafe_archive"),
    ("tar with a block device", _with((_info("d", tarfile.BLKTYPE), b"")), "unsafe_archive"),
    ("tar with a pipe", _with((_info("p", tarfile.FIFOTYPE), b"")), "unsafe_archive"),
    ("tar with a sparse file", _sparse(), "unsafe_archive"),
    ("tar with a negative size", _negative_size(), "unsafe_archive"),
    ("tar with a huge extended header", _pax_bomb(), "unsafe_archive"),
    ("tar with an archive inside", _with((_info("more.tar.gz"), tar_of(sound_files()))), "unsafe_archive"),
    ("tar two folders deep", tar_of(sound_files(), prefix="a/b/"), "unsafe_archive"),
    (
        "tar with two adapters",
        tar_of({f"{f}/{n}": d for f in "ab" for n, d in sound_files().items()}),
        "unsafe_archive",
    ),
    ("tar with a file twice", _with((_info(CONFIG_FILE), b"{}")), "unsafe_archive"),
    ("tar with a backslash", _with((_info("..\\evil"), b"x")), "unsafe_archive"),
    ("tar with a control character", _with((_info("a\nb"), b"x")), "unsafe_archive"),
    ("tar with a long name", _with((_info("a" * 200), b"x")), "unsafe_archive"),
    ("tar with many members", _with(*((_info(f"n{i}.md"), b"x") for i in range(1023))), "unsafe_archive"),
    ("tar with a link in a checkpoint", _with((_info("c-1/l", tarfile.SYMTYPE, "/etc/passwd"), b"")), "unsafe_archive"),
    ("tar with a pickle", _tar((_info(CONFIG_FILE), b"{}"), (_info("adapter_model.bin"), b"\x80")), "not_safetensors"),
    ("tar without the tensors", _tar((_info(CONFIG_FILE), sound_files()[CONFIG_FILE])), "missing_file"),
    ("tar bomb", tar_of({TENSOR_FILE: b"\0" * (3 * 2**20), CONFIG_FILE: b" " * 2**20}), "bad_config"),
    ("zip cut short", _zip(sound_files())[:-30], "unsafe_archive"),
    ("zip with a parent path", _zip({**sound_files(), "../evil": b"x"}), "unsafe_archive"),
    ("zip with an absolute path", _zip({**sound_files(), "/evil": b"x"}), "unsafe_archive"),
    ("zip with a drive", _zip({**sound_files(), "C:evil": b"x"}), "unsafe_archive"),
    ("zip with a link", _zip({TENSOR_FILE: b"/etc/passwd"}, mode=stat.S_IFLNK), "unsafe_archive"),
    ("zip with a device", _zip({TENSOR_FILE: b""}, mode=stat.S_IFCHR), "unsafe_archive"),
    ("zip with a zero byte", _raw_zip_name(b"adapter\0model"), "unsafe_archive"),
    ("zip with an empty name", _raw_zip_name(b"\0"), "unsafe_archive"),
    ("zip with a name twice but for the dot", _zip({CONFIG_FILE: b"", f"./{CONFIG_FILE}": b""}), "unsafe_archive"),
    ("zip in another compression", _zip(sound_files(), compression=zipfile.ZIP_LZMA), "unsafe_archive"),
    ("zip encrypted", _encrypted_zip(), "unsafe_archive"),
    ("zip in a zip", _zip({"inner.zip": _zip(sound_files())}), "unsafe_archive"),
    ("zip with damaged data", _zip(sound_files()).replace(b'"peft_type"', b'"peft_typo"', 1), "unsafe_archive"),
]


@pytest.mark.parametrize(("data", "code"), [pytest.param(data, code, id=name) for name, data, code in ARCHIVES])
async def test_an_unsafe_archive_gets_its_code_and_leaves_nothing(settings: Settings, data: bytes, code: str) -> None:
    outside = settings.data_dir.parent
    async with running(settings) as rig:
        response = await rig.push_archive("x", data)
        assert response.status_code == 422, response.text
        assert code in {problem["code"] for problem in response.json()["error"]["problems"]}
        assert [p.name for p in outside.iterdir()] == ["data"]
        await _assert_nothing_stayed(rig)


_SMALL = {f"x/{CONFIG_FILE}": b"{}" * 9, f"x/{TENSOR_FILE}": b"0" * 40, "é" * 70: b"y"}
SEEDS = [
    _zip(_SMALL),
    _zip(_SMALL, compression=zipfile.ZIP_DEFLATED),
    tar_of(_SMALL, mode="w")[:-8192],
    tar_of(_SMALL),
]


@settings_of_hypothesis(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.one_of(st.none(), st.integers(0, 2**16)),
)
def test_a_changed_archive_raises_nothing_but_a_refusal(
    seed: bytes, changes: list[tuple[int, int]], length: int | None
) -> None:
    data = bytearray(seed)
    for place, value in changes:
        data[place % len(data)] = value
    with tempfile.TemporaryDirectory() as scratch:
        archive, target = Path(scratch) / "archive", Path(scratch) / "adapter"
        archive.write_bytes(data[:length])
        target.mkdir()
        with suppress(InvalidAdapter, TooLarge):
            unpack(archive, target, max_bytes=2**20)
        assert {path.name for path in target.iterdir()} <= {CONFIG_FILE, TENSOR_FILE}


@pytest.mark.parametrize("mode", ["w:gz", "zip"])
async def test_an_archive_that_unpacks_to_too_much_is_too_large(settings: Settings, mode: str) -> None:
    zeros = {TENSOR_FILE: b"\0" * (8 * 2**20)}
    data = _zip(zeros, compression=zipfile.ZIP_DEFLATED) if mode == "zip" else tar_of(zeros, mode=mode)
    assert len(data) < 100_000
    async with running(settings) as rig:
        response = await rig.push_archive("x", data)
        assert response.status_code == 413
        await _assert_nothing_stayed(rig)


async def test_an_archive_that_expands_without_measure_is_unsafe(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", max_adapter_size=64 * 2**20)
    async with running(settings) as rig:
        response = await rig.push_archive("x", tar_of({TENSOR_FILE: b"\0" * (32 * 2**20)}))
        assert [p["code"] for p in response.json()["error"]["problems"]] == ["unsafe_archive"]
        await _assert_nothing_stayed(rig)


async def test_a_zip_that_lies_about_its_size_is_refused(settings: Settings) -> None:
    honest = _zip({TENSOR_FILE: b"\0" * (8 * 2**20)}, compression=zipfile.ZIP_DEFLATED)
    data = honest.replace(struct.pack("<I", 8 * 2**20), struct.pack("<I", 64))
    async with running(settings) as rig:
        response = await rig.push_archive("x", data)
        assert response.status_code == 422
        await _assert_nothing_stayed(rig)


async def test_every_problem_is_told_at_once(settings: Settings) -> None:
    async with running(settings) as rig:
        response = await rig.push_archive("x", _with((_info("../a"), b""), (_info("/b"), b""), (_info("c\\d"), b"")))
        assert [p["where"] for p in response.json()["error"]["problems"]][:3] == ["../a", "/b", "c\\\\d"]


@pytest.mark.parametrize(
    ("effect", "code"),
    [(Effect(8, 0.0, 0.0), "no_effect"), (Effect(8, float("nan"), 0.0), "not_finite"),
     (Effect(8, float("inf"), float("inf")), "not_finite")],
)  # fmt: skip
async def test_an_adapter_without_a_sound_effect_is_refused(settings: Settings, effect: Effect, code: str) -> None:
    async with running(settings, engine=CatalogEngine(effect=effect)) as rig:
        response = await rig.push("x")
        assert [p["code"] for p in response.json()["error"]["problems"]] == [code]
        await _assert_nothing_stayed(rig)
        assert len(rig.engine.forgotten) == 1


@pytest.mark.parametrize(
    "name",
    ["", "A", "-x", ".x", "x" * 65, "x/y", "../x", "x@1", "base:x", "x y", "é", "x\n", "x\0", "base-model"],
)
async def test_a_bad_name_is_an_invalid_request(settings: Settings, name: str) -> None:
    async with running(settings) as rig:
        response = await rig.push(name)
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "name")
        await _assert_nothing_stayed(rig, "nothing")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"activate": "perhaps"}, "activate"), ({"pinned": "2"}, "pinned"), ({"colour": "red"}, "colour"),
     ({"description": "x" * 5000}, "description"), ({"description": "x" * 70_000}, "description")],
)  # fmt: skip
async def test_a_bad_field_is_named(settings: Settings, fields: dict[str, str], param: str) -> None:
    async with running(settings) as rig:
        response = await rig.push("x", None, None, **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        await _assert_nothing_stayed(rig)


async def test_files_over_the_limit_are_too_large(settings: Settings) -> None:
    async with running(settings) as rig:
        response = await rig.push("x", {**sound_files(), TENSOR_FILE: b"\0" * (4 * 2**20 + 1)})
        assert response.status_code == 413
        await _assert_nothing_stayed(rig)


async def test_a_body_of_unannounced_length_is_cut_off_at_the_limit(settings: Settings) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="archive"; filename="a"\r\n\r\n'
        while sent < 2**26:
            sent += 2**16
            yield b"\0" * 2**16

    async with running(settings) as rig:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        response = await rig.client.post("/v1/adapters", content=endless(), headers=headers)
        assert response.status_code == 413
        assert sent < 2**26
        await _assert_nothing_stayed(rig)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        pytest.param(b"", "multipart/form-data", id="no boundary"),
        pytest.param(b"", "multipart/form-data; boundary=b", id="empty"),
        pytest.param(b"nonsense", "multipart/form-data; boundary=b", id="nonsense"),
        pytest.param(b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx', "multipart/form-data; boundary=b",
                     id="cut short"),
        pytest.param(b"--b\r\n" + b"a" * 50_000, "multipart/form-data; boundary=b", id="header without an end"),
        pytest.param(b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff\r\n--b--\r\n',
                     "multipart/form-data; boundary=b", id="not UTF-8"),
        pytest.param(b"name=x", "application/x-www-form-urlencoded", id="a plain form"),
        pytest.param(b"{", "application/json", id="broken JSON"),
        pytest.param(b"[]", "application/json", id="a list"),
        pytest.param(b"", "", id="no type"),
    ],
)  # fmt: skip
async def test_a_broken_body_is_an_invalid_request(settings: Settings, body: bytes, content_type: str) -> None:
    async with running(settings) as rig:
        headers = {"content-type": content_type} if content_type else {}
        response = await rig.client.post("/v1/adapters", content=body, headers=headers)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
        await _assert_nothing_stayed(rig)


async def test_both_forms_at_once_are_an_invalid_request(settings: Settings) -> None:
    async with running(settings) as rig:
        parts = [("files", (CONFIG_FILE, b"{}")), ("archive", ("a.zip", b"PK"))]
        response = await rig.call("POST", "/v1/adapters", data={"name": "x"}, files=parts)
        assert response.status_code == 400
        await _assert_nothing_stayed(rig)


@pytest.mark.parametrize("name", ["../adapter_config.json", "a/b", "", "nul\0", "x" * 200, ".."])
async def test_a_file_name_is_never_a_path(settings: Settings, name: str) -> None:
    async with running(settings) as rig:
        body = (
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx\r\n--b\r\nContent-Disposition: form-data; '
            b'name="files"; filename="' + name.encode() + b'"\r\n\r\ndata\r\n--b--\r\n'
        )
        headers = {"content-type": "multipart/form-data; boundary=b"}
        response = await rig.client.post("/v1/adapters", content=body, headers=headers)
        assert response.status_code in (400, 422), response.text
        await _assert_nothing_stayed(rig)


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(settings: Settings) -> None:
    async with running(settings) as rig:
        messages: Iterator[Message] = iter(
            [
                {"type": "http.request", "body": b'--b\r\nContent-Disposition: form-data; name="archive"\r\n\r\nPK',
                 "more_body": True},
                {"type": "http.disconnect"},
            ]
        )  # fmt: skip

        async def receive() -> Message:
            return next(messages)

        async def send(message: Message) -> None:
            raise AssertionError(f"nobody is there to hear {message}")

        scope = {
            "type": "http", "method": "POST", "path": "/v1/adapters", "raw_path": b"/v1/adapters", "root_path": "",
            "query_string": b"", "scheme": "http", "http_version": "1.1", "server": ("test", 80),
            "headers": [(b"content-type", b"multipart/form-data; boundary=b")],
        }  # fmt: skip
        await rig.app(scope, receive, send)
        await _assert_nothing_stayed(rig)
