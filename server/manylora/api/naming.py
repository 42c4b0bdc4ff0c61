"""Which adapter a request names.

An adapter is named in five forms: `<base>` · `<adapter>` · `<adapter>@<n>` · `<base>:<adapter>` ·
`<base>:<adapter>@<n>` in `model`, and `<adapter>` or `<adapter>@<n>` in `adapter_id`; several, each with a weight, in
`adapters`. Wherever `<adapter>` stands, `<tenant>/<adapter>` says whose is meant: the caller's own or one of `public`.
So a router, which sees `model` and not the key, can tell adapters of one name apart.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from manylora.api.mixed import Mixed
from manylora.api.schemas import Body, InferenceRequest
from manylora.catalog.interface import AdapterDirectory, Following
from manylora.errors import AdapterNotFound, InvalidRequest, quoted
from manylora.identity import NAME_PATTERN, PUBLIC_TENANT, AdapterRef, Mix
from manylora.tenants.interface import Principal

__all__ = [
    "AdapterName",
    "Named",
    "adapter_of",
    "asker",
    "is_path",
    "looked_up",
    "missing",
    "mixed",
    "named_by",
    "parse_model",
    "resolve",
    "without_alias",
]

T = TypeVar("T")
_NAMED: Final = re.compile(rf"(?:({NAME_PATTERN})/)?({NAME_PATTERN})(?:@([1-9][0-9]{{0,8}}))?")


@dataclass(frozen=True, slots=True)
class AdapterName:
    """A name as written: `version` None means the active one, `owner` None the caller's own or else the public one."""

    name: str
    version: int | None = None
    owner: str | None = None


def _parse_adapter(text: str, *, param: str) -> AdapterName:
    """`<adapter>` or `<adapter>@<n>`, perhaps behind `<tenant>/`.

    Raises AdapterNotFound, since no adapter can have another name.
    """
    match = _NAMED.fullmatch(text)
    if match is None:
        raise _not_found(text, param)
    return AdapterName(match[2], int(match[3]) if match[3] else None, match[1])


def is_path(text: str) -> bool:
    """Whether a text is surely a path or a repository elsewhere: a name behind its tenant's has one slash, too."""
    return ("/" in text or "\\" in text) and _NAMED.fullmatch(text) is None


def parse_model(text: str, base: str) -> AdapterName | None:
    """The value of `model`; None for the base. Raises AdapterNotFound."""
    if text == base:
        return None
    try:
        return _parse_adapter(text.removeprefix(f"{base}:"), param="model")
    except AdapterNotFound:
        raise _not_found(text, "model") from None


def resolve(directory: AdapterDirectory, tenant: str, wanted: AdapterName, *, written: str, param: str) -> AdapterRef:
    """The adapter's identity. Raises one and the same AdapterNotFound for missing, not ready and foreign."""
    if wanted.owner not in (None, tenant, PUBLIC_TENANT):
        raise _not_found(written, param)
    try:
        ref = directory.resolve(wanted.owner or tenant, wanted.name, wanted.version)
    except AdapterNotFound:
        raise _not_found(written, param) from None
    if wanted.owner not in (None, ref.tenant):
        raise _not_found(written, param)
    return ref


def without_alias(directory: AdapterDirectory, tenant: str, base: str, aliases: Mapping[str, str], model: str) -> str:
    """What `model` stands for. The base and the caller's adapters have their names, in any form, to themselves."""
    if model not in aliases:
        return model
    try:
        wanted = parse_model(model, base)
        if wanted is not None:
            resolve(directory, tenant, wanted, written=model, param="model")
    except AdapterNotFound:
        return aliases[model]
    return model


def adapter_of(
    body: Body, directory: AdapterDirectory, tenant: str, base: str, aliases: Mapping[str, str]
) -> AdapterRef | None:
    """The adapter of a request that has `model`, `adapter_id` or both; None for the base. A name is the active one.

    Raises AdapterNotFound, or InvalidRequest where the two fields name different adapters.
    """
    return _found(body, directory, tenant, base, aliases)[0]


def _found(
    body: Body, directory: AdapterDirectory, tenant: str, base: str, aliases: Mapping[str, str]
) -> tuple[AdapterRef | None, bool]:
    """`adapter_of`, and whether it is named without a version."""
    model, adapter_id = body.model, body.adapter_id
    if model is not None:
        model = without_alias(directory, tenant, base, aliases, model)
    by_model = parse_model(model, base) if model is not None else None
    if adapter_id is None:
        if by_model is None or model is None:
            return None, False
        return resolve(directory, tenant, by_model, written=model, param="model"), by_model.version is None
    by_id = _parse_adapter(adapter_id, param="adapter_id")
    if by_model is not None and by_model.name != by_id.name:
        raise _conflict(model, adapter_id)
    ref = resolve(directory, tenant, by_id, written=adapter_id, param="adapter_id")
    if by_model is not None and model is not None and by_model != by_id:
        other = resolve(directory, tenant, by_model, written=model, param="model")
        if other != ref:
            raise _conflict(model, adapter_id)
    return ref, by_id.version is None and (by_model is None or by_model.version is None)


def asker(body: InferenceRequest, principal: Principal) -> str:
    """Who asks, as canaries tell them apart: the tenant's user that the body names, else the key."""
    if body.user is not None:
        return f"{principal.tenant}/user/{body.user}"
    return f"{principal.tenant}/key/{principal.key_id or ''}"


@dataclass(frozen=True, slots=True)
class Named:
    """What a request names: one adapter, a saved mix or none (`adapter`), and what runs for it.

    `canary` is the id of the one that decided on the version, empty where none did.
    """

    adapter: AdapterRef | None = None
    mix: Mix = field(default_factory=Mix)
    canary: str = ""

    @property
    def label(self) -> str:
        """`name@version` of an adapter or a saved mix, `name@version*weight+…` of a mix, `base` of none."""
        return self.mix.label if self.adapter is None else self.adapter.label

    def counted_as(self, tenant: str) -> AdapterRef | None:
        """What its requests are shown and counted as; a mix that is not saved has no version."""
        if self.adapter is not None or not self.mix.parts:
            return self.adapter
        return AdapterRef(f"mix:{tenant}:{self.mix.name}", tenant, self.mix.name, 0, "")


def named_by(
    body: InferenceRequest, directory: AdapterDirectory, tenant: str, base: str, aliases: Mapping[str, str], *, who: str
) -> Named:
    """The adapters of a request, which may name several. A canary decides on the version of one that is named alone.

    Raises as `adapter_of` does.
    """
    ref, is_bare = _found(body, directory, tenant, base, aliases)
    named = body.mixed
    if not named.parts:
        if ref is None:
            return Named()
        ref, canary = directory.drawn(ref, who) if is_bare else (ref, "")
        return Named(ref, directory.mix_of(ref), canary)
    if ref is not None:
        raise InvalidRequest(
            f"'{named.field}' names adapters, and so does '{'adapter_id' if body.adapter_id else 'model'}'. Name all "
            "in one of them.",
            param=named.field,
        )
    mix = mixed(named, directory, tenant)
    return Named(mix.refs[0] if mix.parts and mix.is_plain else None, mix)


def mixed(named: Mixed, directory: AdapterDirectory, tenant: str) -> Mix:
    """Adapters that are named with a weight each. Raises AdapterNotFound or InvalidRequest."""
    found: dict[AdapterRef, float] = {}
    for number, (text, weight) in enumerate(named.parts):
        param = named.param(number)
        part = resolve(directory, tenant, _parse_adapter(text, param=param), written=text, param=param)
        if part in found:
            raise InvalidRequest(f"'{named.field}' names {part.label} more than once. Add its weights up.", param=param)
        if directory.mix_of(part) != Mix.of(part):
            raise InvalidRequest(f"{part.label} is a mix itself. Name its adapters.", param=param)
        found[part] = weight
    return Mix.weighted(found.items())


async def looked_up(find: Callable[[], T], following: Following | None) -> T:
    """What `find` gives; where it knows no such adapter, once more after a look at what other servers have published.

    Raises what `find` raises.
    """
    try:
        return find()
    except AdapterNotFound:
        if following is None or not await following.look_again():
            raise
    return find()


def missing(body: Body) -> AdapterNotFound:
    """For an adapter that was deleted after its name had become an identity: it is as if it had never been there."""
    if isinstance(body, InferenceRequest) and body.mixed.parts:
        return _not_found(", ".join(name for name, _ in body.mixed.parts), body.mixed.field)
    return _not_found(body.adapter_id or body.model or "", "adapter_id" if body.adapter_id else "model")


def _conflict(model: str | None, adapter_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"'model' ({quoted(model or '')}) and 'adapter_id' ({quoted(adapter_id)}) name different adapters. Send one.",
        param="adapter_id",
    )


def _not_found(text: str, param: str) -> AdapterNotFound:
    return AdapterNotFound(
        f"The model or adapter '{quoted(text)}' does not exist or is not available to you. "
        "GET /v1/models lists what you may name.",
        param=param,
    )
