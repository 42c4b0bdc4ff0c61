"""The workloads that servers are compared on: adapters, concurrency, prompt length, ranks, popularity.

Which adapter a request names and how long it is are drawn by `manylora_loadtest.popularity` and
`manylora_loadtest.lengths`; here are only the combinations.
"""

from collections.abc import Iterator
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from manylora_loadtest.arrivals import Arrival
from manylora_loadtest.lengths import Length
from manylora_loadtest.popularity import Popularity
from manylora_loadtest.scenario import AdapterMix, RequestMix, Scenario

__all__ = ["FLEET_SIZE", "MIXED_RANKS", "PROMPT_TOKENS", "Workload", "comparison", "standard"]

FLEET_SIZE: Final = 32
MIXED_RANKS: Final = (8, 16, 32, 64)
PROMPT_TOKENS: Final = {"short": 32, "standard": 128, "long": 512}
OUTPUT_TOKENS: Final = 64
EQUAL_PATTERN: Final = "a{:03d}"  # rank 16 each
MIXED_PATTERN: Final = "m{:03d}"  # ranks in turn


class Workload(BaseModel):
    """One cell of a comparison: so many requests at a time over so many adapters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapters: int
    concurrency: int
    prompt: Literal["short", "standard", "long"] = "standard"
    ranks: Literal["equal", "mixed"] = "equal"
    popularity: Popularity = Popularity(kind="round_robin")

    @property
    def name(self) -> str:
        who = "base" if not self.adapters else f"{self.adapters} adapter{'s' if self.adapters > 1 else ''}"
        extra = [f"{self.prompt} prompts"] if self.prompt != "standard" else []
        extra += ["mixed ranks"] if self.ranks == "mixed" else []
        extra += [self.popularity.kind] if self.popularity.kind != "round_robin" else []
        return ", ".join([who, f"c={self.concurrency}", *extra])

    def scenario(self, base: str, *, scale: float, seed: int) -> Scenario:
        """The workload as a closed-loop scenario; `scale` multiplies the number of requests."""
        least = 4 if self.concurrency == 1 else 2 * self.concurrency
        pattern = MIXED_PATTERN if self.ranks == "mixed" else EQUAL_PATTERN
        mix = AdapterMix(pattern=pattern, count=self.adapters) if self.adapters else AdapterMix()
        return Scenario(
            name=self.name,
            base=base,
            seed=seed,
            arrival=Arrival(
                process="closed", concurrency=(self.concurrency,), requests=max(self.concurrency, round(least * scale))
            ),
            adapters=mix.model_copy(update={"popularity": self.popularity}),
            requests=RequestMix(
                prompt_tokens=Length(value=PROMPT_TOKENS[self.prompt]),
                output_tokens=Length(value=OUTPUT_TOKENS),
                timeout_s=1800,
            ),
        )


def standard() -> Workload:
    """The standard workload: 32 adapters in turn, 32 requests at a time, 128 tokens in and 64 out."""
    return Workload(adapters=FLEET_SIZE, concurrency=32)


def comparison(
    adapters: tuple[int, ...] = (0, 1, 8, 32), concurrency: tuple[int, ...] = (1, 8, 32), *, variations: bool = True
) -> Iterator[Workload]:
    """Every number of adapters with every concurrency, then `variations` of one thing of the standard workload."""
    for num_adapters in adapters:
        for clients in concurrency:
            yield Workload(adapters=num_adapters, concurrency=clients)
    if not variations:
        return
    most, clients = max(adapters), max(concurrency)
    yield Workload(adapters=most, concurrency=clients, prompt="short")
    yield Workload(adapters=most, concurrency=clients, prompt="long")
    if most:
        yield Workload(adapters=most, concurrency=clients, ranks="mixed")
        yield Workload(adapters=most, concurrency=clients, popularity=Popularity(kind="zipf", s=1.0))
