"""The suite's HTTP clients: those that ask for nothing share certificates, and what others change is nobody else's."""

import ssl
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest


def context_of(client: Any) -> ssl.SSLContext:
    found: ssl.SSLContext = client._transport._pool._ssl_context
    return found


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_clients_with_settings_of_their_own_share_nothing(
    library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with library.Client() as one, library.Client() as other, library.Client(verify=False) as unverified:
        assert context_of(one) is context_of(other)
        assert context_of(one).verify_mode == ssl.CERT_REQUIRED
        assert context_of(unverified).verify_mode == ssl.CERT_NONE
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
        with library.Client() as elsewhere:
            assert context_of(elsewhere) is not context_of(one)


def test_who_asks_the_library_gets_a_context_of_its_own() -> None:
    assert ssl.create_default_context() is not ssl.create_default_context()
