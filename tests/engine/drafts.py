"""A drafter that knows the answers, and is wrong as often as it is told to be."""

from dataclasses import dataclass, field
from random import Random

from manylora.engine.sequence import Sequence
from tests.tiny_models import VOCAB_SIZE


@dataclass
class Oracle:
    """Proposes up to `most` tokens of what `answers` has for a request's choice, and goes on behind their end.

    Each token is another one with probability `wrong`, and at the places of `instead` the one that it says; what
    follows is what would follow the right one. `proposed`: how many tokens in all.
    """

    answers: dict[str, list[int]] = field(default_factory=dict)
    most: int = 4
    wrong: float = 0.0
    seed: int = 0
    instead: dict[int, int] = field(default_factory=dict)
    proposed: int = 0
    accepted: int = 0

    def propose(self, seq: Sequence, most: int, num_rows: int) -> list[int]:
        assert num_rows >= 1
        known = self.answers.get(f"{seq.request_id}/{seq.index}")
        if known is None:
            return []
        place = seq.num_output_tokens
        assert seq.tokens[seq.num_prompt_tokens :] == known[:place]
        random = Random(f"{self.seed} {seq.request_id} {place}")
        count = min(self.most, most)
        coming = [*known[place : place + count], *([3] * count)][:count]
        draft = [token if random.random() >= self.wrong else random.randrange(VOCAB_SIZE) for token in coming]
        draft = [self.instead.get(place + i, token) for i, token in enumerate(draft)]
        self.proposed += len(draft)
        return draft

    def learn(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        assert 0 <= num_accepted <= num_drafted <= self.most
        self.accepted += num_accepted

    def keep(self, seq: Sequence) -> None:
        assert seq.is_finished
