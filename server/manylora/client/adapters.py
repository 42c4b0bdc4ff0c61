"""A server's adapters for a program: upload one, find versions, promote."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.client.server import Caller, Server
from manylora.errors import InvalidRequest, ManyloraError
from manylora.identity import BROUGHT_FILES

__all__ = [
    "Publication",
    "active_version",
    "check_may_manage",
    "check_name",
    "pinned",
    "promote",
    "publication_of",
    "publish",
    "served_base",
]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(server: Server, name: str, *, called: str = "publish") -> None:
    """Raises before any work for what would make a publication fail after it: a bad name, a wrong key.

    `called` is the parameter that has the name.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"`{called}`: {name!r} is no adapter's name: up to 64 of a-z, 0-9, dot, dash and underscore, starting "
            "with a letter or digit.",
            param=called,
        )
    check_may_manage(server)


def check_may_manage(server: Server) -> None:
    """Raises InvalidRequest when the key may not upload or promote, ManyloraError when it is unknown."""
    role = server.call("GET", "/v1/stats").get("you", {}).get("role")
    if role == "user":
        raise InvalidRequest("This key has the role 'user': publishing and promoting need 'manager' or 'admin'.")


@dataclass(frozen=True, slots=True)
class Publication:
    """An uploaded version as `name@version`, and the one that answers to the bare name now; None where none does."""

    label: str
    answering: str | None

    @property
    def is_active(self) -> bool:
        return self.answering == self.label

    @property
    def name(self) -> str:
        return self.label.partition("@")[0]


def publication_of(version: Mapping[str, Any]) -> Publication:
    """What a server says of an upload."""
    name, number = version["name"], version["version"] if version["active"] else version.get("active_version")
    return Publication(f"{name}@{version['version']}", None if number is None else f"{name}@{number}")


def publish(
    server: Server, folder: Path, name: str, *, description: str = "", activate: bool | None = None
) -> Publication:
    """Upload a PEFT folder. Without `activate` only the first version of a name becomes active.

    Raises ManyloraError with the server's reasons.
    """
    files = [("files", (part, (folder / part).read_bytes())) for part in BROUGHT_FILES if (folder / part).is_file()]
    form = {"name": name, "description": description}
    form |= {} if activate is None else {"activate": "true" if activate else "false"}
    return publication_of(server.call("POST", "/v1/adapters", data=form, files=files))


def active_version(server: Server, name: str) -> str | None:
    """`name@version` that serves `name` now; None when there is none. Raises ManyloraError for an unknown name."""
    version: int | None = server.call("GET", f"/v1/adapters/{name}", params={"limit": 1})["active_version"]
    return None if version is None else f"{name}@{version}"


def pinned(server: Server, adapter: str) -> str:
    """A bare name as the version that it means now, so that a promotion meanwhile changes nothing."""
    if "@" in adapter:
        return adapter
    return active_version(server, adapter) or adapter


def promote(server: Server, adapter: str, *, instead_of: str | None = None) -> None:
    """Make `name@version` its name's active version.

    Raises Refused (409) where `instead_of`, the `name@version` that it takes the place of, is not active any more.
    """
    name, _, version = adapter.partition("@")
    if not version.isdigit():
        raise InvalidRequest(f"Only a version can be promoted: {adapter!r} should be NAME@VERSION.")
    body = {"active_version": int(version)}
    body |= {} if instead_of is None else {"if_active": int(instead_of.partition("@")[2])}
    server.call("PATCH", f"/v1/adapters/{name}", json=body)


def served_base(server: Caller) -> str:
    """The name under which the server serves its bare base: the model that has no parent."""
    models: list[dict[str, Any]] = server.call("GET", "/v1/models")["data"]
    for model in models:
        if not model.get("parent"):
            return str(model["id"])
    raise ManyloraError("The server lists no base model.")
