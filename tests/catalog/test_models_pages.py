"""`GET /v1/models` in pages: every name once, in order, whatever comes and goes, at the cost of the page."""

import itertools
import sys
from types import FrameType, MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.catalog.directory import Directory, Entry, Listed
from manylora.identity import AdapterRef
from manylora.settings import Settings

from .rig import running, sound_files

pytestmark = pytest.mark.anyio
names = st.text("abc", min_size=1, max_size=3)


_numbers = itertools.count()  # a version's id is never used again


def entry(tenant: str, name: str, *, is_active: bool = True) -> Entry:
    ref = AdapterRef(f"version_{next(_numbers)}", tenant, name, 1, "d")
    listed = Listed(ref, "blob", 0, True)
    return Entry(
        tenant, name, pinned=False, active_version=1 if is_active else None, versions=MappingProxyType({1: listed})
    )


@given(
    st.lists(st.tuples(st.sampled_from(["acme", "public", "rival"]), names, st.sampled_from(["put", "idle", "gone"]))),
    names | st.just(""),
)
def test_any_order_of_changes_leaves_the_names_in_order(changes: list[tuple[str, str, str]], start: str) -> None:
    directory = Directory()
    known: dict[tuple[str, str], bool] = {}
    for tenant, name, what in changes:
        if what == "gone":
            directory.remove(tenant, name)
            known.pop((tenant, name), None)
        else:
            directory.put(entry(tenant, name, is_active=what == "put"))
            known[tenant, name] = what == "put"
    directory.check_integrity()
    expected = []
    for name in sorted({name for tenant, name in known if tenant in ("acme", "public") and name >= start}):
        owner = "acme" if ("acme", name) in known else "public"
        expected += [(owner, name)] if known[owner, name] else []
    assert [(p.ref.tenant, p.ref.name) for p in directory.visible_to("acme", start)] == expected


def test_a_page_of_many_costs_what_a_page_costs() -> None:
    directory = Directory()
    directory.replace(entry("acme", f"n{number:05}") for number in range(20_000))
    lines = 0

    def on_line(_frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return on_line

    before = sys.gettrace()
    sys.settrace(on_line)
    try:
        page = directory.visible_to("acme", "n10000")
        first = [next(page).ref.name for _ in range(10)]
    finally:
        sys.settrace(before)
    assert first == [f"n{number:05}" for number in range(10_000, 10_010)]
    assert lines < 1000


async def test_pages_have_every_model_once(settings: Settings) -> None:
    async with running(settings, "acme:manager") as rig:
        for number, name in enumerate("edcba"):
            await rig.push(name, sound_files(number + 1.0), who="acme:manager")
        whole = (await rig.call("GET", "/v1/models", "acme:manager")).json()
        assert [model["id"] for model in whole["data"]] == ["base-model", *"abcde"]
        assert (whole["object"], whole["has_more"], whole["last_id"]) == ("list", False, "e")
        seen, query = [], ""
        while True:
            page = (await rig.call("GET", f"/v1/models?limit=2{query}", "acme:manager")).json()
            assert len(page["data"]) <= 2
            seen += [model["id"] for model in page["data"]]
            if not page["has_more"]:
                break
            query = f"&after={page['last_id']}"
        assert seen == ["base-model", *"abcde"]
        for limit in ("0", "10001", "x"):
            assert (await rig.call("GET", f"/v1/models?limit={limit}", "acme:manager")).status_code == 400
