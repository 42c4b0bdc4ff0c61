"""`manylora ask`: a question to an adapter, or to several side by side, or a conversation in a terminal.

The server is `MANYLORA_URL`, the key `MANYLORA_KEY`; see `cli.answers` for the exit codes.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import typer

from manylora.cli.answers import USAGE, Remote, complaints, console, fail, print_json, server, write_text

__all__ = ["register"]

_BASE: Final = "base"
Message = dict[str, str]


def register(program: typer.Typer) -> None:
    """Add `ask` to the program."""
    program.command()(ask)


@dataclass
class _Asked:
    """How all questions of one command are asked."""

    fields: dict[str, Any]
    is_raw: bool  # a text to go on with instead of a chat
    history: list[Message] = field(default_factory=list)

    def body(self, model: str, question: str) -> tuple[str, dict[str, Any]]:
        """The route, and what it is sent."""
        common = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **self.fields}
        if self.is_raw:
            return "/v1/completions", {**common, "prompt": question}
        return "/v1/chat/completions", {**common, "messages": [*self.history, _message("user", question)]}


def ask(
    name: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="An adapter; `base` is the base model.")],
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="Without it: standard input, or in a terminal a conversation."),
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="NAME[@VERSION]", help="Ask this one too; may be given again.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the question.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Text to go on with, instead of a chat.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="At most so many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0: always the likeliest token.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same answer again where chance decides.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts.")] = False,
) -> None:
    """Ask an adapter, and see its answer as it is written.

    Asks the server at MANYLORA_URL with the key in MANYLORA_KEY.
    """
    if raw and system is not None:
        fail("Ask with --system or with --raw: text to go on with has no system message.", USAGE)
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    asked = _Asked({k: v for k, v in given.items() if v is not None}, raw)
    if system is not None:
        asked.history.append(_message("system", system))
    names = [name, *(compare or ())]
    with server(as_json=as_json) as remote:
        models = [_model_of(remote, each) for each in names]
        if question is None and sys.stdin.isatty():
            if compare or raw or as_json:
                fail("A conversation is with one adapter and without --raw and --json; give a question.", USAGE)
            _converse(remote, models[0], asked)
            return
        text = sys.stdin.read() if question is None else question
        if not text.strip():
            fail("There is no question: give it behind the name, or on standard input.", USAGE)
        if as_json:
            print_json([_whole(remote, model, asked, text) for model in models])
            return
        for number, (each, model) in enumerate(zip(names, models, strict=True)):
            if len(names) > 1:
                console.print(("\n" if number else "") + f"{each}:", style="bold", markup=False)
            _show(remote, model, asked, text)


def _model_of(remote: Remote, name: str) -> str:
    if name != _BASE:
        return name
    return str(remote.call("GET", "/v1/models", params={"limit": "1"})["data"][0]["id"])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _converse(remote: Remote, model: str, asked: _Asked) -> None:
    complaints.print("An empty line or Ctrl-D ends; Ctrl-C stops an answer.", style="dim")
    while True:
        try:
            question = console.input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        try:
            answer = _show(remote, model, asked, question)
        except KeyboardInterrupt:
            console.print()  # the server has seen that nobody listens, and the question counts as not asked
            continue
        asked.history += [_message("user", question), _message("assistant", answer)]


def _show(remote: Remote, model: str, asked: _Asked, question: str) -> str:
    """Print an answer as it comes, and to a person what it took; the answer."""
    began = time.monotonic()
    texts: list[str] = []
    last: dict[str, Any] = {}
    first_s = 0.0
    for last in remote.events(*asked.body(model, question)):
        for text in _texts(last):
            first_s = first_s or time.monotonic() - began
            texts.append(text)
            write_text(text)
    sys.stdout.write("\n")
    if sys.stderr.isatty():
        complaints.print(_figures(last, first_s, time.monotonic() - began), style="dim", markup=False)
    return "".join(texts)


def _texts(event: dict[str, Any]) -> Iterator[str]:
    for choice in event["choices"]:
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        if text:
            yield text


def _figures(last: dict[str, Any], first_s: float, whole_s: float) -> str:
    adapter, num_tokens = last["manylora"]["adapter"], last["usage"]["completion_tokens"]
    who = _BASE if adapter is None else f"{adapter['name']}@{adapter['version']}"
    each_ms = (whole_s - first_s) * 1e3 / max(1, num_tokens - 1)
    return f"[{who}: {num_tokens} tokens, the first after {first_s * 1e3:.0f} ms, then {each_ms:.1f} ms each]"


def _whole(remote: Remote, model: str, asked: _Asked, question: str) -> dict[str, Any]:
    """The answer with what the server says of it."""
    texts: list[str] = []
    last: dict[str, Any] = {}
    reason = None
    for last in remote.events(*asked.body(model, question)):
        texts += _texts(last)
        reason = next((c["finish_reason"] for c in last["choices"] if c["finish_reason"]), reason)
    said = {"answer": "".join(texts), "finish_reason": reason, "usage": last["usage"]}
    return {"model": model, **said, "adapter": last["manylora"]["adapter"]}
