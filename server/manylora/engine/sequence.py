"""One choice of one request, from the queue to its last token."""

import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from manylora.engine.detokenizer import Decode, Detokenizer
from manylora.engine.interface import AdapterRef, FinishReason, Mix, SamplingParams, Sound, Task, TokenLogprob
from manylora.engine.pooling import Pool
from manylora.engine.token_rules import Rules
from manylora.grammars.masks import Constraint
from manylora.images.picture import Picture


class SequenceStatus(StrEnum):
    """WAITING → (LOADING_ADAPTER) → RUNNING ⇄ PREEMPTED → FINISHED."""

    WAITING = "waiting"
    LOADING_ADAPTER = "loading_adapter"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers in [0, 1) for a sequence's output tokens, from the one of number `first` on."""

    first: int
    numbers: list[float]


class Listener(Protocol):
    """Who is told what becomes of a sequence."""

    def put(self, item: Any) -> None:
        """Hear of an output or of an error that ended it. On the event loop's thread."""
        ...


class Sequence:
    """Tokens, their place in the cache, and what became of them.

    `tokens` holds the prompt and then the output. The keys and values of the first `num_computed` tokens are
    in `block_table`'s blocks, behind those of its adapter's `num_virtual` tokens; the rest is still to run. With less
    than 0, so many of the virtual ones are still to come, too: places count from the prompt's first token. `mix`: which
    adapters it has; `slots`: theirs, none while it does not run.
    With a `cache_salt` the cached prefixes it may use are those of all who send the same one, not its tenant's.
    Among its tenant's sequences those with the lowest `priority` come first.
    `followers` are the request's other choices: they wait until this one's prompt is in the cache. `acts_from`: the
    place of the first token that the mix acts on, as it says of the prompt; handed in where it was asked already.
    """

    sound: Sound | None = None  # what it writes down
    picture: Picture | None = None  # what it sees
    state_slot = -1  # where layers keep a state of it, while it has blocks
    begins_with = -1  # the room of the copy of a state that it begins with, until it has run
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    load_started_s: float | None = None
    load_ended_s: float | None = None

    def __init__(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        index: int = 0,
        adapter: AdapterRef | Mix | None = None,
        tenant: str = "public",
        weight: float = 1.0,
        capture_logits: bool = False,
        cache_salt: str | None = None,
        priority: int = 0,
        acts_from: int | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.tokens = prompt_ids
        self.num_prompt_tokens = len(prompt_ids)
        self.params = params
        self.task: Task = params.task
        self.mix = adapter if isinstance(adapter, Mix) else Mix.of(adapter)
        self.num_virtual = self.mix.num_virtual_tokens  # before its tokens
        self.acts_from = self.mix.acts_from(prompt_ids) if acts_from is None else acts_from  # the base does before
        self.tenant, self.weight, self.priority = tenant, weight, priority
        self.capture_logits = capture_logits
        # None of the prompt may come from the cache, since the logits of all of it are asked for.
        self.wants_prompt_logits = capture_logits or params.prompt_logprobs is not None
        self.cache_salt = cache_salt
        self.decode = decode  # where the adapter has tokens that the base's tokenizer has not
        self.end_id = self.mix.end_id
        self.seed = params.seed if params.seed is not None else secrets.randbits(63)
        self.status = SequenceStatus.WAITING
        self.is_counted = False  # among its tenant's, from the time it is added until it has finished
        self.finish_reason: FinishReason | None = None
        self.slots: tuple[int, ...] = ()
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.snapshots: dict[int, int | None] = {}  # places at which its state is to be copied, and the rooms for it
        self.num_computed = -self.num_virtual
        self.num_cached_tokens = self.num_charged = 0
        self.max_num_tokens = len(prompt_ids) + params.max_tokens  # at which it ends, prompt included
        self.num_passed_over = 0  # plans in which it could not go on since its adapter had no slot, while it waits
        self.granted_plan: int | None = None  # the plan that made an adapter yield to it, while it waits
        self.started_plan = 0  # the plan since which it runs
        self.output_counts: Counter[int] = Counter()
        self.bias: tuple[Any, Any] | None = None  # token ids and numbers of `logit_bias` as arrays, once needed
        self.draws: Draws | None = None
        self.detokenizer: Detokenizer | None = None  # from the time it is added until it has finished
        self.constraint: Constraint | None = None  # the same, where it is held to a grammar
        self.rules: Rules | None = None  # the same, where its request rules tokens out
        self.drafting: Any = None  # what the drafter knows of it
        self.prompt_logprobs: list[TokenLogprob] = []
        self.captured: list[Any] = []  # logits of the prompt's chunks so far, where they are asked for
        self.pool: Pool | None = None  # of the prompt's tokens so far, where they are pooled
        self.followers: list[Sequence] = []
        self.listener: Listener | None = None  # while somebody wants to hear of it; the event loop's
        self.arrived_s = time.monotonic()

    @property
    def num_encoded(self) -> int:
        """Positions of sound that run when it begins."""
        return 0 if self.sound is None else self.sound.num_positions

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens, virtual ones included, that must run before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def is_prefilled(self) -> bool:
        """The whole prompt is in the cache, so the request's other choices can share it."""
        return self.num_computed >= self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def scores_prompt(self) -> bool:
        """What runs of it next are prompt tokens whose logits are all wanted."""
        return self.wants_prompt_logits and not self.num_output_tokens

    @property
    def needs_whole_prompt(self) -> bool:
        """Nothing of its prompt may come from the cache: something is wanted of every token."""
        return self.scores_prompt or self.params.pooling == "mean"

    @property
    def has_penalties(self) -> bool:
        p = self.params
        return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0)

    def append(self, token_id: int) -> None:
        self.tokens.append(token_id)
        if self.has_penalties:
            self.output_counts[token_id] += 1


@dataclass(slots=True, eq=False)
class Scheduled:
    """`num_tokens` tokens of a sequence from place `start` on, in this step, and behind its last one a `draft`.

    Of a start before 0 the first `num_virtual` are virtual ones, which are no rows of the step: they are brought into
    the cache before it, `num_copied` of them from where they are kept.
    The draft's tokens are not the sequence's yet: they are run as if they were, and those that come out as it says are
    taken with the one behind them. Besides, as the sequence is when it is planned: `num_rows` tokens are run, the
    draft's included, and the logits of the last `num_logits` are wanted, or the hidden states of the last `num_hidden`;
    whether the step runs the sequence's own last
    token, whether its next one is then sampled, and whether logits are wanted for what they say of the prompt.
    """

    seq: Sequence
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()
    num_copied: int = 0
    num_virtual: int = field(init=False)
    num_rows: int = field(init=False)
    num_logits: int = field(init=False)
    num_hidden: int = field(init=False)
    reaches_end: bool = field(init=False)
    samples: bool = field(init=False)
    is_scored: bool = field(init=False)

    def __post_init__(self) -> None:
        seq, num_drafted = self.seq, len(self.draft)
        self.num_virtual = min(-self.start, self.num_tokens) if self.start < 0 else 0
        num_run = self.num_tokens - self.num_virtual
        self.num_rows = num_run + num_drafted
        self.reaches_end = self.start + self.num_tokens == seq.num_tokens
        self.samples = self.reaches_end and seq.task is Task.GENERATE
        self.num_hidden = 0
        if seq.task is Task.POOL:
            self.is_scored, self.num_logits = False, 0
            self.num_hidden = num_run if seq.needs_whole_prompt else int(self.reaches_end)
            return
        self.is_scored = (seq.scores_prompt and num_run > 0) or (self.reaches_end and not self.samples)
        if seq.scores_prompt:
            self.num_logits = num_run
        else:
            self.num_logits = 1 + num_drafted if self.reaches_end else 0

    @property
    def first(self) -> int:
        """The place of its first token that is not virtual."""
        return self.start + self.num_virtual

    @property
    def begins(self) -> bool:
        """Whether the step runs the sequence's first token."""
        return self.start <= 0 < self.start + self.num_tokens


@dataclass(slots=True)
class Plan:
    """One step's work, sequences with one token to run first. `num_tokens`: of all of them, drafts included.

    `effort` is what prompts take in it (`Room`), where few streams wait for it.
    """

    scheduled: list[Scheduled] = field(default_factory=list)
    num_tokens: int = 0
    effort: float | None = None
