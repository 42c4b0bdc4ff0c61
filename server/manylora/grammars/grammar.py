"""What an answer must look like, as a plain value that says nothing of how it is seen to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, Literal, Protocol, TypeAlias

__all__ = ["ANY_OBJECT", "CompiledGrammar", "Grammar", "GrammarKind", "Whitespace"]

MAX_GRAMMAR_BYTES: Final = 262_144
ANY_OBJECT: Final[dict[str, Any]] = {"type": "object"}

GrammarKind: TypeAlias = Literal[
    "json_schema", "regex", "choice", "grammar", "structural_tag", "tool_calls", "after_thoughts"
]

# Some, since models like to indent; not any amount, which a model that has lost its way writes for ever.
_SOME_WHITESPACE: Final = r" |\r?\n[ \t]{0,64}"


@dataclass(frozen=True, slots=True)
class Whitespace:
    """What may stand between the parts of a JSON text: nothing, or what a regular expression says, or some.

    With `separators`, what stands between two items and between a key and its value is given to the letter, as Python's
    `json.dumps` takes it, and nothing stands elsewhere.
    """

    is_none: bool = False
    pattern: str | None = None
    separators: tuple[str, str] | None = None

    def options(self) -> dict[str, Any]:
        """As the library's options for a schema."""
        if self.separators is not None:
            item, key = self.separators
            return {"whitespace_flexible": False, "item_separator": item, "key_separator": key}
        if self.is_none:
            return {"whitespace_flexible": False}
        return {"whitespace_pattern": _SOME_WHITESPACE if self.pattern is None else self.pattern}


@dataclass(frozen=True, slots=True)
class Grammar:
    """`source` is the text that a grammar of this kind is written in; two of the same text are the same grammar."""

    kind: GrammarKind
    source: str

    @classmethod
    def json_schema(
        cls, schema: object, whitespace: Whitespace | None = None, *, is_lenient: bool = False
    ) -> "Grammar":
        """JSON that follows `schema`; `is_lenient`: as far as that can be seen to."""
        return cls("json_schema", _dumped(_with_options(schema, whitespace or Whitespace(), is_lenient)))

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Text that matches `pattern` as a whole."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> "Grammar":
        """One of `choices`, and nothing else."""
        return cls("choice", _dumped(list(dict.fromkeys(choices))))

    @classmethod
    def grammar(cls, text: str) -> "Grammar":
        """Text of a context-free grammar, in Lark's or in GBNF's notation."""
        return cls("grammar", text)

    @classmethod
    def structural_tag(
        cls, structures: Sequence[dict[str, Any]], triggers: Sequence[str], whitespace: Whitespace | None = None
    ) -> "Grammar":
        """Any text in which each trigger begins one of the structures: its `begin`, JSON of its `schema`, its `end`."""
        parts = [
            {**each, "schema": _with_options(each["schema"], whitespace or Whitespace(), False)} for each in structures
        ]
        return cls("structural_tag", _dumped({"structures": parts, "triggers": list(triggers)}))

    @classmethod
    def calls(cls, rules: Sequence[str], marks: Mapping[str, str]) -> "Grammar":
        """Calls of tools, perhaps within text: rules in Lark's notation, which the server has written itself.

        They may name each of `marks`, a text or the token that it is; `to_…` is any text up to it and it; `TEXT` any.
        """
        return cls("tool_calls", _dumped({"rules": list(rules), "marks": dict(marks)}))

    @classmethod
    def after_thoughts(cls, mark: str, answer: "Grammar") -> "Grammar":
        """Any text up to `mark`, which ends what a model thinks, and after it what `answer` says."""
        return cls("after_thoughts", _dumped({"mark": mark, "kind": answer.kind, "source": answer.source}))

    @property
    def num_bytes(self) -> int:
        return len(self.source.encode(errors="surrogatepass"))

    @property
    def key(self) -> bytes:
        """What it is known by."""
        return sha256(f"{self.kind}\0{self.source}".encode(errors="surrogatepass")).digest()


class CompiledGrammar(Protocol):
    """A grammar that sequences can be held to. The engine makes them."""

    @property
    def grammar(self) -> Grammar: ...


def _with_options(schema: object, whitespace: Whitespace, is_lenient: bool) -> object:
    options = {**whitespace.options(), **({"lenient": True} if is_lenient else {})}
    if schema is True:
        schema = {}
    return {**schema, "x-guidance": options} if isinstance(schema, dict) else schema


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))
