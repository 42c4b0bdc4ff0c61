"""A process in which chat templates of strangers are rendered, in the sandbox in which the base's own is."""

import os
from typing import Any, Final

from transformers.utils.chat_template_utils import render_jinja_template

from manylora.children import Bounds, serve

__all__ = ["MAX_RENDERED_CHARACTERS", "MAX_RENDER_BYTES", "MAX_RENDER_S", "MAX_RENDER_WAIT_S", "main"]

MAX_RENDER_S: Final = 0.5  # of a CPU
MAX_RENDER_BYTES: Final = 268_435_456
MAX_RENDER_WAIT_S: Final = 60  # while other processes have the CPUs
MAX_RENDERED_CHARACTERS: Final = 4_194_304
_BOUNDS: Final = Bounds(MAX_RENDER_S, MAX_RENDER_BYTES, 8 * 2**20, MAX_RENDER_WAIT_S)
_NICENESS: Final = 10  # the engine comes first
_MOST_SAID: Final = 500  # characters of a template's own reason


def rendered(asked: dict[str, Any]) -> dict[str, Any]:
    """The `text` of a chat, or the `fault` of its template."""
    messages = [{name: value for name, value in each.items() if value is not None} for each in asked["messages"]]
    try:
        [text], _ = render_jinja_template(
            [messages],
            asked["tools"],
            asked["documents"],
            asked["template"],
            continue_final_message=asked["continue_final"],
            add_generation_prompt=asked["for_answer"] and not asked["continue_final"],
            **asked["variables"],
        )
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a template is a program, and can fail in any way
        return {"fault": (str(error) or type(error).__name__)[:_MOST_SAID]}
    if len(text) > MAX_RENDERED_CHARACTERS:
        return {"fault": f"it writes {len(text)} characters, and at most {MAX_RENDERED_CHARACTERS} are taken"}
    return {"text": text}


def main() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    serve(rendered, _BOUNDS)


if __name__ == "__main__":
    main()
