"""`/tokenize`, `/detokenize` and `/tokenizer_info`."""

from typing import Any

import pytest

from manylora.api import fields
from manylora.api.tokens import MAX_DETOKENIZED
from manylora.settings import Settings
from manylora.tenants.interface import Principal, Role

from .conftest import Rig
from .fakes import BOS, VOCAB_SIZE

HI = [104, 105]


def post(rig: Rig, path: str, body: Any, **how: Any) -> Any:
    return rig.client.post(path, json=body, **how)


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        ({"prompt": "hi"}, [BOS, *HI]),
        ({"prompt": "hi", "model": "base-model"}, [BOS, *HI]),
        ({"prompt": "hi", "model": "alpha@2"}, [BOS, *HI]),
        ({"prompt": "hi", "add_special_tokens": False}, HI),
        ({"prompt": ""}, [BOS]),
        ({"messages": [{"role": "user", "content": "hi"}]}, [ord(c) for c in "[user]hi[assistant]"]),
        ({"messages": [{"role": "user", "content": "hi"}], "add_special_tokens": True}, None),
    ],
)
def test_a_text_or_a_chat_becomes_ids(rig: Rig, body: dict[str, Any], ids: list[int] | None) -> None:
    answer = post(rig, "/tokenize", body).json()
    expected = ids or [BOS, *(ord(c) for c in "[user]hi[assistant]")]
    assert answer == {
        "count": len(expected),
        "max_model_len": rig.engine.context_length,
        "tokens": expected,
        "token_strs": None,
    }


def test_the_tokens_names_are_those_of_the_vocabulary(rig: Rig) -> None:
    answer = post(rig, "/tokenize", {"prompt": "hi", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["<<s>>", "<h>", "<i>"]


def test_a_text_that_no_prompt_could_hold_is_counted_all_the_same(rig: Rig) -> None:
    assert post(rig, "/tokenize", {"prompt": "x" * 50_000}).json()["count"] == 50_001


@pytest.mark.parametrize("size", [0, 3, 20_000])
def test_ids_become_text_with_their_special_tokens(settings: Settings, size: int) -> None:
    rig = Rig(settings.model_copy(update={"max_body": 2**24}))
    assert post(rig, "/detokenize", {"tokens": [BOS] + [104] * size}).json() == {"prompt": "<s>" + "h" * size}
    assert post(rig, "/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_the_tokenizers_configuration_is_told(rig: Rig) -> None:
    assert rig.client.get("/tokenizer_info").json() == dict(rig.engine.codec.info)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}, "prompt"),
        ("/tokenize", {"prompt": ["hi"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "tool", "content": "hi"}]}, "messages"),
        ("/tokenize", {"prompt": "hi", "model": "nobody"}, "model"),
        ("/tokenize", {"prompt": "hi", "made_up": 1}, "made_up"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "adapter_id": "nobody"}, "adapter_id"),
        *(("/tokenize", {"prompt": "hi", name: {"a": 1}}, name) for name in fields.TOKENIZE_UNSUPPORTED),
    ],
)
def test_what_is_wrong_is_named(rig: Rig, path: str, body: dict[str, Any], param: str) -> None:
    answer = post(rig, path, body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_more_ids_than_are_taken_at_a_time_are_refused(settings: Settings) -> None:
    rig = Rig(settings.model_copy(update={"max_body": 2**24}))
    answer = rig.client.post("/detokenize", json={"tokens": [1] * (MAX_DETOKENIZED + 1)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/tokenize", {"prompt": "hi"}),
        ("POST", "/detokenize", {"tokens": [1]}),
        ("GET", "/tokenizer_info", None),
    ],
)
def test_a_key_is_asked_for(rig: Rig, method: str, path: str, body: Any) -> None:
    rig.gate.keys = {"k": Principal("acme", Role.USER)}
    assert rig.client.request(method, path, json=body).status_code == 401
    assert rig.client.request(method, path, json=body, headers={"authorization": "Bearer k"}).status_code == 200


def test_another_tenants_adapter_is_not_known(rig: Rig) -> None:
    rig.gate.keys = {"k": Principal("rival", Role.USER)}
    answer = rig.client.post("/tokenize", json={"prompt": "hi", "model": "beta"}, headers={"authorization": "Bearer k"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")
