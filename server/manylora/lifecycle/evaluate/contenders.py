"""Systems that are evaluated: the base and adapters, in this process or on a running server."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from manylora.client.server import Server
from manylora.errors import InvalidRequest
from manylora.lifecycle.base import Base, accepts_logits_to_keep, quiet_peft
from manylora.lifecycle.data.batches import answer_nll, collate, sorted_batches
from manylora.lifecycle.data.data import Message
from manylora.lifecycle.data.encoding import Encoded, Encoder
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.weights.probes import PROMPTS

_T = TypeVar("_T")
BASE = "base"
Tick = Callable[[int], None]


class Contenders(Protocol):
    """Answers and likelihoods of one contender at a time, greedy. `tick` is told how many examples are done."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def answers(self, name: str, examples: Sequence[Encoded], max_tokens: int, tick: Tick) -> list[str]: ...

    def nll(self, name: str, examples: Sequence[Encoded], tick: Tick) -> list[float]:
        """The sum over each example's answer tokens, in nats."""
        ...


class LocalContenders:
    """The base and PEFT folders in this process."""

    def __init__(self, base: Base, encoder: Encoder, folders: dict[str, Path], *, with_base: bool) -> None:
        self._base = base
        self._encoder = encoder
        self._model = _with_adapters(base, folders)
        self.names = ((BASE,) if with_base else ()) + tuple(folders)

    def answers(self, name: str, examples: Sequence[Encoded], max_tokens: int, tick: Tick) -> list[str]:
        return self._as(name, lambda model: generate(model, self._base, self._encoder, examples, max_tokens, tick))

    def nll(self, name: str, examples: Sequence[Encoded], tick: Tick) -> list[float]:
        return self._as(name, lambda model: example_nll(model, self._base, examples, tick))

    def _as(self, name: str, work: Callable[[Any], _T]) -> _T:
        if name != BASE:
            self._model.set_adapter(name)
            return work(self._model)
        if not hasattr(self._model, "disable_adapter"):
            return work(self._model)
        with self._model.disable_adapter():
            return work(self._model)


def _with_adapters(base: Base, folders: dict[str, Path]) -> Any:
    from peft import PeftModel

    model: Any = base.model
    for index, (name, folder) in enumerate(folders.items()):
        try:
            with quiet_peft():
                if index:
                    model.load_adapter(str(folder), adapter_name=name)
                else:
                    model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise InvalidRequest(f"{folder} cannot be put on this base: {error}") from error
    return model.eval()


def generate(
    model: Any, base: Base, encoder: Encoder, examples: Sequence[Encoded], max_tokens: int, tick: Tick
) -> list[str]:
    """Greedy answers, in the order of `examples`."""
    out = [""] * len(examples)
    done = 0
    for indices in sorted_batches(examples, 16):
        prompts = [examples[i].prompt_ids for i in indices]
        length = max(map(len, prompts))
        ids = torch.full((len(prompts), length), base.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        with torch.inference_mode():
            full = model.generate(
                input_ids=ids.to(base.device), attention_mask=mask.to(base.device), max_new_tokens=max_tokens,
                do_sample=False, use_cache=True, pad_token_id=base.pad_id,
            )  # fmt: skip
        for row, index in enumerate(indices):
            out[index] = encoder.decode(_until_end(full[row, length:].tolist(), base.tokenizer.eos_token_id))
        done += len(indices)
        tick(done)
    return out


def example_nll(model: Any, base: Base, examples: Sequence[Encoded], tick: Tick) -> list[float]:
    out = [0.0] * len(examples)
    keeps, done = accepts_logits_to_keep(base.model), 0
    for indices in sorted_batches(examples, 16):
        batch = collate([examples[i] for i in indices], pad_id=base.pad_id, device=base.device)
        with torch.inference_mode():
            sums = answer_nll(model, batch, keeps_logits=keeps).sum(1).tolist()
        for index, value in zip(indices, sums, strict=True):
            out[index] = value
        done += len(indices)
        tick(done)
    return out


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


@dataclass(frozen=True, slots=True)
class ServerContenders:
    """Names on a running server: `base`, `adapter` or `adapter@version`. Many requests at once, one per example."""

    server: Server
    base_name: str
    names: tuple[str, ...]
    encoder: Encoder
    at_once: int = 16

    def check_tokenizer(self) -> None:
        """Raises InvalidRequest when the server counts a prompt's tokens otherwise than the encoder here."""
        for text in PROMPTS:
            prompt = (Message("user", text),)
            here = self.encoder.num_prompt_tokens(prompt)
            there = self._ask(self.base_name, prompt, 1)["usage"]["prompt_tokens"]
            if here != there:
                raise InvalidParameter(
                    f"The server's base {self.base_name} makes {there} tokens of {text!r}, and the model here {here}: "
                    "they are different. Give the server's model with `model`."
                )

    def answers(self, name: str, examples: Sequence[Encoded], max_tokens: int, tick: Tick) -> list[str]:
        def ask(example: Encoded) -> str:
            model = self._model(name)
            # What is left of a cut prompt is tokens, no longer a message; what a template makes of tools is, too.
            if example.num_cut or example.example.has_tools:
                body = {"model": model, "max_tokens": max_tokens, "temperature": 0, "prompt": list(example.prompt_ids)}
                choice = self._post("/v1/completions", body)["choices"][0]
            else:
                choice = self._ask(model, example.example.prompt, max_tokens)["choices"][0]
            return str(choice["message"]["content"] if "message" in choice else choice["text"])

        return self._all(ask, examples, tick)

    def nll(self, name: str, examples: Sequence[Encoded], tick: Tick) -> list[float]:
        def ask(example: Encoded) -> float:
            body = {
                "model": self._model(name), "prompt": list(example.ids), "echo": True, "logprobs": 1,
                "max_tokens": 1, "temperature": 0,
            }  # fmt: skip
            logprobs = self._post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
            wanted = [p for p, learnt in zip(logprobs, example.is_answer, strict=False) if learnt]
            return math.nan if None in wanted else -float(sum(wanted))

        return self._all(ask, examples, tick)

    def _all(self, ask: Callable[[Encoded], _T], examples: Sequence[Encoded], tick: Tick) -> list[_T]:
        found: list[_T] = []
        with ThreadPoolExecutor(self.at_once) as pool:
            for value in pool.map(ask, examples):
                found.append(value)
                tick(len(found))
        return found

    def _ask(self, model: str, prompt: Sequence[Message], max_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0}
        request = self.encoder.request(prompt)
        if isinstance(request, str):
            return self._post("/v1/completions", body | {"prompt": request})
        messages = [{"role": m.role, "content": m.content} for m in request]
        return self._post("/v1/chat/completions", body | {"messages": messages})

    def _model(self, name: str) -> str:
        return self.base_name if name == BASE else name

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self.server.call("POST", path, json=body)
        return answer
