"""Processes in which strangers' work is done end with whoever asked them."""

from typing import Any

from manylora.children import Helper

ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "template": "{{ messages[0].content }}",
    "variables": {},
    "tools": None,
    "documents": None,
    "continue_final": False,
    "for_answer": False,
}


def test_a_helper_that_is_dropped_leaves_no_process() -> None:
    helper = Helper("manylora.chat.render_process")
    assert helper.ask(ASKED) == {"text": "hi"}
    process = helper._process
    assert process is not None
    assert process.poll() is None
    del helper
    assert process.poll() is not None
