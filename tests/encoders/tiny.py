"""Tiny random encoders of several architectures, adapters that PEFT writes for them, and a server of one."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import processors
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from manylora.serving.parts import Parts, open_parts
from manylora.settings import Settings
from tests.tiny_models import SPECIAL_TOKENS, VOCAB_SIZE, draw_weights, make_tokenizer

CLS, PAD, SEP = 0, 1, 2
_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": PAD,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_NEITHER = {"hidden_dropout_prob": None, "attention_probs_dropout_prob": None}
CONFIGS: Mapping[str, tuple[type[PretrainedConfig], Mapping[str, Any]]] = {
    "bert": (BertConfig, _SHARED),
    "roberta": (RobertaConfig, _SHARED | {"bos_token_id": CLS, "eos_token_id": SEP, "type_vocab_size": 1}),
    "electra": (ElectraConfig, _SHARED | {"embedding_size": 48}),
    "distilbert": (
        DistilBertConfig,
        {
            "vocab_size": VOCAB_SIZE,
            "dim": 48,
            "hidden_dim": 80,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 66,
            "pad_token_id": PAD,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "modernbert": (
        ModernBertConfig,
        {name: value for name, value in _SHARED.items() if name not in _NEITHER}
        | {"local_attention": 12, "num_hidden_layers": 4, "cls_token_id": CLS, "sep_token_id": SEP},
    ),
}
PREFIXES = {
    "bert": "bert",
    "roberta": "roberta",
    "electra": "electra",
    "distilbert": "distilbert",
    "modernbert": "model",
}


def make_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """The tests' tokenizer with a token before each text and one behind, as encoders have them."""
    tokenizer = make_tokenizer().backend_tokenizer
    first, last = SPECIAL_TOKENS[CLS], SPECIAL_TOKENS[SEP]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, CLS), (last, SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token=first, sep_token=last, pad_token=SPECIAL_TOKENS[PAD]
    )


def make_encoder(kind: str, folder: Path, *, model_class: Any = AutoModel, **overrides: Any) -> Path:
    """Save a random encoder with its tokenizer; returns the folder. `model_class`: with which head it is saved."""
    config_class, fields = CONFIGS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class.from_config(config_class(**{**fields, **overrides}), dtype=torch.float32)
        draw_weights(model)
    model.save_pretrained(folder)
    make_encoder_tokenizer().save_pretrained(folder)
    return folder


def make_sentence_folder(folder: Path, *, normalizes: bool = True, **pooling: Any) -> Path:
    """Files of sentence-transformers beside a model: how it pools, and whether vectors get length 1."""
    parts = ["Transformer", "Pooling", *(["Normalize"] if normalizes else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{part}" if i else "", "type": f"sentence_transformers.models.{part}"}
        for i, part in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **pooling}))
    return folder


def make_encoder_adapter(
    base: Path,
    folder: Path,
    *,
    model_class: Any = AutoModel,
    task: str | None = "FEATURE_EXTRACTION",
    rank: int = 4,
    targets: list[str] | str = "all-linear",
    seed: int = 0,
    num_labels: int = 3,
    **lora: Any,
) -> Path:
    """Save an adapter that PEFT writes, with random weights, head included where the task has one."""
    torch.manual_seed(seed)
    given = {} if model_class is AutoModel else {"num_labels": num_labels}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class.from_pretrained(base, dtype=torch.float32, **given)
        tuned = get_peft_model(
            model, LoraConfig(task_type=task, r=rank, lora_alpha=2 * rank, target_modules=targets, **lora)
        )
        with torch.no_grad():
            for weight in tuned.parameters():
                if weight.requires_grad:
                    weight.normal_(0.0, (0.5 / weight.shape[-1]) ** 0.5)
        tuned.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path | None, *, model_class: Any = AutoModel, **given: Any) -> Any:
    """The oracle: transformers' model in float32, with PEFT's adapter where there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class.from_pretrained(base, dtype=torch.float32, **given)
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


@dataclass(frozen=True)
class Served:
    """A server without a socket, asked from tests that know no event loop."""

    parts: Parts
    portal: BlockingPortal
    client: httpx2.AsyncClient

    def post(self, path: str, **body: Any) -> httpx2.Response:
        async def ask() -> httpx2.Response:
            return await self.client.post(path, json=body)

        return self.portal.call(ask)

    def get(self, path: str) -> httpx2.Response:
        async def ask() -> httpx2.Response:
            return await self.client.get(path)

        return self.portal.call(ask)

    @contextmanager
    def nothing_left(self) -> Iterator[None]:
        """In the block, the callers' tenant may send no request."""

        async def allow(requests: int | None) -> int:
            changed = await self.client.patch("/v1/tenants/public", json={"requests_per_minute": requests})
            return changed.status_code

        assert self.portal.call(allow, 0) == 200
        try:
            yield
        finally:
            assert self.portal.call(allow, None) == 200

    def together(self, path: str, bodies: list[dict[str, Any]]) -> list[httpx2.Response]:
        """All at once, so that they share batches."""

        async def ask() -> list[httpx2.Response]:
            import asyncio

            return await asyncio.gather(*(self.client.post(path, json=body) for body in bodies))

        return self.portal.call(ask)

    def upload(self, folder: Path, name: str, **fields: str) -> httpx2.Response:
        files = [
            ("files", (each, (folder / each).read_bytes()))
            for each in ("adapter_config.json", "adapter_model.safetensors")
        ]

        async def ask() -> httpx2.Response:
            return await self.client.post("/v1/adapters", data={"name": name, **fields}, files=files)

        return self.portal.call(ask)


@contextmanager
def serve(model: Path, data: Path, **settings: Any) -> Iterator[Served]:
    """A server of `model` in float32, its data in `data`."""
    chosen = Settings(
        **{
            "model": str(model),
            "device": "cpu",
            "dtype": "float32",
            "data_dir": data,
            "served_name": "base",
            **settings,
        }
    )
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(open_parts(chosen)) as parts:
        client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=parts.app()), base_url="http://127.0.0.1")
        yield Served(parts, portal, client)
