"""What an adapter's version says of the requests that name it, whatever route they come by.

A request's own fields come first, but for those that are `locked`: these a request may repeat and not change.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import orjson

from manylora.api.chats import rendered
from manylora.api.inputs import PoolRequest, ReadRequest
from manylora.api.lanes import PYTHON, beside_loop
from manylora.api.naming import Named
from manylora.api.sampling import sampling_params
from manylora.api.schemas import (
    MAX_CHAT_TEMPLATE,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    InferenceRequest,
    Message,
    checked,
)
from manylora.api.structured import ANSWER_FIELDS, asked_for
from manylora.catalog.interface import AdapterDirectory
from manylora.engine.interface import AdapterRef, EngineClient, Grammar, Mix
from manylora.errors import InvalidAdapter, InvalidGrammar, InvalidRequest, Problem, quoted
from manylora.identity import DEFAULTS_FILE

__all__ = [
    "FIELDS",
    "chat_template_of",
    "check",
    "check_template_allowed",
    "check_unlocked",
    "with_defaults",
    "with_system_prompt",
]

MAX_SYSTEM_PROMPT: Final = 16_384
_HELLO: Final = Message(role="user", content="hi")  # that every template has to take
_SAMPLING: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
)
FIELDS: Final = ("system_prompt", "chat_template", "choices", "max_tokens", "pooling", *ANSWER_FIELDS, *_SAMPLING)
"""What may be a default; `choices` is a short way to write `guided_choice`."""


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What a version says, as the fields of requests: `values` of those that are simply set where a request does not.

    `answer` are the fields that say what an answer must look like, of which a request's own replace all.
    """

    values: Mapping[str, Any]
    answer: Mapping[str, Any]
    grammar: Grammar | None
    max_tokens: int | None
    system_prompt: str | None
    chat_template: str | None
    pooling: Any
    locked: frozenset[str]


# a request


def check_template_allowed(body: InferenceRequest, *, is_allowed: bool) -> None:
    """Raises InvalidRequest for a request with a template of its own, where these are not taken."""
    if isinstance(body, ChatRequest) and body.chat_template is not None and not is_allowed:
        raise InvalidRequest(
            "This server takes no 'chat_template' from requests (its setting allow_request_chat_template). Leave it "
            "out, or give the adapter one of its own.",
            param="chat_template",
        )


def with_defaults(
    body: InferenceRequest, directory: AdapterDirectory, named: Named
) -> tuple[InferenceRequest, int | None]:
    """The request as the adapter's version completes it, and what an answer may have where the request does not say.

    A mix has none but those of its own, where it is a version. Raises InvalidRequest for a field that is locked, and
    for a mix with an adapter that locks some.
    """
    adapter = named.adapter
    if named.mix != Mix.of(adapter):
        check_unlocked(directory, named.mix, body.mixed.field if body.mixed.parts else "model")
    text = "" if adapter is None else directory.defaults_of(adapter)
    if adapter is None or not text:
        return body, None
    defaults = _parsed(text)
    _check_locked(body, defaults, adapter)
    if isinstance(body, ReadRequest):
        return body.pooled(defaults.pooling), None
    if not isinstance(body, GenerationRequest):
        return body, None
    given = body.model_fields_set
    found = {name: value for name, value in defaults.values.items() if name not in given}
    if not given.intersection(ANSWER_FIELDS) and not (isinstance(body, ChatRequest) and body.used_tools.must_call):
        found |= defaults.answer
    if isinstance(body, ChatRequest):
        found["messages"] = _prompted(body.messages, defaults.system_prompt)
    if isinstance(body, ChatRequest) and defaults.chat_template is not None and "chat_template" not in given:
        found["chat_template"] = defaults.chat_template
    return body.model_copy(update=found), defaults.max_tokens


def check_unlocked(directory: AdapterDirectory, mix: Mix, param: str) -> None:
    """Whether these may be mixed. Raises InvalidRequest."""
    for ref in mix.refs:
        text = directory.defaults_of(ref)
        if text and _parsed(text).locked:
            raise InvalidRequest(
                f"The adapter {ref.label} has fields locked for all requests that name it, so it is not mixed.",
                param=param,
            )


def chat_template_of(directory: AdapterDirectory, adapter: AdapterRef | None) -> str | None:
    """The template that the adapter's version has in place of the base's."""
    text = "" if adapter is None else directory.defaults_of(adapter)
    return _parsed(text).chat_template if text else None


def with_system_prompt(
    messages: list[Message], directory: AdapterDirectory, adapter: AdapterRef | None
) -> list[Message]:
    """The messages of a chat as the adapter's version completes them."""
    text = "" if adapter is None else directory.defaults_of(adapter)
    return _prompted(messages, _parsed(text).system_prompt) if text else messages


def _prompted(messages: list[Message], system_prompt: str | None) -> list[Message]:
    if system_prompt is None or _system_messages(messages):
        return messages
    return [Message(role="system", content=system_prompt), *messages]


def _check_locked(body: InferenceRequest, defaults: _Defaults, adapter: AdapterRef) -> None:
    for name in _at_odds(body, defaults):
        raise InvalidRequest(
            f"The adapter {adapter.label} has '{name}' locked, to another value than this request's. Leave it out.",
            param=name,
        )


def _at_odds(body: InferenceRequest, defaults: _Defaults) -> Iterable[str]:
    """The fields of the request that differ from locked ones."""
    given, locked = body.model_fields_set, defaults.locked
    for name in locked & given & defaults.values.keys():
        if getattr(body, name) != defaults.values[name]:
            yield name
    if isinstance(body, PoolRequest) and "pooling" in locked & given and body.pooling != defaults.pooling:
        yield "pooling"
    is_generation = isinstance(body, GenerationRequest)
    if "max_tokens" in locked and is_generation and body.token_limit not in (None, defaults.max_tokens):
        yield "max_tokens" if "max_tokens" in given else "max_completion_tokens"
    if locked.intersection(("choices", *ANSWER_FIELDS)):
        fields: dict[str, Any] = {name: getattr(body, name) for name in ANSWER_FIELDS if name in given}
        asked = asked_for(fields) if fields else None
        if asked is not None and asked.grammar != defaults.grammar:
            yield next(name for name in ANSWER_FIELDS if name in fields)
        if isinstance(body, ChatRequest) and body.used_tools.are_held:
            yield "tool_choice" if body.used_tools.must_call else "tools"
    if "chat_template" in locked & given and getattr(body, "chat_template", None) != defaults.chat_template:
        yield "chat_template"
    if "system_prompt" in locked and isinstance(body, ChatRequest):
        sent = _system_messages(body.messages)
        if sent and [message.content for message in sent] != [defaults.system_prompt]:
            yield "messages"


def _system_messages(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message.role in ("system", "developer")]


@lru_cache(256)
def _parsed(text: str) -> _Defaults:
    """Of a text that was checked."""
    raw = orjson.loads(text)
    body = _body({name: raw[name] for name in raw if name in (*_SAMPLING, *ANSWER_FIELDS)} | _choices(raw))
    answer: dict[str, Any] = {name: getattr(body, name) for name in ANSWER_FIELDS if name in body.model_fields_set}
    asked = asked_for(answer)
    return _Defaults(
        values={name: getattr(body, name) for name in _SAMPLING if name in body.model_fields_set},
        answer=answer,
        grammar=None if asked is None else asked.grammar,
        max_tokens=raw.get("max_tokens"),
        system_prompt=raw.get("system_prompt"),
        chat_template=raw.get("chat_template"),
        pooling=raw.get("pooling"),
        locked=frozenset(raw.get("locked", ())),
    )


def _body(fields: Mapping[str, Any]) -> CompletionRequest:
    """A request with these fields. Raises InvalidRequest."""
    return checked(CompletionRequest, {"model": "-", "prompt": "-", **fields})


def _choices(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"guided_choice": raw["choices"]} if "choices" in raw else {}


# a version


async def check(engine: EngineClient, raw: Mapping[str, Any], tenant: str) -> None:
    """Whether requests can be completed by it, its grammar ready to use. Raises InvalidAdapter with every reason."""
    problems = await beside_loop(PYTHON, _problems, raw, engine)
    template = raw.get("chat_template")
    if template is not None and not problems:
        try:
            await rendered([_HELLO], engine.codec, template=template, tenant=tenant)
        except InvalidRequest as error:
            problems.append(_problem("chat_template", error.message))
    fields = {name: raw[name] for name in ANSWER_FIELDS if raw.get(name) is not None} | _choices(raw)
    if fields and not problems:
        try:
            asked = asked_for({name: getattr(_body(fields), name) for name in fields})
            if asked is not None:
                try:
                    await engine.compile(asked.grammar, tenant)
                except InvalidGrammar as error:
                    raise asked.refusal(error) from None
        except InvalidRequest as error:
            where = (error.param or "").replace("guided_choice", "choices") if "choices" in raw else error.param
            problems.append(_problem(where or DEFAULTS_FILE, error.message))
    if problems:
        raise InvalidAdapter(problems)


def _problems(raw: Mapping[str, Any], engine: EngineClient) -> list[Problem]:
    found = [
        problem
        for name, value in raw.items()
        if value is not None and (problem := _problem_of(name, value, raw, engine)) is not None
    ]
    if found:
        return found
    if raw.get("choices") is not None and raw.get("guided_choice") is not None:
        return [_problem("guided_choice", "'guided_choice' and 'choices' say the same. Leave one of them out.")]
    together = {name: raw[name] for name in (*_SAMPLING, *ANSWER_FIELDS, "max_tokens") if raw.get(name) is not None}
    try:
        body = _body(together | _choices(raw))
        answer: dict[str, Any] = {name: getattr(body, name) for name in ANSWER_FIELDS if name in body.model_fields_set}
        asked_for(answer)
    except InvalidRequest as error:
        return [_problem(error.param or DEFAULTS_FILE, error.message)]
    if body.token_limit == 0:
        return [_problem("max_tokens", "'max_tokens' must be 1 or more: chats take it from here, too.")]
    if body.token_limit is not None and body.min_tokens > body.token_limit:
        return [_problem("min_tokens", f"'min_tokens' is more than 'max_tokens', {body.token_limit}.")]
    return []


def _problem_of(name: str, value: Any, raw: Mapping[str, Any], engine: EngineClient) -> Problem | None:
    """What is wrong with one field by itself."""
    if name == "locked":
        is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
        unset = [each for each in value if each not in FIELDS or raw.get(each) is None] if is_list else []
        if not is_list or unset:
            wrong = f"has '{quoted(unset[0])}', which is not set here" if unset else "must be a list of names"
            return _problem(name, f"'locked' {wrong}. Lock fields that have a default.")
        return None
    if name not in FIELDS:
        return _problem(quoted(name), f"'{quoted(name)}' cannot be a default. These can: {', '.join(FIELDS)}, locked.")
    if name == "pooling":
        ways = ("last", "mean", "cls") if engine.model.kind == "pool" else ("last", "mean")
        named = " or ".join(f"'{each}'" for each in ways)
        return None if value in ways else _problem(name, f"'pooling' must be {named}.")
    if name == "chat_template":
        if isinstance(value, str) and 0 < len(value) <= MAX_CHAT_TEMPLATE:
            return None
        return _problem(name, f"'chat_template' must be text of 1 to {MAX_CHAT_TEMPLATE} characters.")
    if name == "system_prompt":
        if isinstance(value, str) and 0 < len(value) <= MAX_SYSTEM_PROMPT:
            return None
        return _problem(name, f"'system_prompt' must be text of 1 to {MAX_SYSTEM_PROMPT} characters.")
    field = "guided_choice" if name == "choices" else name
    try:
        body = _body({field: value})
        sampling_params(body, engine.model)
    except InvalidRequest as error:
        return _problem(name, error.message.replace("guided_choice", name) if name == "choices" else error.message)
    if field not in body.model_fields_set:
        return _problem(name, f"'{name}' has a value that asks for nothing. Leave it out.")
    return None


def _problem(where: str, message: str) -> Problem:
    return Problem("bad_defaults", where, message)
