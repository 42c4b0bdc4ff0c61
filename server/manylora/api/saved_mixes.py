"""`POST /v1/adapters` with `mix`: several adapters under one name, as they are or made into one beforehand."""

from functools import partial
from typing import Annotated, Final

from pydantic import Field

from manylora.api.bodies import Body
from manylora.api.defaults import check_unlocked
from manylora.api.fields import renamed
from manylora.api.mixed import Mixed, MixedAdapter
from manylora.api.naming import looked_up, mixed
from manylora.catalog.materialise import Method, Recipe
from manylora.catalog.records import Published, Wish
from manylora.catalog.service import Catalog
from manylora.errors import Conflict, InvalidRequest
from manylora.identity import MAX_MIXED

__all__ = ["MixBody", "saved"]

_DENSITY: Final = 0.5


class MixBody(Body):
    """What says which adapters are mixed, and whether they are made into one: a version with files of its own."""

    mix: Annotated[list[MixedAdapter], Field(min_length=1, max_length=MAX_MIXED, fail_fast=True)] | None = None
    materialise: Method | None = Field(default=None, description="Merge them number by number into one adapter.")
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="With materialise: the share of each adapter's numbers that is kept; 0.5 unless sent."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None, description="With materialise: decides which numbers DARE drops."
    )

    def check_no_mix(self) -> None:
        """Raises InvalidRequest for fields of a mix where none is sent."""
        sent = next((name for name in ("materialise", "density", "seed") if getattr(self, name) is not None), None)
        if sent is not None:
            raise InvalidRequest(f"'{sent}' is for a 'mix', which is not sent.", param=sent)


async def saved(catalog: Catalog, wish: Wish, body: MixBody) -> Published:
    """Of adapters that the owner may use. Those of everybody whose fields are locked are not mixed."""
    if wish.pinned is not None and body.materialise is None:
        raise Conflict("'pinned' does not go with 'mix', which is not pinned. Pin its adapters.", param="pinned")
    named = Mixed(tuple((each.name, each.weight) for each in body.mix or ()), "mix")
    mix = await looked_up(partial(mixed, named, catalog.directory, wish.tenant), catalog.following)
    check_unlocked(catalog.directory, mix, "mix")
    try:
        mix.check(MAX_MIXED)
    except InvalidRequest as error:
        raise renamed(error, {"adapters": "mix"}) from None
    if not mix.parts:
        raise InvalidRequest("A mix needs an adapter whose weight is not 0.", param="mix")
    if body.materialise is None:
        if body.density is not None or body.seed is not None:
            raise InvalidRequest("'density' and 'seed' are for 'materialise'. Send that too.", param="materialise")
        return await catalog.save_mix(wish, mix)
    density = _DENSITY if body.density is None else body.density
    return await catalog.save_mix(wish, mix, Recipe(body.materialise, density, body.seed or 0))
