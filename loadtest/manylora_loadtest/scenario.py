"""A scenario: what is sent, when, by whom, and what counts as passed. Read from a small TOML file.

An unknown key is an error. `docs/loadtest.md` explains every key; `loadtest/manylora_loadtest/scenarios/`
has ready ones.
"""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from manylora_loadtest.arrivals import Arrival
from manylora_loadtest.errors import ScenarioError
from manylora_loadtest.lengths import Length, Lengths
from manylora_loadtest.popularity import Popularity
from manylora_loadtest.thresholds import Slo, Thresholds

__all__ = [
    "AdapterMix", "ChatMix", "LiveChange", "RequestMix", "Scenario", "Tenant", "TraceSource",
    "find_scenario", "load_scenario", "ready_scenarios",
]  # fmt: skip

_FOLDER = Path(__file__).parent / "scenarios"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterMix(_Part):
    """The adapters requests name: `names`, or `pattern` and `count`, or `discover` (what `/v1/models` lists)."""

    names: tuple[str, ...] = ()
    pattern: str | None = Field(default=None, description='a format of one number, as "a{:03d}"')
    count: int | None = Field(default=None, ge=1, description="how many of the pattern; of the discovered: at most")
    discover: bool = False
    base_share: float = Field(default=0.0, ge=0, le=1, description="share of requests for the bare base")
    popularity: Popularity = Popularity()

    @model_validator(mode="after")
    def _is_one_way(self) -> "AdapterMix":
        if sum([bool(self.names), self.pattern is not None, self.discover]) > 1:
            raise ValueError("name adapters in one way: `names`, `pattern` or `discover`")
        if self.pattern is not None:
            if self.count is None:
                raise ValueError("`pattern` needs `count`")
            try:
                self.pattern.format(0)
            except (IndexError, KeyError, ValueError) as error:
                raise ValueError(f"`pattern` {self.pattern!r} is not a format of one number: {error}") from error
        return self

    @property
    def listed(self) -> tuple[str, ...]:
        """The names the scenario itself gives; empty when they are discovered, or when there are none."""
        if self.pattern is not None:
            return tuple(self.pattern.format(i) for i in range(self.count or 0))
        return self.names


class ChatMix(_Part):
    """Chat requests; each starts with one of `num_prefixes` system messages of `prefix_tokens` words (0: none)."""

    share: float = Field(default=0.0, ge=0, le=1)
    prefix_tokens: int = Field(default=0, ge=0)
    num_prefixes: int = Field(default=1, ge=1)


class RequestMix(_Part):
    """Lengths and sampling fields. Without `ignore_eos` (an extension) answers may be shorter than asked for."""

    prompt_tokens: Lengths = Length(value=128)
    output_tokens: Lengths = Length(value=64)
    temperature: float = Field(default=0.0, ge=0)
    ignore_eos: bool = True
    left_share: float = Field(default=0.0, ge=0, le=1, description="share of requests whose client leaves early")
    left_after_s: float = Field(default=0.5, gt=0, description="after how long on average, exponentially distributed")
    refused_share: float = Field(default=0.0, ge=0, le=1, description="share of requests that must be refused")
    timeout_s: float = Field(default=300.0, gt=0)


class Tenant(_Part):
    """A caller. `weight` is its share of the arrivals; the key comes from `key`, or the environment by `key_env`."""

    name: str = "default"
    weight: float = Field(default=1.0, gt=0)
    key: str | None = Field(default=None, repr=False, exclude=True)
    key_env: str | None = None
    adapters: AdapterMix | None = Field(default=None, description="instead of the scenario's")

    def secret(self, fallback: str | None = None) -> str | None:
        """The key, or `fallback`. Raises ScenarioError when `key_env` names an unset variable."""
        if self.key_env is None:
            return self.key if self.key is not None else fallback
        try:
            return os.environ[self.key_env]
        except KeyError:
            raise ScenarioError(f"tenant {self.name!r}: the environment has no {self.key_env}") from None


class LiveChange(_Part):
    """A change to the fleet every `every_s` seconds while requests run.

    `upload` sends `folders` in turn as new versions of `adapter` (two different ones make each a new version);
    `promote` makes the adapter's versions active in turn. `cycle` does one step of a life at a time: it uploads all
    `folders` as versions, asks the adapter something, goes back to the first version, sends a damaged upload, which
    must be refused, and deletes the adapter. `tenant` says whose key is used.
    """

    kind: Literal["upload", "promote", "cycle"]
    adapter: str
    every_s: float = Field(gt=0)
    start_s: float = Field(default=0.0, ge=0)
    times: int | None = Field(default=None, ge=1, description="stop after so many; else until the load ends")
    folders: tuple[Path, ...] = ()
    activate: bool = True
    tenant: str | None = None

    @model_validator(mode="after")
    def _has_files(self) -> "LiveChange":
        if (self.kind != "promote") != bool(self.folders):
            raise ValueError("`folders` (PEFT layout) belong to an upload or a cycle, which need them")
        return self


class TraceSource(_Part):
    """Replay of recorded arrivals: JSON lines with t, adapter, prompt_tokens, output_tokens. See `trace`."""

    path: Path
    speed: float = Field(default=1.0, gt=0, description="2.0 replays in half the time")


def _as_tenants(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Scenario(_Part):
    """Everything a run needs besides the server's address."""

    name: str
    description: str = ""
    seed: int = Field(default=0, ge=0)
    base: str | None = Field(default=None, description="the base model's name; else the first of /v1/models")
    warmup_requests: int = Field(default=0, ge=0, description="before the run, adapters in turn; not in latencies")
    arrival: Arrival | None = None
    trace: TraceSource | None = None
    adapters: AdapterMix = AdapterMix()
    requests: RequestMix = RequestMix()
    chat: ChatMix = ChatMix()
    tenants: Annotated[tuple[Tenant, ...], BeforeValidator(_as_tenants), Field(min_length=1)] = (Tenant(),)
    changes: tuple[LiveChange, ...] = ()
    slo: Slo = Slo()
    thresholds: Thresholds = Thresholds()

    @field_validator("tenants")
    @classmethod
    def _names_differ(cls, tenants: tuple[Tenant, ...]) -> tuple[Tenant, ...]:
        if len({tenant.name for tenant in tenants}) < len(tenants):
            raise ValueError("two tenants have the same name")
        return tenants

    @model_validator(mode="after")
    def _has_one_source(self) -> "Scenario":
        if (self.arrival is None) == (self.trace is None):
            raise ValueError("give `[arrival]` or `[trace]`, one of them")
        for change in self.changes:
            if change.tenant is not None and change.tenant not in {tenant.name for tenant in self.tenants}:
                raise ValueError(f"a change names the tenant {change.tenant!r}, which the scenario does not have")
        return self

    def tenant(self, name: str | None) -> Tenant:
        """The tenant of that name; the first for None."""
        return next((tenant for tenant in self.tenants if tenant.name == name), self.tenants[0])


def ready_scenarios() -> dict[str, Path]:
    """The scenarios that come with the package, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.toml"))}


def find_scenario(name: str) -> Path:
    """A file's path, or a ready scenario's by name. Raises ScenarioError."""
    path = Path(name)
    if path.is_file():
        return path
    ready = ready_scenarios()
    if name in ready:
        return ready[name]
    raise ScenarioError(f"no file {name!r}, and the ready scenarios are {', '.join(ready)}")


def load_scenario(path: Path) -> Scenario:
    """Reads and checks a TOML file; relative paths in it are from its own folder. Raises ScenarioError."""
    try:
        scenario = Scenario.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ScenarioError(f"{path}: {error}") from error
    except ValidationError as error:
        problems = (f"  {'.'.join(map(str, e['loc'])) or 'scenario'}: {e['msg']}" for e in error.errors())
        raise ScenarioError(f"{path} is not a scenario:\n" + "\n".join(problems)) from error
    return _with_paths_from(scenario, path.parent)


def _with_paths_from(scenario: Scenario, folder: Path) -> Scenario:
    changes = tuple(
        change.model_copy(update={"folders": tuple(folder / path for path in change.folders)})
        for change in scenario.changes
    )
    trace = scenario.trace and scenario.trace.model_copy(update={"path": folder / scenario.trace.path})
    return scenario.model_copy(update={"changes": changes, "trace": trace})
