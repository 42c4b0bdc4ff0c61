"""Chat templates that the operator did not choose: those of adapters and, where it is allowed, of requests.

A template is a program. One of a stranger can run for ever or ask for all memory, so that it is rendered in a process
that can be spared (`render_process`), with bounds on both.
"""

from queue import LifoQueue
from typing import Any, Final

from manylora.chat.format import ChatOptions
from manylora.children import Helper
from manylora.errors import InvalidRequest, quoted

__all__ = ["NUM_RENDERERS", "StrangersTemplates"]

NUM_RENDERERS: Final = 2
_MODULE: Final = "manylora.chat.render_process"


class StrangersTemplates:
    """Renders them, as many at a time as there are processes, which start when they are first needed. Any thread."""

    def __init__(self) -> None:
        self._idle = _helpers()

    def render(self, messages: list[dict[str, Any]], options: ChatOptions, special_tokens: dict[str, Any]) -> str:
        """The text of a chat with `options.template`. Raises InvalidRequest where that fails, or Unavailable."""
        idle = self._idle
        helper = idle.get()
        try:
            found = helper.ask(
                {
                    "template": options.template,
                    "messages": messages,
                    "tools": list(options.tools) or None,
                    "documents": list(options.documents) or None,
                    "variables": {**special_tokens, **options.variables},
                    "for_answer": options.for_answer,
                    "continue_final": options.continue_final,
                }
            )
        finally:
            if idle is not self._idle:  # it was closed meanwhile
                helper.end()
            idle.put(helper)
        if "text" in found:
            return str(found["text"])
        ended = found.get("ended")
        reason = quoted(found["fault"]) if ended is None else f"it takes too much {ended} here"
        raise InvalidRequest(f"The chat template fails on these messages: {reason}", param="messages")

    def close(self) -> None:
        """End the processes. One that is needed after that starts anew."""
        before, self._idle = self._idle, _helpers()
        for helper in list(before.queue):
            helper.close()
            helper.end()


def _helpers() -> "LifoQueue[Helper]":
    """The processes that render templates; those that have run before come first."""
    idle: LifoQueue[Helper] = LifoQueue()
    for _ in range(NUM_RENDERERS):
        idle.put(Helper(_MODULE))
    return idle
