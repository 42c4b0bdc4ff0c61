"""Which pages in a browser may use this server.

A server with keys needs no protection from other sites: a page cannot send a key that it does not have. It only has to
say which sites may read its answers (`Cors`). A server without keys would do what any page tells it, from the visitor's
own machine: by a form that is sent here, or by a host name of the page's own that was made to lead here ("DNS
rebinding"). `OpenRules` refuse both.
"""

import ipaddress
import re
import socket
from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from manylora.api.errors import error_response
from manylora.errors import CrossSite, MethodNotAllowed, quoted

__all__ = ["Cors", "OpenRules", "OwnHosts"]

_METHODS: Final = ("GET", "HEAD", "POST", "PATCH", "DELETE")
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_EXPOSED: Final = (
    "x-request-id",
    "x-manylora-adapter",
    "x-manylora-replica",
    "x-manylora-revision",
    "retry-after",
    "content-disposition",
    "www-authenticate",
)
# They tell nothing, and balancers ask them by whatever name they have.
_PROBES: Final = frozenset({"/health", "/ready", "/ping"})
# A `Host` header is a name, an IPv4 address or an IPv6 address in brackets, and perhaps a port: nothing behind those.
_HOST: Final = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::\d*)?", re.ASCII)


class Cors(CORSMiddleware):
    """Starlette's, for pages of `allow_origins`: any header may be sent, and ours may be read."""

    def __init__(self, app: ASGIApp, allow_origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=allow_origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=_EXPOSED,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin, method = request_headers.get("origin", ""), request_headers.get("access-control-request-method", "")
        if self.is_allowed_origin(origin):
            message = f"No route here is asked by '{quoted(method)}': there are {', '.join(_METHODS)}."
            kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
            return error_response(MethodNotAllowed(message), headers=kept)
        return error_response(
            CrossSite(
                f"Pages of '{quoted(origin)}' may not ask this. The setting allowed_origins names those that may."
            ),
            headers={"vary": "origin"},
        )


class OwnHosts:
    """The host names that lead to this server for sure: of this machine only, or with `is_reachable` of any address.

    An address or a name without a dot cannot be made to lead here by a stranger's name server.
    """

    def __init__(self, allowed: Collection[str], *, is_reachable: bool) -> None:
        self._is_reachable = is_reachable
        self._names = {"localhost", *(name.lower() for name in allowed)}
        if is_reachable:
            self._names.add(socket.gethostname().lower())

    def __contains__(self, host: str) -> bool:
        """`host` as a `Host` header has it, with a port or without."""
        name = _without_port(host)
        if name is None:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name[1:-1] if name.startswith("[") else name)
        except ValueError:
            return self._is_reachable and bool(name) and "." not in name
        return self._is_reachable or address.is_loopback


def _without_port(host: str) -> str | None:
    """None where it is no host at all."""
    match = _HOST.fullmatch(host)
    return match[1].lower().rstrip(".") if match else None


class OpenRules:
    """What a server without keys does not do for a browser: what a page of another site may have made it send."""

    def __init__(self, hosts: OwnHosts, allowed_origins: Collection[str]) -> None:
        self._hosts = hosts
        self._origins = allowed_origins

    def fault(self, scope: Scope) -> CrossSite | None:
        """Why the request is not answered, or None."""
        if scope["path"] in _PROBES:
            return None
        method, headers = scope["method"], Headers(scope=scope)
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and host not in self._hosts:
            name = quoted(_without_port(host) or host)
            return CrossSite(
                f"This server asks for no key, and '{name}' is not known to be a name of it. "
                "Name it in the setting allowed_hosts, or make a key with `manylora keys create`."
            )
        if origin is not None:
            if self._is_own(origin, host) or origin in self._origins or "*" in self._origins:
                return None
            return CrossSite(
                f"This server asks for no key, and pages of '{quoted(origin)}' may not use it. "
                "Name it in the setting allowed_origins, or make a key with `manylora keys create`."
            )
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and (
            method not in _SAFE or headers.get("sec-fetch-mode") != "navigate"
        ):
            return CrossSite("This server asks for no key, and pages of other sites may not use it.")
        return None

    def _is_own(self, origin: str, host: str | None) -> bool:
        return host is not None and origin.partition("://")[2].lower() == host.lower()
