"""The dashboard's files: complete, checked by browsers in the right way, and under a policy that loads nothing else."""

import gzip
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from manylora.api import dashboard_routes
from manylora.api.errors import install_error_handlers

FOLDER = Path(dashboard_routes.__file__).parent / "dashboard"
SOURCES = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in (".js", ".css", ".html", ".svg")]
OWN_SCRIPTS = [path for path in SOURCES if path.suffix == ".js" and "vendor" not in path.parts]
# Ways to put a string into a page as markup, or to run it.
UNSAFE = re.compile(
    r"innerHTML|InnerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\(|new Function|on\w+=\""
)
NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1998/Math/MathML", "http://www.w3.org/1999/xhtml")


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(dashboard_routes.build_router())
    install_error_handlers(app)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def assets_of(page: str) -> list[str]:
    return re.findall(r'(?:src|href)="(dashboard/assets/[^"]+)"', page)


def test_the_page_and_its_files_carry_the_policy(client: TestClient) -> None:
    page = client.get("/dashboard")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for answer in (page, *(client.get(f"/{path}") for path in assets_of(page.text))):
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_every_file_that_a_file_names_is_served(client: TestClient) -> None:
    names = assets_of(client.get("/dashboard").text)
    assert len(names) > 4
    seen: set[str] = set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        answer = client.get(f"/{name}")
        assert answer.status_code == 200, name
        names += [f"{name.rpartition('/')[0]}/{other}" for other in re.findall(r'from "\./([\w./-]+)"', answer.text)]
    served = {name.split("/", 3)[3] for name in seen}
    assert served == {str(path.relative_to(FOLDER)) for path in SOURCES if path.suffix != ".html"}


def test_assets_are_kept_for_good_and_the_page_is_asked_for_again(client: TestClient) -> None:
    page = client.get("/dashboard")
    assert page.headers["cache-control"] == "no-cache"
    assert "immutable" in client.get(f"/{assets_of(page.text)[0]}").headers["cache-control"]
    again = client.get("/dashboard", headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_file_of_another_build_is_missing(client: TestClient) -> None:
    answer = client.get("/dashboard/assets/0123456789abcdef/app.js")
    assert answer.status_code == 404
    assert "Reload" in answer.json()["error"]["message"]


def test_nothing_outside_the_folder_is_served(client: TestClient) -> None:
    folder = assets_of(client.get("/dashboard").text)[0].rpartition("/")[0]
    for name in ("../dashboard_routes.py", "..%2fdashboard_routes.py", "vendor/uplot/LICENSE", "index.html", ""):
        assert client.get(f"/{folder}/{name}").status_code == 404, name


def test_files_are_packed_for_those_who_can_unpack(client: TestClient) -> None:
    plain = client.get("/dashboard", headers={"accept-encoding": "identity"})
    with client.stream("GET", "/dashboard", headers={"accept-encoding": "gzip"}) as packed:
        assert packed.headers["content-encoding"] == "gzip"
        assert gzip.decompress(b"".join(packed.iter_raw())) == plain.content


def test_a_slash_at_the_end_leads_to_the_page(client: TestClient) -> None:
    assert client.get("/dashboard/").url.path == "/dashboard"


def test_libraries_are_as_they_were_published_and_have_their_licences() -> None:
    vendor = FOLDER / "vendor"
    listed = {}
    for line in (vendor / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    found = {path.relative_to(vendor).as_posix(): path for path in vendor.rglob("*.*")}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}
    assert {name.partition("/")[0] for name in listed} == {path.parent.name for path in vendor.glob("*/LICENSE")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_file_names_another_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for namespace in NAMESPACES:
        text = text.replace(namespace, "")
    if "vendor" in path.parts:  # a library's licence and the text of its own errors name its home, and ask nobody there
        text = re.sub(r"/\*[*!].*?\*/|Please report this to \S+", "", text, flags=re.DOTALL)
    assert re.findall(r"(?:https?:)?//[\w-]+\.[\w.]+", text) == []


@pytest.mark.parametrize("path", OWN_SCRIPTS, ids=lambda path: path.name)
def test_no_script_turns_text_into_markup(path: Path) -> None:
    assert UNSAFE.findall(path.read_text(encoding="utf-8")) == []
