"""Bodies that hold texts against texts, and pairs of texts as prompts."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Final

from manylora.api.inputs import ReadRequest
from manylora.api.lanes import INLINE_CHARACTERS, beside_loop, text_lane
from manylora.api.room import PromptEngine, room_for_answer, too_long
from manylora.api.sampling import check_token_ids
from manylora.api.schemas import Prompt
from manylora.engine.interface import EncodedPair
from manylora.errors import InvalidRequest

__all__ = ["PairsRequest", "encoded_pairs"]

MAX_PAIRED_CHARACTERS: Final = 8_388_608
# Encodings take a hundred bytes for a character, so that many pairs are encoded some at a time.
_BATCH_CHARACTERS: Final = 2**20


class PairsRequest(ReadRequest):
    """A body whose first texts are held against its second ones.

    `first_field` and `prompt_field` name the fields of the first and second ones. `pair_task` is the task of heads
    that read such pairs. Where nothing reads them, a body's `prompts` are all first texts and, behind them, all
    second ones; one that `needs_head` is refused. `has_types`: whether a model is told which tokens are the second
    text's.
    """

    first_field: ClassVar[str] = "query"
    pair_task: ClassVar[str] = "SEQ_CLS"
    needs_head: ClassVar[bool] = False
    has_types: ClassVar[bool] = True

    @property
    def firsts(self) -> list[str]:
        """One text, or as many as there are second ones."""
        raise NotImplementedError

    @property
    def seconds(self) -> list[str]:
        """At least one text."""
        raise NotImplementedError

    @property
    def prompts(self) -> list[Prompt]:
        return [*self.firsts, *self.seconds]

    def field_of(self, number: int) -> str:
        return self.first_field if number < len(self.firsts) else self.prompt_field

    @property
    def num_pairs(self) -> int:
        return len(self.seconds)

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        firsts = self.firsts * len(self.seconds) if len(self.firsts) == 1 else self.firsts
        yield from zip(firsts, self.seconds, strict=True)


async def encoded_pairs(body: PairsRequest, head: str, engine: PromptEngine) -> list[EncodedPair]:
    """Each pair as a prompt for an adapter with a head of that task. Raises InvalidRequest."""
    if head != body.pair_task:
        found = f"What the request names has a head for {head}" if head else "What the request names has no head"
        raise InvalidRequest(
            f"{found}, and this route asks one for {body.pair_task}. Name another adapter.", param="model"
        )
    name = body.prompt_field
    for number, text in enumerate(body.prompts):
        if not text:
            empty = body.field_of(number)
            raise InvalidRequest(f"'{empty}' has an empty text. Send at least one character.", param=empty)
    size = sum(len(first) + len(second) for first, second in body.pairs)
    if size > MAX_PAIRED_CHARACTERS:
        raise InvalidRequest(
            f"The pairs have {size} characters, the first text counted with each second one; at most "
            f"{MAX_PAIRED_CHARACTERS} are read. Send fewer or shorter ones.",
            param=name,
        )
    if size <= INLINE_CHARACTERS:
        return _encoded(body, engine)
    return await beside_loop(text_lane(size), _encoded, body, engine)


def _encoded(body: PairsRequest, engine: PromptEngine) -> list[EncodedPair]:
    encode = engine.codec.encode_pairs
    return [
        _fitted(pair, body, engine)
        for batch in _batches(list(body.pairs))
        for pair in encode(batch, add_special_tokens=body.has_special_tokens)
    ]


def _batches(pairs: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for pair in pairs:
        length = len(pair[0]) + len(pair[1])
        if batch and size + length > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(pair)
        size += length
    yield batch


def _fitted(pair: EncodedPair, body: PairsRequest, engine: PromptEngine) -> EncodedPair:
    """The pair if the model has a row for each token and room for them, its second text cut where the body says so."""
    most = body.truncate_prompt_tokens
    if most is not None:
        kept = pair.cut(engine.model.most_prompt_tokens if most == -1 else most)
        if not kept.second and pair.second:
            raise too_long(body, f"{len(kept.ids)} without any of the second text", engine.model)
        pair = kept
    # What is looked for in the second text may not be there, which the special tokens stand for.
    if not pair.ids or (body.needs_head and not pair.second and not body.has_special_tokens):
        raise InvalidRequest(
            f"'{body.prompt_field}' has a text without tokens for this model.", param=body.prompt_field
        )
    room_for_answer(body, len(pair.ids), engine.model)
    check_token_ids(list(pair.ids), engine.model, body.prompt_field)
    return pair
