"""Every setting, in one frozen object: defaults < `manylora.toml` < `MANYLORA_*` environment < flags.

An unknown key, from whichever source, is an error. `docs/configuration.md` lists each setting, and a test
holds the two together.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from manylora.errors import InvalidSettings

_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
ENV_PREFIX = "MANYLORA_"


def parse_size(value: object) -> int | float:
    """`"512MiB"`, `"2GB"`, `1048576` are bytes (int); `"25%"` is a share of memory (float in (0, 1]).

    Raises ValueError for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    text = str(value).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[a-zA-Z]*)", text)
    if match:
        number, unit = float(match[1]), match[2].lower()
        if unit == "%" and 0 < number <= 100:
            return number / 100
        unit = unit.removesuffix("b") if unit != "b" else unit
        if unit in _UNITS and number > 0:
            return int(number * _UNITS[unit])
    raise ValueError(f"{text!r} is not a size: write bytes ('512MiB', '2GB') or a share of memory ('25%')")


Size = Annotated[int | float, BeforeValidator(parse_size)]


def default_data_dir() -> Path:
    return Path(platformdirs.user_data_dir("manylora"))


class Settings(BaseSettings):
    """All settings. Names are the command line's flags with `_` for `-`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", toml_file="manylora.toml", protected_namespaces=()
    )

    # the base model
    model: str | None = None
    served_name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Literal["none", "int8"] = "none"
    max_model_len: int | None = Field(default=None, ge=16)
    kernels: Literal["auto", "torch"] = "auto"
    num_threads: int | None = Field(default=None, ge=1)

    # the HTTP side
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    allow_open: bool = False
    max_body: Size = 16 * 2**20
    drain_timeout_s: float = Field(default=30.0, ge=0)
    log_json: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # the batch
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=512, ge=16)
    max_queue: int = Field(default=2048, ge=1)
    kv_cache_memory: Size = 0.1
    block_size: int = Field(default=16, ge=1)
    prefix_cache: bool = True

    # adapters
    adapters: Path | None = None
    adapter_memory: Size = 2**30
    host_tier_memory: Size = 2 * 2**30
    max_slots: int = Field(default=256, ge=1, le=65536)
    max_rank: int = Field(default=64, ge=1, le=512)
    max_adapter_size: Size = 2**30
    import_allow: tuple[str, ...] = ()

    # state
    data_dir: Path = Field(default_factory=default_data_dir)
    database_url: str | None = None
    store_url: str | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'registry.sqlite3'}"

    @property
    def resolved_store_url(self) -> str:
        return self.store_url or f"file://{(self.data_dir / 'store').resolve()}"


# Read by the command line's client side (`manylora adapters …`), not by the server.
CLIENT_ENVIRONMENT = frozenset({"MANYLORA_URL", "MANYLORA_KEY"})


def _unknown_environment() -> list[str]:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields} | CLIENT_ENVIRONMENT
    return sorted(k for k in os.environ if k.startswith(ENV_PREFIX) and k.upper() not in known)


def load_settings(**flags: Any) -> Settings:
    """Settings from all sources; `flags` with value None are absent. Raises InvalidSettings naming each fault."""
    unknown = _unknown_environment()
    if unknown:
        raise InvalidSettings(f"Unknown setting in the environment: {', '.join(unknown)}. See docs/configuration.md.")
    try:
        return Settings(**{k: v for k, v in flags.items() if v is not None})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        raise InvalidSettings(f"Invalid settings: {faults}. See docs/configuration.md.") from error
