"""Ray Serve's choice of a replica, by `affinity`: the one module that knows Serve's interface for routers."""

import time
from collections import OrderedDict
from typing import Any, Final

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from manylora.cluster.affinity import Affinity, Seen
from manylora.cluster.exchange import Question

__all__ = ["AdapterRouter"]

_MAX_OPEN: Final = 100_000


class AdapterRouter(RequestRouter):  # type: ignore[misc]  # Ray is not followed by mypy
    """Sends a question to a replica that has its adapter in memory, as `affinity` says."""

    def initialize_state(self, *, num_routers: int, seats: int) -> None:
        """`num_routers`: ingresses, which see a share of all requests each; `seats`: of a replica that has not told."""
        self._seats = seats
        self._affinity = Affinity(num_routers=num_routers)
        self._begun: OrderedDict[str, float] = OrderedDict()  # by the request's id, of those that were sent

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica in each rank, so that Serve takes the first that has room."""
        key = ""
        if pending_request is not None and pending_request.args and isinstance(pending_request.args[0], Question):
            key = pending_request.args[0].key
        by_name = {str(replica.replica_id): replica for replica in candidate_replicas}
        ranked = self._affinity.ranked(key, [self._seen(name, replica) for name, replica in by_name.items()])
        return [[by_name[seen.name]] for seen in ranked]

    def _seen(self, name: str, replica: RunningReplica) -> Seen:
        stats: dict[str, Any] = replica.routing_stats
        load = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return Seen(name, load, stats.get("seats", self._seats), stats.get("tiers", {}))

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve has sent the request."""
        if pending_request.args and isinstance(pending_request.args[0], Question):
            self._affinity.note(pending_request.args[0].key)
        self._begun[pending_request.metadata.internal_request_id] = time.monotonic()
        if len(self._begun) > _MAX_OPEN:
            self._begun.popitem(last=False)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request was answered, or failed."""
        begun = self._begun.pop(internal_request_id, None)
        if begun is not None:
            self._affinity.note_end(time.monotonic() - begun)
