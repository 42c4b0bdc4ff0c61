"""Requests for nobody before the first one for somebody, which then finds memory, caches and adapters in place."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from manylora.catalog.interface import AdapterDirectory
from manylora.engine.interface import EngineClient, SamplingParams
from manylora.errors import AdapterNotFound, InvalidRequest, ManyloraError
from manylora.identity import PUBLIC_TENANT, AdapterRef
from manylora.log import get_logger

__all__ = ["to_warm_up", "warm_up"]

_TEXT = "Once upon a time, in a village by the sea, there lived a fisherman who could not swim. " * 3
_ADAPTERS_S = 1.0


def to_warm_up(directory: AdapterDirectory) -> list[AdapterRef]:
    """The public adapters, by name; in place of a mix those that it is made of."""
    found: dict[AdapterRef, None] = {}
    for each in directory.visible_to(PUBLIC_TENANT):
        with suppress(AdapterNotFound):  # deleted meanwhile by another server
            found.update(dict.fromkeys(directory.mix_of(each.ref).refs))
    return list(found)


async def warm_up(engine: EngineClient, adapters: Sequence[AdapterRef]) -> None:
    """Answer one token with each of the first `adapters`, as many as there are slots, then a prompt by the base.

    Adapters get a second: what is not read by then waits for its own request. One that cannot be read is left for
    that request to say.
    """
    prompt = _prompt(engine)
    slots = engine.stats().slots_total
    with suppress(TimeoutError):
        async with asyncio.timeout(_ADAPTERS_S):
            for ref in adapters[:slots]:  # one by one: what was asked for is read to its end, beside the first requests
                await _try(engine, prompt[:1] if engine.model.vision is None else prompt, ref)
    await _answer(engine, prompt, None)


def _prompt(engine: EngineClient) -> list[int]:
    if engine.model.vision is not None:
        return [0] * engine.model.vision.num_positions
    prompt = engine.codec.encode(_TEXT)
    with suppress(InvalidRequest):  # a base without a chat template
        prompt = engine.codec.chat([{"role": "user", "content": _TEXT}])
    # A tokenizer can put a token in front that the model has not.
    return [i for i in prompt if i < engine.model.vocab_size][: engine.model.most_prompt_tokens]


async def _try(engine: EngineClient, prompt: Sequence[int], adapter: AdapterRef) -> None:
    try:
        await _answer(engine, prompt, adapter)
    except ManyloraError as error:
        get_logger(__name__).info("adapter_not_warm", adapter=adapter.name, reason=error.message)


async def _answer(engine: EngineClient, prompt: Sequence[int], adapter: AdapterRef | None) -> None:
    if engine.model.kind == "pool":
        params = SamplingParams(max_tokens=0, pooling=engine.model.default_pooling)
    else:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    generation = engine.generate("warm-up", prompt, params, adapter=adapter)
    try:
        async for _ in generation:
            pass
    finally:
        await generation.aclose()
