"""The lifecycle's side of the HTTP contract: upload an adapter, find versions, promote."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.adapter_files import CONFIG, WEIGHTS
from manylora.lifecycle.contenders import checked

_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


def _open(server: str, key: str) -> httpx.Client:
    """A client of a running server. Raises ManyloraError when it does not answer."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client = httpx.Client(base_url=server.rstrip("/"), headers=headers, timeout=_TIMEOUT)
    try:
        if not client.get("/ready").is_success:
            raise ManyloraError(f"The server at {server} is not ready.")
    except httpx.HTTPError as error:
        client.close()
        raise ManyloraError(f"No server answers at {server}: {error}") from error
    return client


def publish(client: httpx.Client, folder: Path, name: str, *, description: str = "", activate: bool = True) -> str:
    """Upload a PEFT folder; `name@version` of the result. Raises ManyloraError with the server's reasons."""
    files = [("files", (part, (folder / part).read_bytes())) for part in (CONFIG, WEIGHTS)]
    form = {"name": name, "description": description, "activate": "true" if activate else "false"}
    version = checked(client.post("/v1/adapters", data=form, files=files))
    return f"{version['name']}@{version['version']}"


def promote(client: httpx.Client, adapter: str) -> None:
    """Make `name@version` its name's active version."""
    name, _, version = adapter.partition("@")
    if not version.isdigit():
        raise InvalidRequest(f"Only a version can be promoted: {adapter!r} should be NAME@VERSION.")
    checked(client.patch(f"/v1/adapters/{name}", json={"active_version": int(version)}))


def served_base(client: httpx.Client) -> str:
    """The name under which the server serves its bare base: the model that has no parent."""
    models: list[dict[str, Any]] = checked(client.get("/v1/models"))["data"]
    for model in models:
        if not model.get("parent"):
            return str(model["id"])
    raise ManyloraError("The server lists no base model.")


@contextmanager
def connect(server: str, key: str) -> Iterator[httpx.Client]:
    """An answering server's client, closed at the end. It has been used before, so it cannot be entered itself."""
    client = _open(server, key)
    try:
        yield client
    finally:
        client.close()
