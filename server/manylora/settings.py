"""Every setting, in one frozen object: defaults < those of `profile` < `manylora.toml` < `MANYLORA_*` < flags.

An unknown key, from whichever source, is an error. `docs/configuration.md` lists each setting, and a test
holds the two together.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import platformdirs
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationError,
    model_validator,
)
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
    """`"512MiB"`, `"2GB"`, `1048576` are bytes (int); `"25%"` and `"0.25"` are shares of memory (float in (0, 1]).

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
        if not unit and "." in match[1]:  # no number of bytes
            unit = "share"
            if 0 < number <= 1:
                return number
        unit = unit.removesuffix("b") if unit != "b" else unit
        if unit in _UNITS and number > 0:
            return int(number * _UNITS[unit])
    raise ValueError(f"{text!r} is not a size: write bytes ('512MiB', '2GB') or a share of memory ('25%')")


def parse_origin(text: str) -> str:
    """`scheme://host[:port]`, `null` (files, sandboxed frames) or `*`. Raises ValueError for anything else."""
    origin = text.strip().rstrip("/").lower()
    if origin in ("*", "null") or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
        return origin
    raise ValueError(f"{text!r} is not an origin: write scheme, host and port, such as 'https://app.example.com'")


def parse_root_path(text: str) -> str:
    """`/prefix` without a slash at its end, or nothing. Raises ValueError for anything else."""
    path = text.strip().rstrip("/")
    if re.fullmatch(r"(/[^/?#\s]+)*", path) and not path.startswith("/v1"):
        return path
    raise ValueError(f"{text!r} is not a path prefix: write it as '/llm', and not '/v1', which is the API's own")


def parse_alias(text: str) -> str:
    """`name=model`. Raises ValueError for anything else."""
    name, _, model = (part.strip() for part in text.partition("="))
    if name and model:
        return f"{name}={model}"
    raise ValueError(f"{text!r} is not an alias: write 'name=model', such as 'gpt-4o-mini=sql'")


def parse_marks(text: str) -> str:
    """`auto`, `none`, or two marks with a space between. Raises ValueError for anything else."""
    marks = " ".join(text.split())
    if marks in ("auto", "none") or len(marks.split(" ")) == 2:
        return marks
    raise ValueError(f"{text!r} are no marks: write two with a space between, such as '<think> </think>'")


Size = Annotated[int | float, BeforeValidator(parse_size)]
Price = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]


def default_data_dir() -> Path:
    return Path(platformdirs.user_data_dir("manylora"))


# What `profile` says for settings that no other source does.
PROFILES: Final[Mapping[str, Mapping[str, Any]]] = {
    "default": {},
    "small": {
        "quantization": "int4",
        "kv_cache_dtype": "int8",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "max_queue": 256,
        "max_slots": 16,
        "prompt_logits_memory": 64 * 2**20,
        "grammar_memory": 32 * 2**20,
        "adapter_memory": 128 * 2**20,
        "host_tier_memory": 128 * 2**20,
    },
}


class Settings(BaseSettings):
    """All settings. Names are the command line's flags with `_` for `-`.

    `model_fields_set`: what somebody gave, without what the profile alone says.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        extra="forbid",
        toml_file="manylora.toml",
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    profile: Literal["default", "small"] = "default"
    """Which defaults the settings below have where nothing says otherwise: `small` is for 1 to 2 GB of memory (int4
    base, int8 KV cache, few sequences, small tiers; encoders, models of speech and bases on CUDA stay whole)."""

    # the base model
    model: str | None = None
    """The base model: a Hugging Face directory or id (`owner/name` or `owner/name@revision`), or a GGUF file;
    unset: the embedded default."""
    served_name: str | None = None
    """The base model's name in requests; unset: the last part of `model`."""
    device: Literal["auto", "cpu", "cuda"] | Annotated[str, Field(pattern="^cuda:[0-9]{1,3}$")] = "auto"
    """Where the model runs; `auto` is CUDA where there is some, and `cuda:1` the second of several."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the weights and the KV cache; `auto` is bfloat16 on a CPU that computes in it, else float32,
    and on CUDA the model's own."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """How the base's linears are kept, on CPUs: `int8` rounds them, and what they multiply, to 8 bits, `int4` to 4 bits
    in groups of 32 (what makes the logits to 8). Both are faster and take a half and a third of the memory."""
    lora_dtype: Literal["auto", "bfloat16", "float16", "float32", "int8"] = "auto"
    """Number format that adapters are kept in, in host memory and on the device. `auto` is `dtype`, beside an int8 base
    bfloat16 in place of float32, and with the C++ kernels the files' own where that is narrower, which loses nothing.
    Narrower formats take less memory and, with the C++ kernels, less time; `int8` rounds, a scale for each rank."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Longest sequence, prompt and answer together, in tokens; unset: the model's own limit (of a LongRoPE model its
    original context, since one longer sequence would change the answers of all others in its batch)."""
    kernels: Literal["auto", "torch"] = "auto"
    """`auto` takes the C++ kernels where they were built for this machine, and on CUDA those in Triton, which torch
    brings there; `torch` takes neither."""
    tool_parser: Literal[
        "auto",
        "hermes",
        "llama3_json",
        "mistral",
        "mistral_args",
        "pythonic",
        "deepseek_v3",
        "deepseek_v31",
        "qwen3_coder",
    ] = "auto"
    """How the base writes calls of tools; `auto` finds it out from its chat template. See docs/tools.md."""
    tool_prompt: bool = False
    """Tell a base whose chat template knows no tools of them in its system message, and read calls between
    `<tool_call>` tags. Without it such a base answers a request with `tools` with 400."""
    reasoning_marks: Annotated[str, AfterValidator(parse_marks)] = "auto"
    """What stands before and after what the base thinks, which answers then have in `reasoning_content`: two marks with
    a space between, such as `<think> </think>`; `auto` finds them in its chat template, `none` leaves answers whole."""
    allow_request_chat_template: bool = False
    """Take a `chat_template` from requests, too. Those of requests and of adapters are rendered in processes that can
    be spared, with bounds on their time and memory."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of the model's operations; unset: one for each core."""

    # the HTTP side
    host: str = "127.0.0.1"
    """Address to listen on. While no key exists and `allow_open` is off, a loopback address whatever is asked for."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    allow_open: bool = False
    """Listen beyond this machine although no key exists: everybody who can connect is then an admin. Not once there
    was a key: see `manylora keys reopen`."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names under which a server without keys is asked, beside this machine's own (`localhost`, loopback
    addresses; with `allow_open` every address and every name without a dot); others get 403."""
    allowed_origins: tuple[Annotated[str, AfterValidator(parse_origin)], ...] = ()
    """Sites whose pages may ask this server from a browser, such as `https://app.example.com`; `*` is every site."""
    root_path: Annotated[str, AfterValidator(parse_root_path)] = ""
    """Path under which a proxy in front serves this server, such as `/llm`; it may pass the path on with it or
    without."""
    model_aliases: tuple[Annotated[str, AfterValidator(parse_alias)], ...] = ()
    """Other names for models, for tools that insist on one: `gpt-4o-mini=sql` answers that name with the adapter `sql`.
    What a caller's own adapter is called comes first."""
    max_body: Size = 16 * 2**20
    """Largest request body, uploads aside."""
    max_connections: int = Field(default=4096, ge=1)
    """Most open connections; beyond it those that wait for their client longest are closed, and others get 503."""
    max_tenant_requests: int | None = Field(default=None, ge=1)
    """Most requests of one tenant that are answered at a time, on all routes; unset: half of `max_connections`."""
    max_body_memory: Size = 512 * 2**20
    """Memory for the bodies of all requests that are being answered, uploads aside, and for sound and images in them
    once they are decoded; a tenant may hold half of it."""
    header_timeout_s: float = Field(default=15.0, gt=0)
    """Seconds from the first byte of a request to the end of its header."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds within which a body that is being sent must bring 1024 bytes for each second, or its end."""
    idle_timeout_s: float = Field(default=75.0, gt=0)
    """Seconds that a connection stays open between requests; let it be more than a proxy in front keeps its own."""
    write_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds within which a client that is behind in reading must take 1024 bytes for each second."""
    stream_keep_alive_s: float = Field(default=15.0, gt=0)
    """Seconds of silence after which a stream sends a comment, for proxies that cut what is silent; before the first
    token its status line goes with it."""
    drain_delay_s: float = Field(default=0.0, ge=0)
    """Seconds after SIGTERM in which everything is still answered but `/ready`, which is 503: so long a balancer needs
    to take the server off its list."""
    drain_timeout_s: float = Field(default=30.0, ge=0)
    """Seconds that running requests get to finish after that."""
    exit_on_engine_failure: bool = True
    """End the process, with an exit code that is not 0, when the engine has failed for good, so that a supervisor
    starts it again; off, it stays and answers 503."""
    metrics: bool = True
    """Count and time what happens, for `GET /metrics`; off, that route is not there."""
    router_metrics: Literal["keys", "open", "off"] = "keys"
    """Who may read `GET /metrics/router`, which tells a router in front of several servers what is in memory here:
    `keys`: admin keys, `open`: everybody who can connect, for routers that send no key, `off`: nobody."""
    log_json: bool = False
    """Log JSON lines instead of text."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe messages that are logged."""
    log_prompts: bool = False
    """Write the text of the prompts into the requests' log lines; without it no line has any."""
    tracing: bool = False
    """Send OpenTelemetry traces by OTLP over HTTP; where to and which ones is for the standard `OTEL_…` variables."""

    # embeddings
    embedding_pooling: Literal["cls", "last", "mean"] | None = None
    """What an embedding is of its text's tokens, unless the request says: the hidden state of the last one, or of the
    first one (`cls`, of encoders), or the mean; unless set, the last one's of a decoder, and of an encoder what its
    folder says, or the mean."""
    matryoshka_dimensions: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Numbers to which embeddings may be cut (`dimensions`), for models and adapters that were trained for it; the
    model's own config may name some too."""

    # the batch
    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences in one batch."""
    max_num_batched_tokens: int = Field(default=512, ge=16)
    """Most tokens in one forward pass; longer prompts are prefilled in pieces. Beside up to 8 streams prompts take a
    quarter of it, beside 16 half, and fewer tokens deep in a long prompt and where the machine or the model is slow, so
    that the pass takes no longer: 80 ms of it beside less than 16 streams and no more prompts than these,
    or twice the time of one without prompts."""
    draft_tokens: int = Field(default=15, ge=0, le=64)
    """Most tokens of an answer that are guessed and run together with the one before them; 0 guesses none. Guesses
    change no answer: what the model would not have said is dropped."""
    prompt_logits_memory: Size = 256 * 2**20
    """Memory for the logits of prompts (`echo` with `logprobs`) in one forward pass: bytes, or a share of what is free;
    prompts with more are scored in pieces."""
    max_queue: int = Field(default=2048, ge=1)
    """Most sequences (a request has one for each choice) waiting beside those in the batch; more are answered
    with 429."""
    tenant_queue_share: float = Field(default=0.5, gt=0, le=1)
    """How much of the seats and of the queue that the others leave one tenant may hold, so that it cannot fill the
    queue for everybody; 1 lets it."""
    grammar_memory: Size = 256 * 2**20
    """Memory for the grammars of earlier requests (`response_format` and its like), kept for later ones: bytes, or a
    share of what is free. Those of running requests are beside it."""
    kv_cache_memory: Size = 0.1
    """Memory for the KV cache: bytes, or a share of what is free once the model is loaded; a share is raised to what
    one sequence of `max_model_len` needs, if that is at most half of what is free."""
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """Number format of the KV cache, on CPUs: `auto` is the model's; `int8` rounds each token's keys and values to 8
    bits with a scale for each head, so that the same memory holds almost twice the tokens."""
    block_size: int = Field(default=16, ge=1)
    """Tokens in one block of the KV cache."""
    prefix_cache: bool = True
    """Keep the blocks of earlier prompts for requests of the same tenant that begin in the same way with the same
    adapter."""
    prefix_sharing: Literal["tenant", "public"] = "tenant"
    """Who uses such blocks: `tenant` keeps each tenant to its own; `public` lets all tenants share those of the base
    and of public adapters, which tells each of them when another one's prompt began as its own does."""

    # adapters
    adapters: Path | None = None
    """A folder whose PEFT folders are registered at start for the tenant `public`."""
    adapter_memory: Size = 2**30
    """Memory on the device for adapters that are ready for use: bytes, or a share of what is free."""
    host_tier_memory: Size = 2 * 2**30
    """Memory beside it for adapters read from disk: bytes, or a share of what is free."""
    max_slots: int = Field(default=256, ge=1, le=65536)
    """Most adapters on the device at once."""
    max_rank: int = Field(default=64, ge=1, le=512)
    """Highest rank of an adapter; higher ones are refused."""
    max_adapter_size: Size = 2**30
    """Largest adapter upload."""
    max_adapter_memory: Size = 2**30
    """Most memory that one adapter may take once it is ready for use: for some kinds, far more than its files."""
    pin_replicas: int | None = Field(default=None, ge=1)
    """Servers of those on one database that keep a pinned adapter on the device, each adapter others; unset: all."""
    import_allow: tuple[str, ...] = ()
    """Prefixes that `source` of an import and `lora_path` may begin with, such as `file:///srv/adapters/` or `hf://my-org/`."""

    # fine-tuning
    jobs: int = Field(default=0, ge=0, le=64)
    """Fine-tuning jobs that this server runs at a time, in processes of their own beside it; 0: none, and jobs wait for
    a `manylora worker`."""
    job_threads: int = Field(default=1, ge=1)
    """CPU threads of each job; with one, a job that was interrupted comes to the same adapter, bit for bit."""
    job_device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where jobs train; `cuda` shares the device with the model, unless the worker runs where another one is seen."""
    max_file_size: Size = 512 * 2**20
    """Largest file of data that a tenant may upload."""
    file_days: float = Field(default=30.0, gt=0)
    """Days that a file of data is kept whose upload does not say how long."""
    job_days: float = Field(default=90.0, gt=0)
    """Days that a fine-tuning job is listed after it has ended, with its events."""

    # state
    data_dir: Path = Field(default_factory=default_data_dir)
    """Folder of the registry, the adapter files and the keys; default: the platform's folder for user data."""
    database_url: str | None = None
    """SQLAlchemy URL of the registry; unset: an SQLite file in `data_dir`."""
    database_timeout_s: float = Field(default=5.0, gt=0)
    """Seconds that PostgreSQL may be silent, and a connection or a lock be waited for, before an operation fails."""
    usage_wait_s: float = Field(default=1.0, gt=0)
    """Seconds that the end of an answer waits for its usage to be in the database; then it is kept in a journal in
    `data_dir`, from which it is written later, and nobody waits again until the database has answered."""
    price_currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] = "USD"
    """Currency of the prices below, as ISO 4217 names it."""
    price_prompt: Price | None = None
    """What 1,000 prompt tokens cost, so that usage is told in money (`GET /v1/usage`, the dashboard); unset: nothing.
    No request is refused for it."""
    price_cached: Price | None = None
    """What 1,000 prompt tokens cost that came from the prefix cache; unset: `price_prompt`."""
    price_completion: Price | None = None
    """What 1,000 generated tokens cost."""
    price_training: Price | None = None
    """What 1,000 tokens cost that fine-tuning jobs learn from."""
    store_url: str | None = None
    """fsspec URL of the adapter files, such as `s3://bucket/prefix`; unset: a folder in `data_dir`."""
    orphan_days: float = Field(default=30.0, gt=0)
    """Days that adapter files which the database does not know are kept in the store's `orphans/` before they are
    deleted."""

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

    @model_validator(mode="wrap")
    @classmethod
    def _with_profile(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Fill in what the profile says and no source does."""
        by_profile = PROFILES.get(str(given.get("profile", "default")), {})
        found = handler({**by_profile, **given})
        found.model_fields_set.difference_update(by_profile.keys() - given.keys())
        return found

    def yielding(self, *names: str) -> Self:
        """The settings with plain defaults for those of `names` that the profile alone says, where that cannot apply.

        What somebody gave stays, to be refused by its name.
        """
        fields = type(self).model_fields
        plain = {name: fields[name].get_default(call_default_factory=True) for name in names}
        return self.model_copy(update={name: plain[name] for name in plain.keys() - self.model_fields_set})

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'registry.sqlite3'}"

    @property
    def resolved_model_aliases(self) -> dict[str, str]:
        """`model_aliases`: what each name stands for."""
        return {name: model for name, _, model in (alias.partition("=") for alias in self.model_aliases)}

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
        faults = "; ".join(
            f"{'.'.join(str(p) for p in e['loc'])}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        )
        raise InvalidSettings(f"Invalid settings: {faults}. See docs/configuration.md.") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidSettings(f"manylora.toml cannot be read: {error}.") from error
