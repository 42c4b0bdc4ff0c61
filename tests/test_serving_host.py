"""Where the server listens, and what it says about it."""

import gc
import platform
from pathlib import Path
from typing import Any

import psutil
import pytest

from manylora.database.database import open_database
from manylora.serving.imports import uncollected
from manylora.serving.process import return_freed_memory, safe_host, url_of
from manylora.settings import Settings
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return Settings(data_dir=tmp_path, **changes)


def make_key(settings: Settings) -> None:
    database = open_database(settings.resolved_database_url)
    KeyStore(database).create("acme", Role.USER)
    database.close()


def test_without_a_key_only_this_machine_may_connect(tmp_path: Path) -> None:
    assert safe_host(settings(tmp_path, host="0.0.0.0")) == "127.0.0.1"


def test_with_a_key_the_host_asked_for_is_used(tmp_path: Path) -> None:
    make_key(settings(tmp_path))
    assert safe_host(settings(tmp_path, host="0.0.0.0")) == "0.0.0.0"


def test_allow_open_means_what_it_says(tmp_path: Path) -> None:
    assert safe_host(settings(tmp_path, host="0.0.0.0", allow_open=True)) == "0.0.0.0"


def test_loopback_is_always_used_as_asked_for(tmp_path: Path) -> None:
    assert safe_host(settings(tmp_path, host="::1")) == "::1"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("gpu7", "http://gpu7:80"),
    ],
)
def test_the_address_can_be_opened_in_a_browser(host: str, url: str) -> None:
    assert url_of(host, 80) == url


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_what_start_up_has_freed_goes_back_to_the_system() -> None:
    freed = [b"x" * 100_000 for _ in range(1000)]
    above = b"y" * 100_000  # in the way of what glibc gives back by itself
    del freed
    before = psutil.Process().memory_info().rss
    return_freed_memory()
    assert before - psutil.Process().memory_info().rss > 50_000_000
    assert len(above) == 100_000


@pytest.mark.parametrize("is_on", [True, False])
def test_nobody_looks_for_garbage_in_what_is_imported(is_on: bool) -> None:
    looks: list[str] = []

    def look(phase: str, _info: dict[str, int]) -> None:
        looks.append(phase)

    was_enabled = gc.isenabled()
    (gc.enable if is_on else gc.disable)()
    gc.callbacks.append(look)
    try:
        before = gc.get_freeze_count()
        with uncollected():
            made = [[number] for number in range(10 * gc.get_threshold()[0])]
        assert looks == []
        assert gc.get_freeze_count() - before >= len(made)
        assert gc.isenabled() is is_on
    finally:
        gc.callbacks.remove(look)
        (gc.enable if was_enabled else gc.disable)()
