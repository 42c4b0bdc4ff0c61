"""One request for each route that runs as it stands, for `/docs`: against a server with an adapter `billing`."""

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["BODIES", "PARAMETERS"]

_CHAT: Final = {"model": "billing", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16}
_TGI: Final = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 16, "adapter_id": "billing"}}

# What stands in a path.
PARAMETERS: Final[Mapping[str, str]] = {
    "name": "billing",
    "n": "1",
    "model_id": "billing",
    "tenant": "acme",
    "key_id": "key_0123456789abcdef01234567",
    "file_id": "file-0123456789abcdef01234567",
    "job_id": "ftjob-0123456789abcdef01234567",
    "request_id": "0123456789abcdef0123456789abcdef",
}

BODIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "POST /v1/completions": {"model": "billing", "prompt": "Once upon a time", "max_tokens": 16},
    "POST /v1/chat/completions": _CHAT,
    "POST /v1/responses": {"model": "billing", "input": "Hello!", "max_output_tokens": 16},
    "POST /v1/messages": _CHAT,
    "POST /v1/messages/count_tokens": {"model": "billing", "messages": _CHAT["messages"]},
    "POST /v1/embeddings": {"model": "billing", "input": ["a text", "another one"]},
    "POST /v1/classify": {"model": "billing", "input": "a text"},
    "POST /classify": {"model": "billing", "input": "a text"},
    "POST /v1/score": {"model": "billing", "text_1": "a question", "text_2": ["a text", "another one"]},
    **{
        f"POST {path}": {"model": "billing", "query": "a question", "documents": ["a text", "another one"]}
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    },
    "POST /v1/question-answering": {"model": "billing", "question": "When is it due?", "context": "It is due in May."},
    "POST /tokenize": {"model": "billing", "prompt": "Once upon a time"},
    "POST /detokenize": {"model": "billing", "tokens": [1, 2, 3]},
    "POST /generate": _TGI,
    "POST /generate_stream": _TGI,
    "POST /": _TGI,
    "POST /api/chat": {
        "model": "billing",
        "messages": _CHAT["messages"],
        "options": {"num_predict": 16},
        "stream": False,
    },
    "POST /api/generate": {"model": "billing", "prompt": "Hello!", "options": {"num_predict": 16}, "stream": False},
    "POST /api/show": {"model": "billing"},
    "POST /invocations": _CHAT,
    "POST /v1/adapters": {"name": "imported", "source": "hf://owner/repository", "note": "first try"},
    "PATCH /v1/adapters/{name}": {"active_version": 2, "note": "better on the March letters"},
    "POST /v1/adapters/{name}/rollback": {"note": "worse than before"},
    "PUT /v1/adapters/{name}/canary": {"version": 3, "share": 0.1, "note": "trained on the March letters"},
    "POST /v1/fine_tuning/jobs": {
        "model": "base-model",
        "training_file": PARAMETERS["file_id"],
        "suffix": "letters",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
        "manylora": {"rank": 8, "activate": "always"},
    },
    "POST /v1/load_lora_adapter": {"lora_name": "loaded", "lora_path": "/adapters/loaded"},
    "POST /v1/unload_lora_adapter": {"lora_name": "billing"},
    "PATCH /v1/tenants/{tenant}": {"weight": 2, "requests_per_minute": 600, "max_adapters": None},
    "POST /v1/keys": {"tenant": "acme", "role": "manager", "name": "nightly training"},
}
