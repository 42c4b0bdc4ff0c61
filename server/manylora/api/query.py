"""A query parameter has its effect or is refused: one check in front of every route of the API."""

from typing import Final

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from manylora.errors import InvalidRequest, UnsupportedField

__all__ = ["check_query"]

_LONGEST_ECHO: Final = 80


async def check_query(request: Request) -> None:
    """A dependency of all routes. Raises UnsupportedField for a name that the route does not declare, InvalidRequest
    for one that is given twice or holds the character U+0000, which a database may not take.

    Pages for people (`/dashboard`, `/docs`), which are not in the API's schema, take any link.
    """
    route = request.scope.get("route")
    if not request.scope["query_string"] or not isinstance(route, APIRoute) or not route.include_in_schema:
        return
    known = _declared(route.dependant)
    seen: set[str] = set()
    for name, value in request.query_params.multi_items():
        if name not in known:
            shown = _shown(name)
            raise UnsupportedField(f"This route has no query parameter '{shown}'.{_advice(known)}", param=shown)
        if name in seen:
            raise InvalidRequest(f"'{name}' is given twice.", param=name)
        if "\0" in value:
            raise InvalidRequest(f"'{name}' holds the character U+0000, which nothing here has.", param=name)
        seen.add(name)


def _declared(dependant: Dependant) -> set[str]:
    """The route's own and those of what it depends on."""
    names = {field.alias for field in dependant.query_params}
    return names.union(*(_declared(each) for each in dependant.dependencies))


def _advice(known: set[str]) -> str:
    return f" It has {', '.join(sorted(known))}." if known else " Leave it out."


def _shown(name: str) -> str:
    return name if len(name) <= _LONGEST_ECHO else f"{name[:_LONGEST_ECHO]}…"
