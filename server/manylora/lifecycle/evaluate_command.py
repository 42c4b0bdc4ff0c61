"""From the command's words to contenders: folders in this process, or names on a server; then promotion."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.errors import InvalidRequest
from manylora.lifecycle.adapter_files import read_adapter_files
from manylora.lifecycle.base import DeviceName, DtypeName, load_base, load_tokenizer
from manylora.lifecycle.contenders import BASE, LocalContenders, ServerContenders
from manylora.lifecycle.data import Dataset
from manylora.lifecycle.encoding import Encoded, Encoder, Render
from manylora.lifecycle.evaluate import (
    EvaluateConfig,
    comparison,
    deserves_promotion,
    evaluate,
    evaluation_data,
)
from manylora.lifecycle.output import refuse_existing
from manylora.lifecycle.progress import Listener, ignore
from manylora.lifecycle.publish import connect, promote, served_base


@dataclass(frozen=True, slots=True)
class EvaluateRequest:
    """`manylora evaluate`'s arguments. With `server`, `adapters` are names there; otherwise folders."""

    data: Path
    adapters: tuple[str, ...] = ()
    with_base: bool = False
    server: str = ""
    key: str = ""
    metrics: tuple[str, ...] = ()
    max_tokens: int = 64
    out: Path | None = None
    promote_if_better: str = ""
    min_gain: float = 0.0
    model: str | None = None
    max_length: int = 1024
    render: Render = "auto"
    instruction: str = ""
    seed: int = 0
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    overwrite: bool = False


def run_evaluation(request: EvaluateRequest, listen: Listener = ignore) -> tuple[dict[str, Any], str]:
    """The report, and a sentence about the promotion when one was asked for.

    Raises InvalidRequest for bad input before any model is loaded, ManyloraError when the server fails.
    """
    dataset, metrics = _check(request)
    config = EvaluateConfig(request.data, metrics, request.max_tokens, request.seed, request.out)
    if not request.server:
        base = load_base(request.model, device=request.device, dtype=request.dtype, max_length=request.max_length)
        encoder = _encoder(request, base.tokenizer)
        encoded = encoder.encode(dataset, context_length=base.context_length)
        folders = _names_of(request.adapters)
        local = LocalContenders(base, encoder, folders, with_base=request.with_base)
        return evaluate(config, dataset, encoded, local, metrics, listen), ""
    return _on_server(request, config, dataset, metrics, listen)


def _on_server(
    request: EvaluateRequest, config: EvaluateConfig, dataset: Dataset, metrics: Sequence[str], listen: Listener
) -> tuple[dict[str, Any], str]:
    tokenizer, context_length = load_tokenizer(request.model)
    encoder = _encoder(request, tokenizer)
    encoded: list[Encoded] = encoder.encode(dataset, context_length=context_length)
    with connect(request.server, request.key) as client:
        names = ((BASE,) if request.with_base else ()) + request.adapters
        contenders = ServerContenders(client, served_base(client), names, encoder)
        report = evaluate(config, dataset, encoded, contenders, metrics, listen)
        if not request.promote_if_better:
            return report, ""
        candidate = request.adapters[-1]
        test = comparison(report, candidate, request.promote_if_better)
        facts = f"{test.metric} gain {test.gain:+.4g} over {names[0]} (p = {test.p:.2g})"
        if not deserves_promotion(test, request.min_gain):
            return report, f"{candidate} was not promoted: {facts}, needed at least {request.min_gain:g} with p < 0.05."
        promote(client, candidate)
        return report, f"{candidate} was promoted: {facts}."


def _check(request: EvaluateRequest) -> tuple[Dataset, tuple[str, ...]]:
    if not request.adapters and not request.with_base:
        raise InvalidRequest("Nothing to evaluate: give --adapter or --base.")
    if request.max_tokens <= 0:
        raise InvalidRequest(f"--max-tokens must be positive, not {request.max_tokens}.")
    if request.out is not None:
        refuse_existing(request.out, overwrite=request.overwrite)
    dataset, metrics = evaluation_data(request.data, request.metrics)
    if request.promote_if_better:
        _check_promotion(request, metrics)
    if not request.server:
        for folder in request.adapters:
            read_adapter_files(Path(folder))
    return dataset, metrics


def _check_promotion(request: EvaluateRequest, metrics: Sequence[str]) -> None:
    if not request.server:
        raise InvalidRequest("--promote-if-better promotes on a server: give --server.")
    if request.promote_if_better not in metrics:
        raise InvalidRequest(f"--promote-if-better must be one of the metrics computed: {', '.join(metrics)}.")
    if len(request.adapters) + request.with_base < 2:
        raise InvalidRequest("--promote-if-better compares with the first contender: give two, the candidate last.")
    if not request.adapters[-1].partition("@")[2].isdigit():
        raise InvalidRequest(f"The candidate {request.adapters[-1]!r} must name its version, as in NAME@2.")


def _encoder(request: EvaluateRequest, tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, render=request.render, instruction=request.instruction, max_length=request.max_length)


def _names_of(folders: Sequence[str]) -> dict[str, Path]:
    """Short names for folders: the last part, numbered where two are alike (PEFT forbids dots in names)."""
    names: dict[str, Path] = {}
    for folder in folders:
        path = Path(folder)
        stem = path.resolve().name.replace(".", "_")
        name, count = stem, 2
        while name in names or name == BASE:
            name, count = f"{stem}-{count}", count + 1
        names[name] = path
    return names
