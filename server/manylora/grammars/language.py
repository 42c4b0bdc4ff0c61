"""A grammar in the notation of the library that follows it, and a first look at whether it can be followed.

Everything here works on what a stranger wrote: it runs in a process that may be ended (`trial`), and only what went
well there is done again in the server's own.
"""

import json
import time
from typing import Any, Final

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from manylora.grammars.grammar import GrammarKind

__all__ = ["LIMITS", "in_library_notation", "mask_words", "new_matcher", "try_out"]

# Beyond these a grammar is given up. Items are of the parser, states and fuel of the lexer; fuel is spent at some ten
# thousand a millisecond.
LIMITS: Final = llguidance.LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=32_768,
    max_grammar_size=500_000,
    verbose_errors=False,
)
MAX_LOOK_S: Final = 0.1  # of a CPU; other answers that are held to a grammar wait for it
_TRIED_TOKENS: Final = 8


def in_library_notation(kind: GrammarKind, source: str, tokenizer: llguidance.LLTokenizer) -> str:
    """`source` as the library reads it. Raises ValueError for what cannot be written there."""
    if kind == "json_schema":
        return f'{{"grammars":[{{"json_schema":{source}}}]}}'
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(source)
    if kind == "choice":
        # One terminal and not a rule of alternatives, so that thousands of them are one walk through a trie.
        return _lark("start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in json.loads(source)))
    if kind == "grammar":
        return _lark(any_to_lark(source))
    if kind == "tool_calls":
        return _lark(_calls(json.loads(source), tokenizer))
    if kind == "after_thoughts":
        return _after_thoughts(json.loads(source), tokenizer)
    return _lark(_tags(json.loads(source), tokenizer))


def _lark(text: str) -> str:
    return llguidance.LLMatcher.grammar_from_lark(text)


def _tags(described: dict[str, Any], tokenizer: llguidance.LLTokenizer) -> str:
    """Any text, in which a trigger is the beginning of one of the structures."""
    lines = []
    for number, each in enumerate(described["structures"]):
        trigger = next((t for t in described["triggers"] if each["begin"].startswith(t)), None)
        if trigger is None:
            raise ValueError(f"'{each['begin'][:100]}' begins with none of the triggers")
        rest = f"{_literal(each['begin'][len(trigger) :])} %json {json.dumps(each['schema'])} {_literal(each['end'])}"
        token = _special_token(trigger, tokenizer)
        if token is not None:
            lines.append(f"tag_{number}: TEXT <[{token}]> {rest}")
        else:
            lines += [f"start_{number}[lazy]: TEXT {_literal(trigger)}", f"tag_{number}: start_{number} {rest}"]
    names = " | ".join(f"tag_{number}" for number in range(len(described["structures"])))
    return "\n".join([f"start: ({names})* end", "end: TEXT", r"TEXT: /(.|\n)*/", *lines])


def _after_thoughts(described: dict[str, Any], tokenizer: llguidance.LLTokenizer) -> str:
    """Two grammars, of which the first, free text up to the mark, goes over into the second."""
    answer = in_library_notation(described["kind"], described["source"], tokenizer)
    inner = json.loads(answer)["grammars"][0] if answer.startswith("{") else {"lark_grammar": answer}
    rules = ["start: to_end SPACE @answer", r"SPACE: /[ \t\r\n]{0,8}/"]
    before = _calls({"rules": rules, "marks": {"end": described["mark"]}}, tokenizer)
    return json.dumps({"grammars": [{"lark_grammar": before}, {**inner, "name": "answer"}]})


def _calls(described: dict[str, Any], tokenizer: llguidance.LLTokenizer) -> str:
    lines = [*described["rules"], r"TEXT: /(.|\n)*/"]
    for name, text in described["marks"].items():
        token = _special_token(text, tokenizer)
        if token is None:
            lines += [f"{name}: {_literal(text)}", f"to_{name}[lazy]: TEXT {_literal(text)}"]
        else:
            lines += [f"{name}: <[{token}]>", f"to_{name}: TEXT <[{token}]>"]
    return "\n".join(lines)


def _special_token(text: str, tokenizer: llguidance.LLTokenizer) -> int | None:
    """The token that is no text to the library, if the text is one."""
    tokens = tokenizer.tokenize_str(text, parse_special=True)
    return tokens[0] if len(tokens) == 1 and tokenizer.is_special_token(tokens[0]) else None


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""


def new_matcher(tokenizer: llguidance.LLTokenizer, text: str) -> llguidance.LLMatcher:
    """A matcher at the beginning of an answer; what is wrong with it is in its `get_error`."""
    return llguidance.LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)


def mask_words(tokenizer: llguidance.LLTokenizer) -> int:
    """Words of 32 bits that a mask of this vocabulary takes."""
    return (int(tokenizer.vocab_size) + 31) // 32


def try_out(tokenizer: llguidance.LLTokenizer, text: str) -> str:
    """What goes wrong when a grammar is made and followed for a few tokens; nothing where that goes well."""
    matcher = new_matcher(tokenizer, text)
    words = np.zeros(mask_words(tokenizer), np.uint32)
    for step in range(_TRIED_TOKENS):
        if matcher.is_error() or matcher.is_stopped():
            break
        began = time.thread_time()
        forced = matcher.compute_ff_tokens()
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if time.thread_time() - began > MAX_LOOK_S:
            return f"too complex: what may come next takes more than {MAX_LOOK_S:g} s to find out"
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        if forced:
            matcher.consume_tokens(forced)
        elif not matcher.is_error() and allowed.size:
            matcher.consume_token(int(allowed[step * 7919 % allowed.size]))
    return str(matcher.get_error())
