"""What the catalogue of all adapters takes of a server's memory, and how long a start reads it: SQLite, rows alone.

python -m benchmarks.catalogue --count 20000
"""

import argparse
import gc
import tempfile
import time
import tracemalloc
from pathlib import Path

from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.registry import Registry
from manylora.database.database import Database, open_database
from manylora.database.tables import AdapterRow, VersionRow

BASE = "b" * 64
CREATED = 1_700_000_000_000_000
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]


def fill(database: Database, count: int) -> None:
    """Add `count` adapters of 500 tenants with one version each, no two with the same files."""
    with database.write(None) as session:
        for i in range(count):
            session.add(
                AdapterRow(
                    id=f"adapter_{i:024x}", tenant=f"tenant-{i % 500}", name=f"name-{i}", description="",
                    active_version=1, next_version=2, pinned=False, is_deleted=False, created=CREATED + i,
                )
            )  # fmt: skip
        session.flush()
        for i in range(count):
            session.add(
                VersionRow(
                    id=f"version_{i:024x}", adapter_id=f"adapter_{i:024x}", version=1, digest=f"{i:064x}",
                    blob=f"{i:064x}", base=BASE, kind="lora", rank=16, alpha=32.0, target_modules=MODULES,
                    size_bytes=1_000_000, report={}, created=CREATED + i,
                )
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=20_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        database = open_database(f"sqlite:///{Path(folder)}/registry.sqlite3")
        fill(database, count)
        began = time.perf_counter()
        Registry(database, BaseSignature(BASE))
        seconds = time.perf_counter() - began
        gc.collect()
        tracemalloc.start()
        registry = Registry(database, BaseSignature(BASE))
        num_bytes = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(registry.directory) == count
        database.close()
    print(f"{num_bytes / count:.0f} bytes for each adapter, read at {count / seconds:.0f} adapters a second")


if __name__ == "__main__":
    main()
