"""PostgreSQL for replicas, as the catalog's tests have it."""

from tests.catalog.conftest import cluster

__all__ = ["cluster"]
