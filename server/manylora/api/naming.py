"""How a request names an adapter: five forms, one answer.

`<base>` · `<adapter>` · `<adapter>@<n>` · `<base>:<adapter>` · `<base>:<adapter>@<n>` in `model`, and
`<adapter>` or `<adapter>@<n>` in `adapter_id`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from manylora.catalog.interface import AdapterDirectory
from manylora.engine.interface import AdapterRef
from manylora.errors import AdapterNotFound, InvalidRequest

__all__ = [
    "AdapterName",
    "gone_is_missing",
    "parse_adapter",
    "parse_model",
    "resolve",
    "resolve_request",
    "without_alias",
]

_NAME: Final = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})(?:@([1-9][0-9]{0,8}))?")
_LONGEST_ECHO: Final = 200


@dataclass(frozen=True, slots=True)
class AdapterName:
    """A name as written: `version` None means the active one."""

    name: str
    version: int | None = None


def parse_adapter(text: str, *, param: str) -> AdapterName:
    """`<adapter>` or `<adapter>@<n>`. Raises AdapterNotFound, since no adapter can have another name."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise _not_found(text, param)
    return AdapterName(match[1], int(match[2]) if match[2] else None)


def parse_model(text: str, base: str) -> AdapterName | None:
    """The value of `model`; None for the base. Raises AdapterNotFound."""
    if text == base:
        return None
    try:
        return parse_adapter(text.removeprefix(f"{base}:"), param="model")
    except AdapterNotFound:
        raise _not_found(text, "model") from None


def resolve(directory: AdapterDirectory, tenant: str, wanted: AdapterName, *, written: str, param: str) -> AdapterRef:
    """The adapter's identity. Raises one and the same AdapterNotFound for missing, not ready and foreign."""
    try:
        return directory.resolve(tenant, wanted.name, wanted.version)
    except AdapterNotFound:
        raise _not_found(written, param) from None


def without_alias(directory: AdapterDirectory, tenant: str, base: str, aliases: Mapping[str, str], model: str) -> str:
    """What `model` stands for. The base and the caller's adapters have their names to themselves."""
    if model not in aliases or model == base:
        return model
    try:
        directory.resolve(tenant, model)
    except AdapterNotFound:
        return aliases[model]
    return model


def resolve_request(
    directory: AdapterDirectory, tenant: str, base: str, model: str | None, adapter_id: str | None
) -> AdapterRef | None:
    """The adapter of a request that has `model`, `adapter_id` or both; None for the base.

    Raises AdapterNotFound, or InvalidRequest where the two fields name different adapters.
    """
    by_model = parse_model(model, base) if model is not None else None
    if adapter_id is None:
        if by_model is None or model is None:
            return None
        return resolve(directory, tenant, by_model, written=model, param="model")
    by_id = parse_adapter(adapter_id, param="adapter_id")
    if by_model is not None and by_model.name != by_id.name:
        raise _conflict(model, adapter_id)
    ref = resolve(directory, tenant, by_id, written=adapter_id, param="adapter_id")
    if by_model is not None and model is not None and by_model.version != by_id.version:
        other = resolve(directory, tenant, by_model, written=model, param="model")
        if other != ref:
            raise _conflict(model, adapter_id)
    return ref


@contextmanager
def gone_is_missing(model: str | None, adapter_id: str | None) -> Iterator[None]:
    """An adapter that was deleted after its name had become an identity is answered as one that was never there."""
    try:
        yield
    except AdapterNotFound:
        raise _not_found(adapter_id or model or "", "adapter_id" if adapter_id else "model") from None


def _conflict(model: str | None, adapter_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"'model' ({_shown(model or '')}) and 'adapter_id' ({_shown(adapter_id)}) name different adapters. Send one.",
        param="adapter_id",
    )


def _not_found(text: str, param: str) -> AdapterNotFound:
    return AdapterNotFound(
        f"The model or adapter '{_shown(text)}' does not exist or is not available to you. "
        "GET /v1/models lists what you may name.",
        param=param,
    )


def _shown(text: str) -> str:
    return text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}…"
