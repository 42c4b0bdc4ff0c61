"""The cluster on Ray Serve: replicas on accelerators behind ingresses on CPUs.

`build` makes the application from plain values, for `manylora cluster` and for a Serve config file
(`import_path: manylora.cluster.ray_app:build`), such as the one of deploy/ray.
"""

from collections.abc import AsyncGenerator
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.requests import Request
from starlette.responses import Response

from manylora.cluster.exchange import Frame, Question
from manylora.cluster.ingress import Ingress
from manylora.cluster.replica import Replica, check_shared
from manylora.cluster.shape import Shape, shape_of
from manylora.errors import ReplicaLost, Unavailable
from manylora.settings import Settings, load_settings

__all__ = ["assembled", "build"]

_ROUTER: Final = "manylora.cluster.ray_router:AdapterRouter"
_STATS_PERIOD_S: Final = 1.0
_HEALTH_PERIOD_S: Final = 2.0
_HEALTH_TIMEOUT_S: Final = 30.0
_LAST_WORDS_S: Final = 10.0  # beyond the time in which requests are finished
_FULL: Final = 0.75  # of its seats, a replica that is as busy as it should be
_DOWN_BY: Final = 0.5  # of what the requests alone would say


class Engine:
    """A replica as Serve runs it: an actor."""

    async def __init__(self, settings: dict[str, Any], is_private: bool) -> None:  # type: ignore[misc]  # Serve's way
        self._replica = Replica(load_settings(**settings), _fetch, is_private=is_private)
        await self._replica.start()

    async def answer(self, question: Question) -> AsyncGenerator[Frame, None]:
        frames = self._replica.answer(question)
        try:
            async for frame in frames:
                yield frame
        finally:
            await frames.aclose()

    def record_routing_stats(self) -> dict[str, Any]:
        """What `ray_router` reads of a replica."""
        return self._replica.residency()

    def check_health(self) -> None:
        self._replica.check()

    async def __del__(self) -> None:
        await self._replica.close()


class Entry:
    """An ingress as Serve runs it."""

    def __init__(self, engine: Any, settings: dict[str, Any]) -> None:
        handle = engine.options(stream=True)

        async def ask(question: Question) -> AsyncGenerator[Frame, None]:
            try:
                frames = handle.answer.remote(question)
                try:
                    async for frame in frames:
                        yield frame
                finally:
                    frames.cancel()
            except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
                raise ReplicaLost("The replica that worked on this has ended. Try again.") from error
            except BackPressureError as error:
                raise Unavailable("Every replica has as many requests as it takes. Try again.") from error

        self._ingress = Ingress(ask, load_settings(**settings), keep=ray.put)

    async def __call__(self, request: Request) -> Response:
        return await self._ingress(request)


async def _fetch(piece: Any) -> bytes:
    found: bytes = piece if isinstance(piece, bytes) else await piece
    return found


def build(args: dict[str, Any]) -> Any:
    """A Serve application from a `Shape`'s fields and, under `settings`, those of the server that are not default.

    What is not given is read where each process runs: its environment, its manylora.toml. Raises InvalidSettings.
    """
    return assembled(args, is_private=False)


def assembled(args: dict[str, Any], *, is_private: bool) -> Any:
    """The application, by whoever knows whether Serve can be reached from this machine only. Raises InvalidSettings."""
    shape = shape_of(args)
    settings = load_settings(**shape.settings)
    check_shared(settings)
    scaling: dict[str, Any] = {"num_replicas": shape.replicas}
    if shape.max_replicas is not None:
        scaling = {"autoscaling_config": _autoscaling(shape, settings)}
    engine = serve.deployment(
        Engine,
        name="engine",
        ray_actor_options={"num_cpus": shape.cpus, "num_gpus": shape.gpus},
        # The server says itself, in its API's words, that its queue is full.
        max_ongoing_requests=settings.max_connections,
        request_router_config={
            "request_router_class": _ROUTER,
            "request_router_kwargs": {"num_routers": shape.ingresses, "seats": settings.max_num_seqs},
            "request_routing_stats_period_s": _STATS_PERIOD_S,
        },
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + _LAST_WORDS_S,
        max_surge_percent=shape.surge_percent,
        **scaling,
    )
    entry = serve.deployment(
        Entry,
        name="ingress",
        num_replicas=shape.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_connections,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + _LAST_WORDS_S,
    )
    return entry.bind(engine.bind(shape.settings, is_private), shape.settings)


def _autoscaling(shape: Shape, settings: Settings) -> dict[str, Any]:
    """Up soon, and down slowly, since each replica that goes sends its adapters' next requests to the store."""
    return {
        "min_replicas": shape.replicas,
        "max_replicas": shape.max_replicas,
        "target_ongoing_requests": shape.target_requests or _FULL * settings.max_num_seqs,
        "upscale_delay_s": shape.up_after_s,
        "downscale_delay_s": shape.down_after_s,
        "downscaling_factor": _DOWN_BY,
    }
