"""Asks a server what it serves: the base's name, the adapters, its version, its own counts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from manylora_loadtest.client import Client
from manylora_loadtest.errors import ScenarioError, ServerUnavailable
from manylora_loadtest.scenario import Scenario, Tenant
from manylora_loadtest.stream import authorization

__all__ = ["Counters", "Served", "discover", "read_counters", "read_usage", "resolve_adapters"]


@dataclass(frozen=True, slots=True)
class Served:
    """What `/v1/models` lists for one key: models without a parent are bases."""

    bases: tuple[str, ...]
    adapters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Counters:
    """A server's own totals: since it started (the `manylora_` counters of `/metrics`), or as it charges for them."""

    requests_ok: float
    prompt_tokens: float
    completion_tokens: float

    def since(self, before: "Counters") -> "Counters":
        return Counters(
            self.requests_ok - before.requests_ok,
            self.prompt_tokens - before.prompt_tokens,
            self.completion_tokens - before.completion_tokens,
        )


async def discover(client: Client, key: str | None) -> Served:
    """What the server lists for a key. Raises ServerUnavailable."""
    url = client.url + "/v1/models"
    try:
        async with client.session.get(url, headers=authorization(key)) as response:
            if response.status != 200:
                raise ServerUnavailable(f"{url} answered {response.status}: {(await response.text())[:200]}")
            models = (await response.json(content_type=None))["data"]
            parents = {model["id"]: model.get("parent") for model in models}
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ServerUnavailable(f"{url} does not answer: {error!r}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ServerUnavailable(f"{url} does not answer as an OpenAI-compatible server: {error!r}") from error
    return Served(
        tuple(name for name, parent in parents.items() if parent is None),
        tuple(name for name, parent in parents.items() if parent is not None),
    )


async def resolve_adapters(
    client: Client, scenario: Scenario, keys: Mapping[str, str | None]
) -> tuple[str, dict[str, Sequence[str]]]:
    """The base's name and each tenant's adapters. Raises ServerUnavailable, ScenarioError."""
    base = scenario.base
    if base is None:
        bases = (await discover(client, keys[scenario.tenants[0].name])).bases
        if not bases:
            raise ServerUnavailable(f"{client.url}/v1/models lists no base model; name it with `base`")
        base = bases[0]
    return base, {tenant.name: await _adapters(client, scenario, tenant, keys) for tenant in scenario.tenants}


async def _adapters(
    client: Client, scenario: Scenario, tenant: Tenant, keys: Mapping[str, str | None]
) -> Sequence[str]:
    mix = tenant.adapters or scenario.adapters
    if not mix.discover:
        return mix.listed
    found = (await discover(client, keys[tenant.name])).adapters
    if not found:
        raise ScenarioError(f"the scenario discovers adapters, and the server shows none to tenant {tenant.name!r}")
    return sorted(found)[: mix.count]


async def read_counters(client: Client, key: str | None) -> Counters | None:
    """The server's totals; None where it has no `/metrics` with manylora's counters."""
    try:
        async with client.session.get(client.url + "/metrics", headers=authorization(key)) as response:
            if response.status != 200:
                return None
            text = await response.text()
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
    try:
        return _parse_counters(text)
    except ValueError:
        return None


async def read_usage(client: Client, key: str | None) -> Counters | None:
    """What the server charges for, all told (`/v1/usage`); None where it has no such export.

    A key that is no admin's sees its own tenant only.
    """
    try:
        async with client.session.get(client.url + "/v1/usage", headers=authorization(key)) as response:
            if response.status != 200:
                return None
            total = (await response.json(content_type=None))["total"]
        return Counters(total["outcomes"].get("ok", 0), total["prompt_tokens"], total["completion_tokens"])
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _parse_counters(text: str) -> Counters | None:
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            is_counted = sample.name != "manylora_requests_total" or sample.labels.get("outcome") == "ok"
            if sample.name.endswith("_total") and is_counted and math.isfinite(sample.value):
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    if not any(name.startswith("manylora_") for name in sums):
        return None
    names = ("requests_total", "prompt_tokens_total", "completion_tokens_total")
    return Counters(*(sums.get(f"manylora_{name}", 0.0) for name in names))
