"""Uploading, promoting, pinning and deleting through the page."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect
from safetensors.numpy import load_file, save_file

from manylora.identity import CONFIG_FILE, TENSOR_FILE
from tests.e2e.conftest import Server

from .conftest import NAMES, OpenPage, complete, upload

pytestmark = pytest.mark.slow
PROMPT = "The quick brown"
HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter with several things wrong at once, one of them named by an attacker."""
    folder = tmp_path / "broken"
    shutil.copytree(folders["spare"], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"kasa_config": {"a": 1}, "frobnicate": HOSTILE, HOSTILE: "a key that PEFT does not have"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, HOSTILE: next(iter(tensors.values()))}, folder / "adapter_model.safetensors")
    return folder


def problems_of(server: Server, folder: Path) -> list[dict[str, str]]:
    files = [("files", (n, (folder / n).read_bytes())) for n in ("adapter_config.json", "adapter_model.safetensors")]
    answer = httpx.post(f"{server.url}/v1/adapters", data={"name": "broken"}, files=files, timeout=60)
    assert answer.status_code == 422
    problems: list[dict[str, str]] = answer.json()["error"]["problems"]
    return problems


def row_of(page: Page, name: str) -> Any:
    return page.locator("#adapters-body tr").filter(has=page.get_by_role("button", name=name, exact=True))


def open_adapter(page: Page, name: str) -> Any:
    page.get_by_role("button", name=name, exact=True).first.click()
    drawer = page.locator("#detail")
    expect(drawer).to_be_visible()
    return drawer


def test_a_folder_dropped_on_the_page_becomes_an_adapter(
    open_page: OpenPage, server: Server, folders: dict[str, Path]
) -> None:
    visit = open_page(tab="adapters")
    page = visit.page
    expect(page.locator("#upload-button")).to_be_visible()
    visit.drop(folders["spare"])
    expect(page.locator(".staged li")).to_have_count(2)
    expect(page.locator("#upload-name")).to_have_value("sales-notes")
    page.locator("#upload").get_by_role("button", name="Upload").click()
    expect(page.locator(".good-line")).to_have_text("sales-notes@1 is ready and active.")
    expect(page.locator("#upload .report")).to_contain_text("matched")
    expect(row_of(page, "sales-notes")).to_be_visible()
    assert httpx.get(f"{server.url}/v1/adapters/sales-notes").json()["active_version"] == 1


def test_an_archive_and_two_files_can_be_dropped_too(
    open_page: OpenPage, folders: dict[str, Path], tmp_path: Path
) -> None:
    visit = open_page(tab="adapters")
    page = visit.page
    expect(page.locator("#upload-button")).to_be_visible()
    archive = Path(shutil.make_archive(str(tmp_path / "From Archive"), "zip", folders["other"]))
    visit.drop(archive)
    page.locator("#upload").get_by_role("button", name="Upload").click()
    expect(page.locator(".good-line")).to_have_text("from-archive@1 is ready and active.")
    visit.drop(folders["other"] / "adapter_config.json", folders["other"] / "adapter_model.safetensors")
    page.locator("#upload-name").fill("from-archive")
    page.locator("#upload").get_by_role("button", name="Upload").click()
    expect(page.locator(".good-line")).to_contain_text("exactly this content already")


def test_progress_is_shown_while_bytes_travel(open_page: OpenPage, folders: dict[str, Path]) -> None:
    visit = open_page(tab="adapters")
    page = visit.page
    expect(page.locator("#upload-button")).to_be_visible()
    page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => {"
        "const bar = document.querySelector('progress'); if (!bar.hidden) window.seen.push(bar.value); })"
        ".observe(document.querySelector('#upload'), { attributes: true, childList: true, subtree: true }); }"
    )
    visit.drop(folders["spare"])
    page.locator("#upload-name").fill("progressing")
    page.locator("#upload").get_by_role("button", name="Upload").click()
    expect(page.locator(".good-line")).to_be_visible()
    assert 1 in page.evaluate("window.seen")
    expect(page.locator("progress")).to_be_hidden()


def test_a_refused_upload_lists_every_problem_and_stores_nothing(
    open_page: OpenPage, server: Server, broken: Path
) -> None:
    problems = problems_of(server, broken)
    assert len(problems) >= 3
    visit = open_page(expected={422}, tab="adapters")
    page = visit.page
    expect(page.locator("#upload-button")).to_be_visible()
    visit.drop(broken)
    page.locator("#upload").get_by_role("button", name="Upload").click()
    items = page.locator(".problems li")
    expect(items).to_have_count(len(problems))
    expect(page.locator(".problem-line")).to_contain_text(f"{len(problems)} problems")
    shown = [(item.locator(".code").inner_text(), item.locator(".message").inner_text()) for item in items.all()]
    assert shown == [(p["code"], " ".join(p["message"].split())) for p in problems]
    assert httpx.get(f"{server.url}/v1/adapters/broken").status_code == 404


def test_hostile_text_in_problems_stays_text(open_page: OpenPage, server: Server, broken: Path) -> None:
    assert any(HOSTILE in p["message"] + p["where"] for p in problems_of(server, broken))
    visit = open_page(expected={422}, tab="adapters")
    page = visit.page
    expect(page.locator("#upload-button")).to_be_visible()
    visit.drop(broken)
    page.locator("#upload").get_by_role("button", name="Upload").click()
    expect(page.locator(".problems")).to_contain_text(HOSTILE)
    assert page.locator("img").count() == 0
    assert page.title() == "manylora"


def test_hostile_names_and_errors_stay_text(open_page: OpenPage, server: Server) -> None:
    """A registry that let such names in, or another program behind the same address."""
    visit = open_page(permissions=["clipboard-read", "clipboard-write"], tab="adapters")
    page = visit.page

    def poisoned(name: str, change: Callable[[dict[str, Any]], None]) -> None:
        def answer(route: Any) -> None:
            body = httpx.get(f"{server.url}/v1/{name}").json()
            change(body)
            route.fulfill(json=body)

        page.route(f"**/v1/{name}**", answer)

    def in_list(body: dict[str, Any]) -> None:
        body["data"][0] |= {"name": HOSTILE, "description": HOSTILE, "tenant": HOSTILE}

    def in_stats(body: dict[str, Any]) -> None:
        body["server"]["model"] = HOSTILE
        resident = {"id": "1", "tenant": HOSTILE, "name": HOSTILE, "version": 1, "size_bytes": 1, "users": 1}
        body["resident"] = [{"slot": 0, "pinned": False, **resident}]
        error = {"request_id": HOSTILE, "tenant": HOSTILE, "adapter": HOSTILE, "code": HOSTILE, "message": HOSTILE}
        body["recent_errors"] = [{"at": body["now"], **error}]

    poisoned("adapters", in_list)
    poisoned("stats", in_stats)
    page.reload()
    expect(page.locator("#adapters-body")).to_contain_text(HOSTILE)
    expect(page.locator("#model")).to_have_text(HOSTILE)
    visit.to("now")
    expect(page.locator(".slot").first).to_contain_text(HOSTILE)
    visit.to("errors")
    expect(page.locator("#errors-list .message")).to_have_text(HOSTILE)
    page.locator("#errors-list .request").click()
    expect(page.locator(".toast")).to_contain_text("id is copied")
    assert page.evaluate("navigator.clipboard.readText()") == HOSTILE
    assert page.locator("img").count() == 0
    assert page.title() == "manylora"


def test_the_policy_stops_markup_even_if_the_code_would_write_it(open_page: OpenPage) -> None:
    visit = open_page(tab="adapters")
    refused = visit.page.evaluate(
        "(text) => { try { document.body.innerHTML = text; } catch (e) { return e.name; } }", HOSTILE
    )
    assert refused == "TypeError"
    assert all("TrustedHTML" in complaint for complaint in visit.complaints)
    visit.complaints.clear()


def test_promoting_and_rolling_back_change_what_the_try_it_box_answers(
    open_page: OpenPage, server: Server, folders: dict[str, Path]
) -> None:
    upload(server.url, folders["spare"], "promoted")
    upload(server.url, folders["other"], "promoted", activate="false")
    first, second = (complete(server.url, f"promoted@{n}", PROMPT) for n in (1, 2))
    assert first != second
    visit = open_page(tab="adapters")
    page = visit.page
    expect(row_of(page, "promoted")).to_contain_text("1 of 2")

    def answer() -> str:
        visit.to("try")
        page.locator("#try-adapter").fill("promoted")
        page.locator("#try-mode").select_option("completion")
        page.locator("#try-tokens").fill("24")
        page.locator("#try-prompt").fill(PROMPT)
        page.get_by_role("button", name="Run both").click()
        expect(page.get_by_role("button", name="Run both")).to_be_enabled()
        text: str = page.locator(".pane .answer").first.text_content() or ""
        return text

    assert answer() == first
    expect(page.locator(".pane-head .hint").first).to_contain_text("promoted@1")
    visit.to("adapters")
    drawer = open_adapter(page, "promoted")
    drawer.get_by_role("button", name="Promote").click()
    expect(drawer.locator("[data-active=true]")).to_contain_text("Version 2")
    drawer.get_by_role("button", name="Close").click()
    assert answer() == second
    visit.to("adapters")
    drawer = open_adapter(page, "promoted")
    drawer.get_by_role("button", name="Roll back to this").click()
    expect(drawer.locator("[data-active=true]")).to_contain_text("Version 1")
    drawer.get_by_role("button", name="Close").click()
    assert answer() == first
    page.get_by_role("button", name="Undo").last.click()
    expect(page.locator(".toast").last).to_contain_text("promoted@2 answers again")
    visit.to("adapters")
    drawer = open_adapter(page, "promoted")
    expect(drawer.locator("[data-active=true]")).to_contain_text("Version 2")
    drawer.get_by_role("button", name="History").click()
    expect(drawer.locator(".history strong")).to_have_text(
        [
            "Rolled back to version 2",
            "Promoted version 1",
            "Promoted version 2",
            "Uploaded version 2",
            "Uploaded version 1",
        ]
    )


def test_a_canary_is_begun_watched_and_stopped(open_page: OpenPage, server: Server, folders: dict[str, Path]) -> None:
    upload(server.url, folders["spare"], "tried")
    upload(server.url, folders["other"], "tried", activate="false")
    page = open_page(tab="adapters").page
    drawer = open_adapter(page, "tried")
    drawer.get_by_role("button", name="Canary").click()
    drawer.get_by_label("Share in %").fill("100")
    drawer.get_by_role("button", name="Begin").click()
    watch = drawer.locator(".canary")
    expect(watch.locator("h3")).to_have_text("Version 2 answers 100 % of the requests")
    expect(drawer.locator(".versions li", has_text="Version 2").locator(".badge")).to_have_text("Canary")
    complete(server.url, "tried", "The quick", 2)
    answered = watch.locator("tbody tr").filter(has_text="version 2").locator("td").nth(1)
    expect(answered).to_have_text("1")
    watch.get_by_role("button", name="Stop").click()
    expect(watch).to_have_count(0)
    found = httpx.get(f"{server.url}/v1/adapters/tried/canary").json()
    assert (found["reason"], found["share"], found["version"]) == ("stopped", 1, 2)
    drawer.get_by_role("button", name="History").click()
    expect(drawer.locator(".history li").first).to_contain_text("End of the canary: version 2")


def test_older_versions_are_fetched_when_they_are_asked_for(
    open_page: OpenPage, server: Server, folders: dict[str, Path]
) -> None:
    for number in range(5):
        upload(server.url, folders["spare" if number % 2 else "other"], "old", activate="false" if number else "true")
    page = open_page(tab="adapters").page
    page.route("**/v1/adapters/old?*", lambda route: route.continue_(url=route.request.url.replace("=50", "=2")))
    drawer = open_adapter(page, "old")
    names = drawer.locator(".version-line strong")
    expect(drawer.locator("h3")).to_have_text("5 versions")
    expect(names).to_have_text(["Version 5", "Version 4", "Version 1"])
    older = drawer.get_by_role("button", name="Older versions")
    older.click()
    expect(names).to_have_text([f"Version {number}" for number in (5, 4, 3, 2, 1)])
    older.click()
    expect(older).to_have_count(0)
    expect(names).to_have_count(5)


def test_pinning_brings_the_adapter_to_the_device_and_marks_it(
    open_page: OpenPage, server: Server, folders: dict[str, Path]
) -> None:
    upload(server.url, folders["spare"], "kept")
    visit = open_page(tab="adapters")
    page = visit.page
    drawer = open_adapter(page, "kept")
    drawer.get_by_role("button", name="Pin").click()
    expect(drawer.get_by_role("button", name="Unpin")).to_be_visible()
    drawer.get_by_role("button", name="Close").click()
    expect(row_of(page, "kept").get_by_label("pinned")).to_be_visible()
    visit.to("now")
    expect(page.locator(".slot.pinned")).to_contain_text("kept")
    visit.to("adapters")
    page.locator("#tier-filter").select_option("pinned")
    expect(page.locator("#adapters-body tr")).to_have_count(1)
    drawer = open_adapter(page, "kept")
    drawer.get_by_role("button", name="Unpin").click()
    expect(drawer.get_by_role("button", name="Pin", exact=True)).to_be_visible()
    assert httpx.get(f"{server.url}/v1/adapters/kept").json()["pinned"] is False


def test_a_versions_defaults_are_shown(open_page: OpenPage, server: Server, folders: dict[str, Path]) -> None:
    upload(server.url, folders["spare"], "told")
    defaults = {"system_prompt": "Be brief.", "choices": ["yes", "no"], "locked": ["choices"]}
    path = f"{server.url}/v1/adapters/told"
    assert httpx.patch(path, json={"defaults": defaults}, timeout=120).status_code == 200
    page = open_page(tab="adapters").page
    drawer = open_adapter(page, "told")
    drawer.get_by_role("button", name="Defaults").click()
    expect(drawer.locator(".defaults dt")).to_have_text(["choices (locked)", "system_prompt"])
    expect(drawer.locator(".defaults dd")).to_have_text(['["yes","no"]', "Be brief."])
    assert httpx.patch(path, json={"defaults": {}}).status_code == 200
    drawer.get_by_role("button", name="Close").click()
    drawer = open_adapter(page, "told")
    expect(drawer.get_by_role("button", name="Report")).to_be_visible()
    expect(drawer.get_by_role("button", name="Defaults")).to_have_count(0)


def test_deleting_asks_first_and_then_is_final(open_page: OpenPage, server: Server, folders: dict[str, Path]) -> None:
    upload(server.url, folders["spare"], "doomed")
    page = open_page(tab="adapters").page
    drawer = open_adapter(page, "doomed")
    dialog = page.locator("#confirm-dialog")
    drawer.get_by_role("button", name="Delete adapter").click()
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert httpx.get(f"{server.url}/v1/adapters/doomed").status_code == 200
    drawer.get_by_role("button", name="Delete adapter").click()
    dialog.get_by_role("button", name="Delete adapter").click()
    expect(row_of(page, "doomed")).to_have_count(0)
    assert httpx.get(f"{server.url}/v1/adapters/doomed").status_code == 404


def test_a_downloaded_version_is_the_servers_archive(open_page: OpenPage, server: Server) -> None:
    page = open_page(tab="adapters").page
    drawer = open_adapter(page, NAMES[0])
    with page.expect_download() as download:
        drawer.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == f"{NAMES[0]}@1.tar.gz"
    sent = httpx.get(f"{server.url}/v1/adapters/{NAMES[0]}/versions/1/download").content
    assert Path(download.value.path()).read_bytes()[:2] == sent[:2] == b"\x1f\x8b"


def test_the_table_sorts_and_filters(open_page: OpenPage) -> None:
    page = open_page(tab="adapters").page
    names = page.locator("#adapters-body button.name")
    expect(names.first).to_be_visible()
    page.get_by_role("button", name="Adapter", exact=True).click()
    expect(page.locator("th[data-column=name]")).to_have_attribute("aria-sort", "ascending")
    up = names.all_inner_texts()
    assert up == sorted(up)
    page.get_by_role("button", name="Adapter", exact=True).click()
    assert names.all_inner_texts() == up[::-1]
    page.locator("#filter").fill("LEGAL")
    assert names.all_inner_texts() == ["legal-contracts"]
    page.locator("#filter").fill("nothing like it")
    expect(page.locator("#adapters-empty")).to_have_text("No adapter matches this filter.")


def test_an_adapter_that_names_another_base_is_marked_in_the_table_the_drawer_and_its_report(
    open_page: OpenPage, server: Server, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["spare"], tmp_path / "stranger"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "Qwen/Qwen2.5-0.5B-Instruct"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    upload(server.url, folder, "stranger")
    page = open_page(tab="adapters").page
    row = page.locator("#adapters-body tr", has_text="stranger")
    expect(row.locator(".badge.warn")).to_have_text("other name")
    expect(page.locator("#adapters-body tr", has_text="sql").first.locator(".badge.warn")).to_be_hidden()
    row.get_by_role("button", name="stranger").click()
    expect(page.locator(".versions .badge.warn")).to_have_text("other name")
    page.get_by_role("button", name="Report").first.click()
    expect(page.locator(".version-report .warnings")).to_contain_text("Qwen/Qwen2.5-0.5B-Instruct")
    httpx.delete(f"{server.url}/v1/adapters/stranger")


CARD = f"""---
widget:
- text: The quick brown
- text: {HOSTILE}
lineage: {json.dumps({"command": HOSTILE, "data_sha256": "ab" * 32, "scores": {HOSTILE: 0.25}})}
---
# A *card*

{HOSTILE} [no](javascript:document.title=1) [yes](https://example.org/a)
![pixel](https://example.org/pixel.png)

<script>document.title=1</script>

| asked | wanted |
| --- | --- |
| `1\\|1` | **two** |

{">" * 3000} deep
"""


def test_a_card_is_shown_as_text_and_its_examples_are_tried(
    open_page: OpenPage, server: Server, folders: dict[str, Path]
) -> None:
    upload(server.url, folders["spare"], "carded")
    card = CARD.rpartition("\n>")[0]
    files = [("files", (n, (folders["spare"] / n).read_bytes())) for n in (CONFIG_FILE, TENSOR_FILE)]
    files.append(("files", ("README.md", card.encode())))
    said = httpx.post(f"{server.url}/v1/adapters", data={"name": "carded"}, files=files, timeout=60).json()
    assert (said["version"], said["card_bytes"]) == (1, len(card.encode()))
    page = open_page(tab="adapters").page
    drawer = open_adapter(page, "carded")
    made = drawer.locator(".lineage")
    expect(made).to_have_text(f"data {'ab' * 6}… · {HOSTILE} 0.25")
    expect(made).to_have_attribute("title", HOSTILE)
    drawer.get_by_role("button", name="Report").click()
    expect(drawer.locator(".report")).to_contain_text(f"{HOSTILE} 0.25")
    drawer.get_by_role("button", name="Card").click()
    prose = drawer.locator(".prose")
    expect(prose.locator("h4")).to_have_text("A card")
    expect(prose).to_contain_text(HOSTILE)
    expect(prose).to_contain_text("<script>document.title=1</script>")
    expect(prose.locator("img, script, style, iframe")).to_have_count(0)
    links = prose.locator("a")
    expect(links).to_have_text(["yes", "pixel"])
    for attribute, value in (("href", "https://example.org/a"), ("rel", "noopener noreferrer nofollow")):
        expect(links.first).to_have_attribute(attribute, value)
    expect(prose.locator("td code")).to_have_text("1|1")
    expect(drawer.locator(".example")).to_have_text([PROMPT, HOSTILE])
    drawer.locator(".example").first.click()
    expect(page.locator("#try-prompt")).to_have_value(PROMPT)
    expect(page.locator("#try-adapter")).to_have_value("carded")
    expect(page.locator("#try-form .example")).to_have_text([PROMPT, HOSTILE])  # on the box's own shelf, too
    assert page.title() == "manylora"


def test_a_card_nested_beyond_reason_is_its_plain_text(
    open_page: OpenPage, server: Server, folders: dict[str, Path]
) -> None:
    files = [("files", (n, (folders["other"] / n).read_bytes())) for n in (CONFIG_FILE, TENSOR_FILE)]
    files.append(("files", ("README.md", CARD.encode())))
    assert httpx.post(f"{server.url}/v1/adapters", data={"name": "deep"}, files=files, timeout=60).status_code == 201
    drawer = open_adapter(open_page(tab="adapters").page, "deep")
    drawer.get_by_role("button", name="Card").click()
    expect(drawer.locator(".prose > pre")).to_contain_text(HOSTILE)
