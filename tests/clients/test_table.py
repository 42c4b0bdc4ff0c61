"""The table of clients and the page say the same."""

from tests.clients.__main__ import lines_of
from tests.clients.table import CLIENTS, PAGE
from tests.pages import blocks


def test_every_client_has_lines_that_print_something_and_pinned_versions() -> None:
    for client in CLIENTS:
        kinds = [block.kind for block in lines_of(client)]
        assert "text" in kinds, client.name
        assert kinds[0] in (("js",) if client.is_node else ("python", "bash")), client.name
        assert all("@" in each[1:] if client.is_node else "==" in each for each in client.packages), client.name


def test_every_line_of_a_client_on_the_page_is_tried() -> None:
    headings = {block.heading for block in blocks(PAGE) if block.installs is not None}
    assert headings <= {client.heading for client in CLIENTS}


def test_names_are_names() -> None:
    names = [client.name for client in CLIENTS]
    assert len(set(names)) == len(names)
