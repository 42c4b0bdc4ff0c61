"""Every error that manylora raises on purpose.

    ManyloraError                       500 server_error
    ├── InvalidRequest                  400 invalid_request_error
    │   ├── UnsupportedField            400 invalid_request_error  unsupported_field
    │   ├── WrongModelType              400 invalid_request_error  wrong_model_type
    │   ├── InvalidGrammar              400 invalid_request_error  invalid_grammar
    │   ├── NothingAllowed              400 invalid_request_error  nothing_allowed
    │   ├── InvalidAudio                400 invalid_request_error  invalid_audio
    │   ├── InvalidImage                400 invalid_request_error  invalid_image
    │   ├── ContextLengthExceeded       400 invalid_request_error  context_length_exceeded
    │   ├── MethodNotAllowed            405 invalid_request_error  method_not_allowed
    │   ├── RequestTimeout              408 invalid_request_error  request_timeout
    │   ├── UnsupportedEncoding         415 invalid_request_error  unsupported_encoding
    │   └── HeaderTooLarge              431 invalid_request_error  header_too_large
    ├── AuthenticationFailed            401 authentication_error   invalid_api_key
    ├── PermissionDenied                403 permission_error       insufficient_role
    │   └── SourceNotAllowed            403 permission_error       source_not_allowed
    │   └── CrossSite                   403 permission_error       cross_site
    ├── NotFound                        404 not_found_error        not_found
    │   └── AdapterNotFound             404 not_found_error        adapter_not_found
    ├── Conflict                        409 invalid_request_error  conflict
    ├── TooLarge                        413 invalid_request_error  request_too_large
    ├── InvalidAdapter                  422 invalid_adapter        invalid_adapter
    ├── RateLimited                     429 rate_limit_error       rate_limited
    │   ├── QueueFull                   429 rate_limit_error       queue_full
    │   └── QuotaExceeded               429 rate_limit_error       quota_exceeded
    ├── Unavailable                     503 server_error           unavailable
    │   ├── Draining                    503 server_error           draining
    │   ├── EngineDead                  503 server_error           engine_dead
    │   ├── ReplicaLost                 503 server_error           replica_lost
    │   ├── DatabaseUnavailable         503 server_error           database_unavailable
    │   ├── StoreUnavailable            503 server_error           store_unavailable
    │   └── StorageFull                 507 server_error           storage_full
    ├── AdapterLoadFailed               500 server_error           adapter_load_failed
    ├── SequenceFailed                  500 server_error           engine_step_failed
    │   ├── AdapterNotFinite            500 server_error           adapter_not_finite
    │   └── ModelNotFinite              500 server_error           model_not_finite
    └── StartupError                    500 server_error           startup_failed
        ├── InvalidSettings             500 server_error           invalid_settings
        ├── ModelUnusable               500 server_error           model_unusable
        └── NotEnoughMemory             500 server_error           not_enough_memory

The HTTP status, the OpenAI error type and the code are class attributes; `api/errors.py` is the one place
that turns them into an answer. Messages are written for the person who reads them: what is wrong, and what
to do about it.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final

MAX_QUOTED: Final = 200
_MOST_SAID: Final = 1000
_LONG_WORD: Final = re.compile(rf"\S{{{MAX_QUOTED + 2},}}")  # one more than what `quoted` gives


def cause_for_caller(error: Exception) -> str:
    """What went wrong in words for a caller: those of the operating system without the path that they name."""
    return str(error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


def quoted(text: str) -> str:
    """What a caller sent, as it may stand in a message or a log line: its first `MAX_QUOTED` characters."""
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"


def _bounded(text: str) -> str:
    """Whatever a message was made of: no word of ours is as long as a quote, and no message is as long as a page."""
    words = _LONG_WORD.sub(lambda word: quoted(word[0]), text)
    return words if len(words) <= _MOST_SAID else f"{words[:_MOST_SAID]}…"


class ManyloraError(Exception):
    """Base of the tree. `param` names the request field at fault, when there is one.

    Message and `param` are cut here, for answers and log lines alike, since they may quote what a stranger sent; what a
    start cannot go on with (StartupError) is the operator's own and stays whole.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        said = message if isinstance(self, StartupError) else _bounded(message)
        super().__init__(said)
        self.message = said
        self.param = None if param is None else quoted(param)

    def body(self) -> dict[str, Any]:
        """The JSON object that goes under `error`."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class InvalidRequest(ManyloraError):
    """The request cannot be served as it stands."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class UnsupportedField(InvalidRequest):
    """A field that this server does not know or does not support."""

    code = "unsupported_field"


class WrongModelType(InvalidRequest):
    """The route is for another kind of base model than the one that is served."""

    code = "wrong_model_type"


class InvalidGrammar(InvalidRequest):
    """A schema, regular expression or grammar that no answer can be held to. `keys`: the schema's keys at fault."""

    code = "invalid_grammar"

    def __init__(self, message: str, *, param: str | None = None, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message, param=param)
        self.keys = keys


class NothingAllowed(InvalidRequest):
    """What the request rules out leaves no token to go on with."""

    code = "nothing_allowed"


class InvalidAudio(InvalidRequest):
    """A file that is no sound, or sound that is not transcribed."""

    code = "invalid_audio"


class InvalidImage(InvalidRequest):
    """A file that is no image, or one that is not read."""

    code = "invalid_image"


class ContextLengthExceeded(InvalidRequest):
    """Prompt, or prompt and max_tokens together, do not fit the model's context."""

    code = "context_length_exceeded"


class MethodNotAllowed(InvalidRequest):
    """The route exists, with other methods."""

    status = 405
    code = "method_not_allowed"


class RequestTimeout(InvalidRequest):
    """The request was not sent within its time."""

    status = 408
    code = "request_timeout"


class UnsupportedEncoding(InvalidRequest):
    """The body is compressed, or encoded in another way."""

    status = 415
    code = "unsupported_encoding"


class HeaderTooLarge(InvalidRequest):
    """The request's header is longer than any client's is."""

    status = 431
    code = "header_too_large"


class AuthenticationFailed(ManyloraError):
    """No key, or a key that is not known, has expired or was revoked."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(ManyloraError):
    """A good key whose role does not allow this."""

    status = 403
    type = "permission_error"
    code = "insufficient_role"


class CrossSite(PermissionDenied):
    """A page of another site, or a host name that is not this server's, while the server asks for no key."""

    code = "cross_site"


class SourceNotAllowed(PermissionDenied):
    """An import from a place that the operator did not list, whoever asks."""

    code = "source_not_allowed"

    def __init__(self, message: str, *, param: str | None = "source") -> None:
        super().__init__(message, param=param)


class NotFound(ManyloraError):
    """Nothing under that name for this caller."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class AdapterNotFound(NotFound):
    """No such adapter: missing, not ready or another tenant's, which the caller cannot tell apart."""

    code = "adapter_not_found"


class Conflict(ManyloraError):
    """The state does not allow this now."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class TooLarge(ManyloraError):
    """A body or a file over its limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an adapter: a documented code, the place, and what to do."""

    code: str
    where: str
    message: str


class InvalidAdapter(ManyloraError):
    """An adapter that is refused, with every problem found."""

    status = 422
    type = "invalid_adapter"
    code = "invalid_adapter"

    def __init__(self, problems: list[Problem]) -> None:
        first = f"{problems[0].where}: {problems[0].message}" if problems else "no details"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"The adapter was refused: {first}{more}")
        self.problems = [Problem(p.code, _bounded(p.where), _bounded(p.message)) for p in problems]

    def body(self) -> dict[str, Any]:
        return {**super().body(), "problems": [asdict(p) for p in self.problems]}


class RateLimited(ManyloraError):
    """Too much at once. `retry_after_s` says when to come back."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limited"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class QueueFull(RateLimited):
    """The server's queue is full."""

    code = "queue_full"


class QuotaExceeded(RateLimited):
    """The tenant has used up a quota."""

    code = "quota_exceeded"


class Unavailable(ManyloraError):
    """The server cannot take requests now."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Unavailable):
    """The server is shutting down and finishes what it has."""

    code = "draining"


class EngineDead(Unavailable):
    """The engine thread ended with an error; the process must be restarted."""

    code = "engine_dead"


class ReplicaLost(Unavailable):
    """The replica of a cluster that was to answer has ended or cannot be reached."""

    code = "replica_lost"


class DatabaseUnavailable(Unavailable):
    """The database does not answer, is locked, damaged or cannot be written now."""

    code = "database_unavailable"


class StoreUnavailable(Unavailable):
    """The adapter files, or a folder of the server, cannot be read or written now."""

    code = "store_unavailable"


class StorageFull(Unavailable):
    """A disk is full, or a quota on it is used up."""

    status = 507
    code = "storage_full"


class AdapterLoadFailed(ManyloraError):
    """A registered adapter could not be brought into memory."""

    code = "adapter_load_failed"


class SequenceFailed(ManyloraError):
    """The engine failed on this sequence alone, and has logged it; it goes on with the others."""

    code = "engine_step_failed"


class AdapterNotFinite(SequenceFailed):
    """The adapter makes logits that hold NaN or infinity."""

    code = "adapter_not_finite"


class ModelNotFinite(SequenceFailed):
    """The base model makes logits that hold NaN or infinity."""

    code = "model_not_finite"


class StartupError(ManyloraError):
    """The server cannot start as configured."""

    code = "startup_failed"


class InvalidSettings(StartupError):
    """A setting is unknown or out of range."""

    code = "invalid_settings"


class ModelUnusable(StartupError):
    """The base model cannot be read or cannot be served correctly."""

    code = "model_unusable"


class NotEnoughMemory(StartupError):
    """The memory given does not hold one sequence."""

    code = "not_enough_memory"
