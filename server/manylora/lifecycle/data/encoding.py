"""From examples to token ids, split the way the server will see them: the prompt, then the answer.

The prompt's ids are exactly what the server builds for the same request (chat template with the generation
prompt, or the plain text), so nothing is learnt that a request does not reproduce.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from manylora.chat.format import ChatOptions
from manylora.lifecycle.data.data import Dataset, Example, Message
from manylora.lifecycle.parameters import InvalidParameter, Render
from manylora.lifecycle.progress import Listener, Progress
from manylora.models.chat_template import ChatTemplate


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as ids. `is_answer[i]` says that token i is to be predicted (counted in the loss).

    `rejected` is the same prompt with the answer that the wanted one is preferred to, of preferences.
    """

    example: Example
    ids: tuple[int, ...]
    is_answer: tuple[bool, ...]
    num_cut: int = 0  # prompt tokens dropped from the left to fit
    rejected: "Encoded | None" = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Of all that a training runs for it."""
        return len(self) + (0 if self.rejected is None else len(self.rejected))

    @property
    def first_answer(self) -> int:
        return self.is_answer.index(True)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What precedes the last answer: the prompt of a generation."""
        last_prompt_token = max((i for i, is_answer in enumerate(self.is_answer) if not is_answer), default=-1)
        return self.ids[: last_prompt_token + 1]

    @property
    def num_answer_tokens(self) -> int:
        return sum(self.is_answer)


class Encoder:
    """Encodes examples for one tokenizer.

    `render="auto"` uses the chat template where the tokenizer has one. `instruction` goes before every
    first user message, on a line of its own. `tool_prompt` tells a base whose template knows no tools of them in words.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        render: Render = "auto",
        instruction: str = "",
        max_length: int,
        tool_prompt: bool = False,
    ) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if render == "chat" and not has_template:
            raise InvalidParameter("This base model has no chat template: use `render` plain.")
        self.is_chat = has_template if render == "auto" else render == "chat"
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, with_tool_prompt=tool_prompt)
        self._instruction = instruction

    def encode(self, dataset: Dataset, *, context_length: int) -> list[Encoded]:
        """Encode all examples, cutting prompts from the left to `max_length`.

        Raises InvalidRequest naming the rows that the model cannot hold at all: longer than
        `context_length`, or an answer longer than `max_length`.
        """
        encoded, too_long = [], []
        self._check_tools(dataset)
        for example in dataset.examples:
            sides = [self._encode(example)]
            if example.rejected is not None:
                sides.append(self._encode(replace(example, messages=(*example.prompt, example.rejected))))
            longest = max(sides, key=len)
            if len(longest) > context_length:
                too_long.append(f"row {example.row} has {len(longest)} tokens")
            elif len(longest) - longest.first_answer >= self.max_length:
                too_long.append(f"row {example.row}'s answer does not fit {self.max_length} tokens")
            else:
                excess = max(0, len(longest) - self.max_length)  # both keep the same prompt
                one, *rejected = (_without(side, excess) for side in sides)
                encoded.append(replace(one, rejected=rejected[0]) if rejected else one)
        if too_long:
            more = f" and {len(too_long) - 5} more rows" if len(too_long) > 5 else ""
            raise InvalidParameter(
                f"{dataset.path.name}: longer than the model can hold ({context_length} tokens, "
                f"`max_length` {self.max_length}): {', '.join(too_long[:5])}{more}. Shorten or drop them."
            )
        return encoded

    def _check_tools(self, dataset: Dataset) -> None:
        first = next((example.row for example in dataset.examples if example.has_tools), None)
        if first is None:
            return
        if not self.is_chat:
            raise InvalidParameter(
                f"{dataset.path.name}: row {first} has tools, for which `render` plain has no place."
            )
        if not self._template.format(None).takes_tools:
            raise InvalidParameter(
                f"{dataset.path.name}: row {first} has tools, and this base's chat template knows none. Give "
                "`tool_prompt` to have the base told of them in words, as a server does that is started with it."
            )

    def request(self, prompt: Sequence[Message]) -> str | tuple[Message, ...]:
        """What a client sends for this prompt: the text of a completion, or the messages of a chat."""
        return self._instructed(prompt) if self.is_chat else self._plain(prompt)

    def num_prompt_tokens(self, prompt: Sequence[Message]) -> int:
        if not self.is_chat:
            return len(self._ids(self._plain(prompt), special=True))
        return len(self._ids(self._chat(self._instructed(prompt), (), for_answer=True), special=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode(self, example: Example) -> Encoded:
        ids: list[int] = []
        is_answer: list[bool] = []
        pieces = list(self._pieces(example))
        for number, (text, learn) in enumerate(pieces, start=1):
            piece = self._ids(text, special=not ids and not self.is_chat)
            is_last = number == len(pieces)
            learnt = self._until_end(piece, is_last=is_last) if learn else []
            if is_last:
                piece = learnt
            ids += [*learnt, *piece[len(learnt) :]]
            is_answer += [True] * len(learnt) + [False] * (len(piece) - len(learnt))
        return Encoded(example, tuple(ids), tuple(is_answer))

    def _pieces(self, example: Example) -> Iterator[tuple[str, bool]]:
        """The text in order, as (text, is an answer to learn)."""
        if not self.is_chat:
            yield self._plain(example.prompt), False
            yield example.answer, True
            return
        messages = self._instructed(example.messages)
        tools = json.loads(example.tools or "[]")
        done = ""
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._chat(messages[:index], tools, for_answer=True)
            after = self._chat(messages[: index + 1], tools, for_answer=False)
            if not before.startswith(done) or not after.startswith(before):
                raise InvalidParameter(
                    f"row {example.row}: the chat template rewrites earlier turns, so this chat cannot be "
                    "learnt turn by turn. Use `render` plain, or one question and one answer per row."
                )
            yield before[len(done) :], False
            yield after[len(before) :], message.is_learnt
            done = after

    def _plain(self, messages: Sequence[Message]) -> str:
        text = "\n".join(m.content for m in messages)
        return f"{self._instruction}\n{text}" if self._instruction else text

    def _instructed(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if not self._instruction:
            return tuple(messages)
        out = list(messages)
        first = next((i for i, m in enumerate(out) if m.role == "user"), None)
        if first is not None:
            out[first] = replace(out[first], content=f"{self._instruction}\n{out[first].content}")
        return tuple(out)

    def _chat(self, messages: Sequence[Message], tools: Sequence[Any], *, for_answer: bool) -> str:
        turns = [message.for_template() for message in messages]
        return self._template.render(turns, ChatOptions(tools=tools, for_answer=for_answer))

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _until_end(self, ids: list[int], *, is_last: bool) -> list[int]:
        """An answer ends with the end-of-text token: what a template adds after it is not learnt.

        The last one has it in any case; those before it are as a server renders them.
        """
        end = self._tokenizer.eos_token_id
        if end in ids:
            return ids[: ids.index(end) + 1]
        return [*ids, end] if is_last else ids


def _without(one: Encoded, excess: int) -> Encoded:
    return Encoded(one.example, one.ids[excess:], one.is_answer[excess:], excess) if excess else one


@dataclass(frozen=True, slots=True)
class LengthStatistics:
    """Lengths in tokens, of whole examples and of answers."""

    num_examples: int
    num_tokens: int
    median: int
    p95: int
    longest: int
    longest_row: int
    answer_median: int
    answer_longest: int
    num_truncated: int


def length_statistics(encoded: Sequence[Encoded]) -> LengthStatistics:
    lengths = np.array([len(e) for e in encoded])
    answers = np.array([e.num_answer_tokens for e in encoded])
    return LengthStatistics(
        num_examples=len(encoded),
        num_tokens=sum(e.num_tokens for e in encoded),
        median=int(np.median(lengths)),
        p95=int(np.percentile(lengths, 95)),
        longest=int(lengths.max()),
        longest_row=encoded[int(lengths.argmax())].example.row,
        answer_median=int(np.median(answers)),
        answer_longest=int(answers.max()),
        num_truncated=sum(e.num_cut > 0 for e in encoded),
    )


def tell_lengths(flag: str, encoded: Sequence[Encoded], listen: Listener, more: str = "") -> None:
    """Say how long the examples of one file are, and warn of those that were cut."""
    found = length_statistics(encoded)
    message = (
        f"{flag}: {found.num_examples} examples, {found.num_tokens} tokens; lengths: median {found.median}, "
        f"95% {found.p95}, longest {found.longest} (row {found.longest_row}); answers: median {found.answer_median}, "
        f"longest {found.answer_longest}{more}"
    )
    listen(Progress("data", message=message))
    cut = [e for e in encoded if e.num_cut]
    if cut:
        rows = ", ".join(str(e.example.row) for e in cut[:5])
        worst = max(e.num_cut for e in cut)
        listen(
            Progress(
                "warning",
                message=f"{flag}: {len(cut)} prompts lose up to {worst} tokens on the left to fit `max_length` "
                f"(rows {rows}{', …' if len(cut) > 5 else ''}).",
            )
        )
