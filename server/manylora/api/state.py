"""The parts that the routes work with, put together once by `app.create_app`."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from manylora.api.record import Recorder
from manylora.api.router_metrics import RouterMetrics
from manylora.api.traffic import Traffic
from manylora.catalog.interface import AdapterDirectory, Following
from manylora.engine.interface import EngineClient
from manylora.metrics import Metrics
from manylora.settings import Settings
from manylora.tenants.interface import Gate
from manylora.tenants.presence import Presence
from manylora.usage.interface import UsageSink

__all__ = ["Departure", "Services", "ServicesDep", "services_of"]


@dataclass(slots=True)
class Departure:
    """Whether the server is about to stop. Requests are then still answered; balancers are told to go elsewhere."""

    is_near: bool = False


@dataclass(frozen=True, slots=True)
class Services:
    """`recorders` hear of every finished inference request, on the event loop's thread, and must be quick.

    `usage`, where there is one, counts them for good.

    `following`, where there is one, knows what other servers on the same database change.

    `may_run_open` is False where an open server would be reachable from elsewhere unasked.
    """

    settings: Settings
    engine: EngineClient
    directory: AdapterDirectory
    gate: Gate
    metrics: Metrics
    traffic: Traffic
    presence: Presence
    router_metrics: RouterMetrics
    recorders: tuple[Recorder, ...] = ()
    usage: UsageSink | None = None
    may_run_open: bool = True
    departure: Departure = field(default_factory=Departure)
    following: Following | None = None


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(services_of)]
