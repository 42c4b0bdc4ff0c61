"""Tokens through the front door: what a client that keeps no tokenizer of its own asks for."""

import httpx
import pytest

from tests.e2e.conftest import Server
from tests.tiny_models import END_OF_TURN, make_tokenizer


def test_a_client_without_a_tokenizer_gets_along(server: Server) -> None:
    """As lm-eval's remote tokenizer does: its special tokens, ids and back, and a prompt sent as ids."""
    own = make_tokenizer()
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert info["eos_token"] == own.eos_token
    assert info["chat_template"] == own.chat_template
    assert info["tokenizer_class"]
    assert not any("/" in str(value) for name, value in info.items() if name != "chat_template")
    found = httpx.post(f"{server.url}/tokenize", json={"prompt": "naïve 🙂 café", "return_token_strs": True}).json()
    assert found["tokens"] == own.encode("naïve 🙂 café")
    assert found["token_strs"] == own.convert_ids_to_tokens(found["tokens"])
    assert found["count"] == len(found["tokens"])
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": [*found["tokens"], END_OF_TURN]}).json()
    assert back == {"prompt": own.decode([*found["tokens"], END_OF_TURN])}
    scored = server.client().completions.create(
        model="tiny",
        prompt=found["tokens"],
        max_tokens=3,
        extra_body={"prompt_logprobs": 1, "return_token_ids": True, "ignore_eos": True},
    )
    choice = scored.choices[0].model_dump()
    assert choice["prompt_token_ids"] == found["tokens"]
    assert len(choice["token_ids"]) == 3
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for token, place in zip(found["tokens"][1:], rest, strict=True):
        assert place[str(token)]["decoded_token"] == own.decode([token])
        assert len(place) == (1 if place[str(token)]["rank"] == 1 else 2)
        assert 1 in {each["rank"] for each in place.values()}


@pytest.mark.parametrize("model", ["tiny", "small"])
def test_a_chat_is_counted_as_it_is_charged(server: Server, model: str) -> None:
    messages = [{"role": "user", "content": "hello there"}]
    count = httpx.post(f"{server.url}/tokenize", json={"model": model, "messages": messages}).json()["count"]
    answer = server.client().chat.completions.create(model=model, messages=messages, max_tokens=1)  # type: ignore[arg-type]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == count


def test_rules_on_tokens_hold_in_a_stream(server: Server) -> None:
    allowed = list(range(40, 60))
    stream = server.client().chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=12,
        stream=True,
        extra_body={"allowed_token_ids": allowed, "bad_words": ["a"], "min_tokens": 12, "return_token_ids": True},
    )
    ids = [
        token for chunk in stream for choice in chunk.choices for token in choice.model_dump().get("token_ids") or ()
    ]
    assert len(ids) == 12
    assert set(ids) <= set(allowed)
