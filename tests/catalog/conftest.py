"""Settings on a folder of the test's own, and a tiny base for real servers."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora.settings import Settings

from . import postgres


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_adapter_size=4 * 2**20)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base for which `tests.lora.malformed` makes its adapters, with the vocabulary that a tokenizer needs."""
    from tests.lora.malformed import TINY_LLAMA
    from tests.tiny_models import VOCAB_SIZE, make_tiny_model

    return make_tiny_model("llama", tmp_path_factory.mktemp("base"), **{**TINY_LLAMA, "vocab_size": VOCAB_SIZE})


@pytest.fixture(scope="session")
def cluster() -> Iterator[postgres.Cluster]:
    """One PostgreSQL for all. Who kills or pauses it starts it again, and each test takes a database of its own."""
    programs = postgres.programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    with postgres.running(programs) as running:
        yield running


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket; its URL."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    bucket = f"bucket-{os.urandom(4).hex()}"
    filesystem.mkdir(bucket)
    yield f"s3://{bucket}"
    s3fs.S3FileSystem.clear_instance_cache()
