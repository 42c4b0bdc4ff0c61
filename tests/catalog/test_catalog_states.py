"""Random lives of adapters against a model: uploads, promotions, pins, use, deletions, restarts."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manylora.catalog.service import Catalog
from manylora.engine.interface import AdapterRef
from manylora.errors import AdapterNotFound, Conflict
from manylora.settings import Settings

from .rig import MODULES, CatalogEngine, sound_files, tar_of

TENANTS = st.sampled_from(["acme", "rival", "public"])
NAMES = st.sampled_from(["a", "b"])
SEEDS = st.sampled_from([1.0, 2.0, 3.0])
NUMBERS = st.integers(1, 5)


@dataclass
class Expected:
    """What one name of one tenant must be."""

    versions: dict[int, float] = field(default_factory=dict)  # number -> seed
    active: int | None = None
    pinned: bool = False
    next_version: int = 1


@lru_cache
def _archive(seed: float) -> bytes:
    return tar_of(sound_files(seed))


async def _body(name: str, seed: float, activate: bool) -> AsyncIterator[bytes]:
    for key, value in (("name", name), ("activate", str(activate).lower())):
        yield f'--b\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
    yield b'--b\r\nContent-Disposition: form-data; name="archive"\r\n\r\n' + _archive(seed) + b"\r\n--b--\r\n"


class CatalogMachine(RuleBasedStateMachine):
    """Requests in use are `held`: the engine's `forget` of a version waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.expected: dict[tuple[str, str], Expected] = {}
        self.digests: dict[float, str] = {}
        self.held: dict[str, AdapterRef] = {}

    @initialize()
    def start(self) -> None:
        self._open()

    def _open(self) -> None:
        self.engine = CatalogEngine()
        self.engine.users = self._wait_for_users
        self.catalog = Catalog.open(Settings(data_dir=self.folder), MODULES)
        self._run(self.catalog.attach(self.engine))

    async def _wait_for_users(self, ref: AdapterRef) -> None:
        while ref.id in self.held:
            await asyncio.sleep(0)

    def _run(self, work: Any) -> Any:
        return self.runner.run(work)

    def _of(self, tenant: str, name: str) -> Expected:
        return self.expected.setdefault((tenant, name), Expected())

    @rule(tenant=TENANTS, name=NAMES, seed=SEEDS, activate=st.booleans())
    def upload(self, tenant: str, name: str, seed: float, activate: bool) -> None:
        done = self._run(
            self.catalog.upload(tenant, _body(name, seed, activate), "multipart/form-data; boundary=b", None)
        )
        model = self._of(tenant, name)
        newest = max(model.versions, default=None)
        is_same = newest is not None and model.versions[newest] == seed
        if not is_same:
            newest = model.next_version
            model.versions[newest] = seed
            model.next_version += 1
        assert (done.version.ref.version, done.is_new) == (newest, not is_same)
        assert self.digests.setdefault(seed, done.version.ref.digest) == done.version.ref.digest
        if activate:
            model.active = newest

    @rule(tenant=TENANTS, name=NAMES, number=NUMBERS)
    def promote(self, tenant: str, name: str, number: int) -> None:
        model = self._of(tenant, name)
        try:
            self._run(self.catalog.update(tenant, name, active_version=number))
        except AdapterNotFound:
            assert number not in model.versions
        else:
            assert number in model.versions
            model.active = number

    @rule(tenant=TENANTS, name=NAMES, pinned=st.booleans())
    def pin(self, tenant: str, name: str, pinned: bool) -> None:
        model = self._of(tenant, name)
        try:
            self._run(self.catalog.update(tenant, name, pinned=pinned))
        except AdapterNotFound:
            assert not model.versions
        else:
            model.pinned = pinned

    @rule(tenant=TENANTS, name=NAMES)
    def delete(self, tenant: str, name: str) -> None:
        model = self._of(tenant, name)
        try:
            self._run(self.catalog.delete(tenant, name))
        except AdapterNotFound:
            assert not model.versions
        else:
            assert model.versions
            self.expected[tenant, name] = Expected(next_version=model.next_version)

    @rule(tenant=TENANTS, name=NAMES, number=NUMBERS)
    def delete_version(self, tenant: str, name: str, number: int) -> None:
        model = self._of(tenant, name)
        try:
            self._run(self.catalog.delete(tenant, name, number))
        except AdapterNotFound:
            assert number not in model.versions
        except Conflict:
            assert model.active == number
            assert len(model.versions) > 1
        else:
            del model.versions[number]
            if not model.versions:
                self.expected[tenant, name] = Expected(next_version=model.next_version)

    @rule(tenant=TENANTS, name=NAMES)
    def acquire(self, tenant: str, name: str) -> None:
        try:
            ref = self.catalog.directory.resolve(tenant, name)
        except AdapterNotFound:
            return
        self.held[ref.id] = ref

    @rule(tenant=TENANTS, name=NAMES)
    def delete_in_use(self, tenant: str, name: str) -> None:
        """The request runs on while the retirement has time to go wrong."""
        self.acquire(tenant, name)
        self.delete(tenant, name)
        self._run(asyncio.sleep(0.01))

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        self.held.pop(next(iter(self.held)))

    @rule()
    def restart(self) -> None:
        """A process that ends takes its requests with it."""
        self.held.clear()
        self._run(self.catalog.aclose())
        self._open()
        self._assert_store_is_exact()

    @rule()
    def settle(self) -> None:
        self.held.clear()
        assert self.catalog._retirement is not None
        self._run(self.catalog._retirement.settled())
        self._assert_store_is_exact()

    def _assert_store_is_exact(self) -> None:
        seeds = {seed for model in self.expected.values() for seed in model.versions.values()}
        assert len(list((self.folder / "store").glob("??/*"))) == len(seeds)

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "catalog"):
            return
        self.catalog.check_integrity()
        pins = {}
        for (tenant, name), model in self.expected.items():
            entry = self.catalog.directory.own(tenant, name)
            if not model.versions:
                assert entry is None
                continue
            assert entry is not None
            assert (entry.active_version, entry.pinned) == (model.active, model.pinned)
            digests = {number: v.ref.digest for number, v in entry.versions.items()}
            assert digests == {number: self.digests[seed] for number, seed in model.versions.items()}
            if model.pinned and model.active is not None:
                pins[entry.versions[model.active].ref.id] = True
        assert self.engine.pinned.keys() == pins.keys()

    @invariant()
    def what_runs_keeps_its_files(self) -> None:
        for ref in self.held.values():
            assert (self.catalog.local_folder(ref) / "adapter_model.safetensors").is_file()

    @invariant()
    def own_names_come_before_public_ones(self) -> None:
        for tenant in ("acme", "rival"):
            for name in ("a", "b"):
                own, shared = self._of(tenant, name), self._of("public", name)
                wanted = ("public", shared) if not own.versions else (tenant, own)
                try:
                    ref = self.catalog.directory.resolve(tenant, name)
                except AdapterNotFound:
                    assert wanted[1].active is None
                else:
                    assert (ref.tenant, ref.version) == (wanted[0], wanted[1].active)

    def teardown(self) -> None:
        if hasattr(self, "catalog"):
            self.held.clear()
            self._run(self.catalog.aclose())
        self.runner.close()
        shutil.rmtree(self.folder)


TestCatalogStates = CatalogMachine.TestCase
TestCatalogStates.settings = settings(
    max_examples=20, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
