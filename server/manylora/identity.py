"""Who an adapter is: its reference, what it may be called, and what its files are called; and who changes it."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, Literal, Self

from manylora.errors import InvalidRequest

PUBLIC_TENANT: Final = "public"  # whose adapters everybody may use
CONFIG_FILE: Final = "adapter_config.json"
TENSOR_FILE: Final = "adapter_model.safetensors"
ADAPTER_FILES: Final = (CONFIG_FILE, TENSOR_FILE)
DEFAULTS_FILE: Final = "manylora.json"
TEMPLATE_FILE: Final = "chat_template.jinja"  # read where the defaults name it
CARD_FILE: Final = "README.md"  # kept with the version and shown
TOKENIZER_FILE: Final = "tokenizer.json"  # of which added tokens are kept
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"  # of which the token is that ends an answer
OWN_TOKENS_FILE: Final = "own_tokens.json"  # what was kept of these two, as downloads have it
TOKENIZER_FILES: Final = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, OWN_TOKENS_FILE)
OPTIONAL_FILES: Final = (DEFAULTS_FILE, TEMPLATE_FILE, CARD_FILE, *TOKENIZER_FILES)
BROUGHT_FILES: Final = (*ADAPTER_FILES, *OPTIONAL_FILES)  # that an upload may have
NAME_PATTERN: Final = r"[a-z0-9][a-z0-9._-]{0,63}"
MAX_MIXED: Final = 8
MAX_MIX_WEIGHT: Final = 4.0
_NAME: Final = re.compile(NAME_PATTERN)
Tier = Literal["device", "host", "disk"]
NEVER: Final = 2**62  # a place behind every token
TIERS: Final[tuple[Tier, ...]] = ("device", "host", "disk")  # from the nearest


@dataclass(frozen=True, slots=True)
class OwnToken:
    """A token of an adapter's tokenizer that the base's has not: its id, its text, and how texts are searched for it.

    The last five are what the `tokenizers` library calls them.
    """

    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Vocabulary:
    """What an adapter's vocabulary is, where it is not the base's.

    `size`: how many tokens there are rows for, None for as many as in the base. `tokens`, by id: those that the base's
    tokenizer has not, or calls something else. `end_id`: that of them which ends an answer, None where none does.
    `text` is all of this as the registry keeps it, by which two are told apart.
    """

    size: int | None
    tokens: tuple[OwnToken, ...]
    end_id: int | None
    text: str

    @classmethod
    def of(cls, size: int | None, tokens: Iterable[OwnToken] = (), end_id: int | None = None) -> Self | None:
        """None where there is nothing that the base has not."""
        kept = tuple(sorted(tokens, key=lambda token: token.id))
        if size is None and not kept:
            return None
        said = {"size": size, "end_id": end_id, "tokens": [asdict(token) for token in kept]}
        return cls(size, kept, end_id, json.dumps(said, ensure_ascii=False, separators=(",", ":")))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Of a text that `of` made; None of an empty one."""
        if not text:
            return None
        said = json.loads(text)
        return cls(said["size"], tuple(OwnToken(**each) for each in said["tokens"]), said["end_id"], text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One version of one adapter.

    `id` is unique for ever: a name uploaded again makes a new version with a new id, so nothing that is
    keyed by the id (slots, prefix-cache hashes, counts) can answer for another version. `num_virtual_tokens`: positions
    that it takes before each prompt. `invocation`: token ids from whose last run in a prompt on it acts; none: it acts
    everywhere. `head`: the task that it has a head of its own for, such as "SEQ_CLS"; empty for none. `vocabulary`: its
    own, None where it is the base's.
    """

    id: str
    tenant: str
    name: str
    version: int
    digest: str
    num_virtual_tokens: int = 0
    invocation: tuple[int, ...] = ()
    head: str = ""
    vocabulary: Vocabulary | None = field(default=None, compare=False, repr=False)

    @property
    def is_alone(self) -> bool:
        """Whether it does more than change what rows of a step come to, so that it cannot be mixed with others."""
        has_own_size = self.vocabulary is not None and self.vocabulary.size is not None
        return bool(self.num_virtual_tokens or self.invocation or has_own_size)

    def acts_from(self, prompt_ids: Sequence[int]) -> int:
        """The place of the first token of a prompt that the adapter acts on, `NEVER` where it is not invoked."""
        return _last_run(self.invocation, prompt_ids) if self.invocation else 0

    @property
    def label(self) -> str:
        """`name@version`, as people write it."""
        return f"{self.name}@{self.version}" if self.version else self.name


@dataclass(frozen=True, slots=True)
class Author:
    """Who changes something, and what they note about it; without a tenant it is the server or its operator."""

    tenant: str | None
    role: str
    key_id: str | None = None
    note: str = ""


SERVER: Final = Author(None, "server")
OPERATOR: Final = Author(None, "command line")


@dataclass(frozen=True, slots=True)
class Mix:
    """The adapters of one request, each with the weight by which what it does is multiplied; none for the bare base.

    A module of the mix is W + the sum of weight * (the adapter's W - W).
    """

    parts: tuple[tuple[AdapterRef, float], ...] = ()
    # What requests are told apart by in every step, so it is made once: `refs`, their `ids`, and a `key` that is equal
    # for the same adapters with the same weights, in whatever order, and for no others.
    refs: tuple[AdapterRef, ...] = field(init=False, repr=False, compare=False)
    ids: tuple[str, ...] = field(init=False, repr=False, compare=False)
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "refs", tuple(ref for ref, _ in self.parts))
        object.__setattr__(self, "ids", tuple(ref.id for ref, _ in self.parts))
        object.__setattr__(self, "key", repr(sorted((ref.id, weight) for ref, weight in self.parts)))

    @classmethod
    def of(cls, adapter: AdapterRef | None) -> Self:
        """One adapter as it is, or none."""
        return cls(() if adapter is None else ((adapter, 1.0),))

    @classmethod
    def weighted(cls, parts: Iterable[tuple[AdapterRef, float]]) -> Self:
        """Different adapters, in the one order in which they are added up. Those with weight 0 do nothing."""
        return cls(tuple(sorted(((ref, weight) for ref, weight in parts if weight), key=lambda part: part[0].id)))

    @property
    def is_plain(self) -> bool:
        """One adapter as it is, or none."""
        return not self.parts or (len(self.parts) == 1 and self.parts[0][1] == 1.0)

    def check(self, num_slots: int) -> None:
        """Raises InvalidRequest for one that has no slots, or whose adapter does more than change rows of a step."""
        if len(self.parts) > num_slots:
            raise InvalidRequest(
                f"The mix has {len(self.parts)} adapters and the server has slots for {num_slots}. Send fewer, or "
                "raise --max-slots.",
                param="adapters",
            )
        alone = next((ref for ref in self.refs if ref.is_alone), None)
        if alone is not None and not self.is_plain:
            raise InvalidRequest(
                f"The adapter '{alone.label}' has virtual tokens or a vocabulary of another size, or is invoked in the "
                "middle of a prompt, which is served alone and with weight 1. Take it out of the mix.",
                param="adapters",
            )

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Of an adapter as it is, its own; None where it is the base's, as that of several adapters is."""
        return self.refs[0].vocabulary if self.is_plain and self.refs else None

    @property
    def end_id(self) -> int | None:
        """Of an adapter's own tokens, the one that ends an answer."""
        own = self.vocabulary
        return None if own is None else own.end_id

    def vocab_size(self, base: int) -> int:
        """Ids below this are tokens; `base` of those are the base's."""
        own = self.vocabulary
        return base if own is None or own.size is None else own.size

    @property
    def num_virtual_tokens(self) -> int:
        """Positions before each prompt."""
        return sum(ref.num_virtual_tokens for ref in self.refs)

    def acts_from(self, prompt_ids: Sequence[int]) -> int:
        """The place of the first token of a prompt that any adapter acts on."""
        return min((ref.acts_from(prompt_ids) for ref in self.refs), default=0)

    @property
    def label(self) -> str:
        """`name@version` of an adapter, `name@version*weight+…` of a mix, `base` of none."""
        if self.is_plain:
            return self.parts[0][0].label if self.parts else "base"
        return "+".join(f"{ref.label}*{weight:g}" for ref, weight in self.parts)

    @property
    def name(self) -> str:
        """What its requests are counted under: `name` of one adapter, `name+name` of several, whatever the weights."""
        return "+".join(sorted(ref.name for ref in self.refs))

    @property
    def is_public(self) -> bool:
        """Whether everybody may use all of it."""
        return all(ref.tenant == PUBLIC_TENANT for ref, _ in self.parts)


def _last_run(wanted: Sequence[int], token_ids: Sequence[int]) -> int:
    """Where the last run of the `wanted` tokens begins, `NEVER` where there is none.

    Looks at each token a bounded number of times, whatever repeats (Knuth, Morris and Pratt, from the end).
    """
    pattern = tuple(reversed(wanted))
    overlaps, matched = [0], 0  # of the first tokens of the pattern, how many of their last are its first, too
    for token in pattern[1:]:
        while matched and token != pattern[matched]:
            matched = overlaps[matched - 1]
        matched += token == pattern[matched]
        overlaps.append(matched)
    matched = 0
    for place in range(len(token_ids) - 1, -1, -1):
        token = token_ids[place]
        while matched and token != pattern[matched]:
            matched = overlaps[matched - 1]
        matched += token == pattern[matched]
        if matched == len(pattern):
            return place
    return NEVER


def check_name(name: str, *, reserved: str) -> None:
    """Raises InvalidRequest. `reserved` is the base model's name, which must go on meaning the base."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "'name' must be 1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit.", param="name"
        )
    if name == reserved:
        raise InvalidRequest(f"'{name}' is the base model's name; give the adapter another one.", param="name")
