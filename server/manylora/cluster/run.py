"""Starting a cluster: on this machine until a signal ends it, or on a Ray cluster that is there and goes on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

from manylora.cluster.replica import check_shared
from manylora.cluster.shape import shape_of
from manylora.errors import InvalidSettings, StartupError
from manylora.jobs.worker_process import stop_on_signals
from manylora.packages import install_command
from manylora.serving.http_server import bind, is_loopback
from manylora.serving.process import safe_host, url_of
from manylora.settings import Settings

__all__ = ["Started", "run"]

_NAME: Final = "manylora"


@dataclass(frozen=True, slots=True)
class Started:
    """What is worth saying once replicas answer. With `goes_on` they do so after the command has ended."""

    url: str
    replicas: int
    goes_on: bool


def run(
    settings: Settings, size: dict[str, Any], announce: Callable[[Started], None], *, address: str | None = None
) -> None:
    """Start `size`, the fields of a `Shape`, with these settings; one that is there is updated, replica by replica.

    Without an `address` of Ray's, on this machine, where it ends with a signal. Raises StartupError.
    """
    if find_spec("ray") is None:
        raise StartupError(f"A cluster needs ray. Install it with: {install_command('ray')}")
    check_shared(settings)
    if address is not None and settings.store_url is None:
        raise InvalidSettings(
            "Replicas on several machines share an object store, or a folder that all of them see. Set store_url."
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told unasked
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    if address is None:
        _run_here(settings, {**size, "settings": given}, announce)
    else:
        _deploy(settings, {**size, "settings": given}, announce, address)


def _run_here(settings: Settings, args: dict[str, Any], announce: Callable[[Started], None]) -> None:
    import ray
    from ray import serve

    host = safe_host(settings)
    with bind(host, settings.port) as sock:  # a port that is taken is said before anything is started
        port = sock.getsockname()[1]
    shape = shape_of(args)
    num_cpus = os.cpu_count() or 1
    most = (shape.max_replicas or shape.replicas) * (100 + shape.surge_percent) / 100
    if settings.num_threads is None:  # or each would take all
        args["settings"]["num_threads"] = max(1, num_cpus // (shape.max_replicas or shape.replicas))
    args["settings"]["host"] = host  # by which names a server without keys may be asked
    stop = stop_on_signals()
    _join("local", num_cpus=max(num_cpus, int(most * shape.cpus) + 1), include_dashboard=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        _start(args)
        announce(Started(url_of(host, port), shape.replicas, goes_on=False))
        stop.wait()
        serve.shutdown()
    finally:
        ray.shutdown()


def _deploy(settings: Settings, args: dict[str, Any], announce: Callable[[Started], None], address: str) -> None:
    import ray
    from ray import serve

    shape = shape_of(args)
    _join(address)
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
        _start(args)
        announce(Started(url_of(settings.host, settings.port), shape.replicas, goes_on=True))
    finally:
        ray.shutdown()


def _join(address: str, **more: Any) -> None:
    """Become a part of the Ray cluster there, or of a new one (`local`) whatever runs already. Raises StartupError."""
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address=address, logging_level="WARNING", **more)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        said = " ".join(str(error).split())
        fault = "Ray could not be started" if address == "local" else f"There is no Ray cluster at '{address}'"
        raise StartupError(f"{fault}: {said}") from error


def _start(args: dict[str, Any]) -> None:
    """Returns once every replica is ready. Raises StartupError where one cannot start."""
    from ray import serve
    from ray.serve.context import _get_global_client

    from manylora.cluster.ray_app import assembled

    # Where Serve listens was said by whoever started it, which may not be this command.
    is_private = is_loopback(_get_global_client().http_config.host or "")
    try:
        serve.run(assembled(args, is_private=is_private), name=_NAME, logging_config={"enable_access_log": False})
    except RuntimeError as error:
        raise StartupError(f"The cluster could not start. {_cause() or error}") from error


def _cause() -> str:
    """What ended a replica at its start, of all that Serve tells: the last line of its traceback."""
    from ray import serve

    deployments = serve.status().applications[_NAME].deployments.values()
    lines = [line.strip() for each in deployments for line in each.message.splitlines() if "Error: " in line]
    return lines[-1].partition("Error: ")[2] if lines else ""
