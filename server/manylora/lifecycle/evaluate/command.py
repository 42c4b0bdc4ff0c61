"""From the command's words to contenders: folders in this process, or names on a server; then promotion."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from manylora.client.adapters import active_version, check_may_manage, pinned, promote, served_base
from manylora.client.server import Refused, Server, connect
from manylora.errors import InvalidRequest
from manylora.identity import CARD_FILE, TENSOR_FILE
from manylora.lifecycle.adapter_files import read_adapter_files
from manylora.lifecycle.base import load_base, load_tokenizer, memory_faults
from manylora.lifecycle.card import MADE, SCORES, scores_table, with_section
from manylora.lifecycle.data.batches import check_known
from manylora.lifecycle.data.data import Dataset
from manylora.lifecycle.data.encoding import Encoded, Encoder, tell_lengths
from manylora.lifecycle.data.files import AS_IT_IS, bytes_of
from manylora.lifecycle.evaluate.config import EvaluateRequest
from manylora.lifecycle.evaluate.contenders import BASE, Contenders, LocalContenders, ServerContenders
from manylora.lifecycle.evaluate.evaluate import (
    EvaluateConfig,
    comparison,
    deserves_promotion,
    evaluate,
    evaluation_data,
)
from manylora.lifecycle.evaluate.tasks import run_task
from manylora.lifecycle.extras import need
from manylora.lifecycle.journal import Journal
from manylora.lifecycle.output import atomic_file, refuse_existing
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.progress import Listener, Progress, ignore

_CONFLICT: Final = 409


@dataclass(frozen=True, slots=True)
class Promotion:
    """Whether the candidate became active, and why, as a sentence."""

    is_done: bool
    said: str


def run_evaluation(request: EvaluateRequest, listen: Listener = ignore) -> tuple[dict[str, Any], Promotion | None]:
    """The report, and what came of the promotion when one was asked for.

    Raises InvalidRequest for bad input before any model is loaded, ManyloraError when the server fails.
    """
    if request.task != "generate":
        report = run_task(request, _names_of(request.adapters), listen)
        if request.card:
            _write_cards(request, report)
        return report, None
    dataset, metrics = _check(request)
    tokenizer, context_length = load_tokenizer(request.model)
    encoder = Encoder(
        tokenizer, render=request.render, instruction=request.instruction, max_length=request.max_length,
        tool_prompt=request.tool_prompt,
    )  # fmt: skip
    room = context_length - 1 if request.server else context_length  # a server is asked for one token more
    encoded = encoder.encode(dataset, context_length=room)
    tell_lengths("`data`", encoded, listen)
    _check_room(request, encoded, metrics, context_length, listen)
    run = _Run(request, dataset, metrics, encoder, encoded, listen)
    if request.server:
        return _on_server(run)
    base = load_base(request.model, device=request.device, dtype=request.dtype, max_length=request.max_length)
    check_known(encoded, base.num_embeddings)
    with memory_faults("Evaluate fewer adapters at once, or shorten `max_length`."):
        local = LocalContenders(base, encoder, _names_of(request.adapters), with_base=request.with_base)
        report = run.score(local)
    if request.card:
        _write_cards(request, report)
    return report, None


@dataclass(frozen=True, slots=True)
class _Run:
    """A checked request with its data, for whichever contenders."""

    request: EvaluateRequest
    dataset: Dataset
    metrics: tuple[str, ...]
    encoder: Encoder
    encoded: list[Encoded]
    listen: Listener

    def score(self, contenders: Contenders) -> dict[str, Any]:
        request = self.request
        config = EvaluateConfig(request.data, self.metrics, request.max_tokens, request.seed, request.out)
        path = None if request.out is None else request.out.parent / f".{request.out.name}.evaluate.json"
        journal = Journal(
            path, _fingerprint(request, contenders), resume=request.resume, overwrite=request.overwrite,
            what="evaluation",
        )  # fmt: skip
        report = evaluate(config, self.dataset, self.encoded, contenders, self.metrics, journal, self.listen)
        journal.discard()
        return report


def _on_server(run: _Run) -> tuple[dict[str, Any], Promotion | None]:
    request = run.request
    with connect(request.server, request.key, is_patient=True) as server:
        if request.promote_if_better:
            return _promote_if_better(run, server)
        names = tuple(pinned(server, adapter) for adapter in request.adapters)
        return run.score(_server_contenders(run, server, names)), None


def _promote_if_better(run: _Run, server: Server) -> tuple[dict[str, Any], Promotion]:
    """Score the candidate, the last adapter, against what its name serves now; promote it if it is better."""
    request, metric = run.request, run.request.promote_if_better
    check_may_manage(server)
    candidate = request.adapters[-1]
    name = candidate.partition("@")[0]
    active = active_version(server, name)
    if active == candidate:
        raise InvalidRequest(f"{candidate} is the active version of {name} already: there is nothing to promote.")
    others = [pinned(server, adapter) for adapter in request.adapters[:-1]]
    names = dict.fromkeys([*([active] if active else []), *others, candidate])
    if len(names) + request.with_base < 2:
        raise InvalidParameter(f"{name} has no active version to compare with: give `with_base` or more `adapters`.")
    contenders = _server_contenders(run, server, tuple(names), reference=active)
    report = run.score(contenders)
    test = comparison(report, candidate, metric)
    facts = f"{metric} gain {test.gain:+.4g} over {report['reference']} (p = {test.p:.2g})"
    if not deserves_promotion(test, request.min_gain):
        needed = f"needed at least {request.min_gain:g} with p < 0.05"
        return report, Promotion(False, f"{candidate} was not promoted: {facts}, {needed}.")
    if active_version(server, name) != active or not _promoted(server, candidate, active):
        why = f"another version of {name} became active meanwhile. Run it again"
        return report, Promotion(False, f"{candidate} was not promoted: {why}.")
    return report, Promotion(True, f"{candidate} was promoted: {facts}.")


def _promoted(server: Server, candidate: str, active: str | None) -> bool:
    """Promote the candidate in the place of the active version; False where another one is active by now."""
    try:
        promote(server, candidate, instead_of=active)
    except Refused as refused:
        if refused.answered != _CONFLICT:
            raise
        return False
    return True


def _server_contenders(
    run: _Run, server: Server, names: tuple[str, ...], *, reference: str | None = None
) -> ServerContenders:
    """`reference` comes first, then the base where it is wanted, then the others."""
    first = (reference,) if reference else ()
    base = (BASE,) if run.request.with_base else ()
    rest = tuple(name for name in names if name != reference)
    contenders = ServerContenders(server, served_base(server), (*first, *base, *rest), run.encoder)
    contenders.check_tokenizer()
    return contenders


def _check(request: EvaluateRequest) -> tuple[Dataset, tuple[str, ...]]:
    if not request.adapters and not request.with_base:
        raise InvalidParameter("Nothing to evaluate: give `adapters` or `with_base`.")
    if request.max_tokens <= 0:
        raise InvalidParameter(f"`max_tokens` must be positive, not {request.max_tokens}.")
    if request.max_length <= 0:
        raise InvalidParameter(f"`max_length` must be positive, not {request.max_length}.")
    if not 0 <= request.seed < 2**32:
        raise InvalidParameter(f"`seed` must be from 0 to 2**32 - 1, not {request.seed}.")
    if request.resume and request.out is None:
        raise InvalidParameter("`resume` goes on where an evaluation with the same `out` stopped: give `out`.")
    if request.out is not None:
        refuse_existing(request.out, overwrite=request.overwrite)
    dataset, metrics = evaluation_data(request.data, request.metrics, request.reading)
    _check_extras(request, dataset)
    if request.promote_if_better:
        _check_promotion(request, metrics)
    if request.card and request.server:
        raise InvalidParameter("`card` writes into folders of adapters: evaluate those, without `server`.")
    if not request.server:
        for folder in request.adapters:
            read_adapter_files(Path(folder))
            if request.card:
                _card_in(Path(folder))
    return dataset, metrics


def _card_in(folder: Path) -> str:
    """The folder's card, or the title of one that there is not. Raises InvalidParameter where it is no UTF-8 text."""
    path = folder / CARD_FILE
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else f"# {folder.resolve().name}\n"
    except UnicodeDecodeError as error:
        raise InvalidParameter(f"{path} is no UTF-8 text, so `card` cannot write into it. Convert it first.") from error


def _write_cards(request: EvaluateRequest, report: dict[str, Any]) -> None:
    """Put the scores into each adapter's card, in the place of earlier ones. Raises OSError."""
    for name, folder in _names_of(request.adapters).items():
        path = folder / CARD_FILE
        before = _card_in(folder)
        with atomic_file(path) as draft:
            text = with_section(before, SCORES, scores_table(report, name), before=MADE)
            draft.write_text(text, encoding="utf-8")


def _check_extras(request: EvaluateRequest, dataset: Dataset) -> None:
    """Raises InvalidRequest where a package is missing that scores, answers or pictures would need in the end."""
    modules = [] if request.server or not request.adapters else ["peft"]
    if dataset.shape == "label":
        modules += ["sklearn"] if request.out is None else ["sklearn", "matplotlib"]
    need(*modules)


def _check_promotion(request: EvaluateRequest, metrics: Sequence[str]) -> None:
    if not request.server:
        raise InvalidParameter("`promote_if_better` promotes on a server: give `server`.")
    if request.promote_if_better not in metrics:
        raise InvalidParameter(f"`promote_if_better` must be one of the metrics computed: {', '.join(metrics)}.")
    if not (math.isfinite(request.min_gain) and request.min_gain >= 0):
        raise InvalidParameter(f"`min_gain` must not be negative, and it is {request.min_gain}.")
    if not request.adapters:
        raise InvalidParameter("`promote_if_better` needs a candidate: give `adapters` with NAME@VERSION.")
    if not request.adapters[-1].partition("@")[2].isdigit():
        raise InvalidRequest(f"The candidate {request.adapters[-1]!r} must name its version, as in NAME@2.")


def _check_room(
    request: EvaluateRequest, encoded: Sequence[Encoded], metrics: Sequence[str], context_length: int, listen: Listener
) -> None:
    """Raises InvalidRequest when a prompt and an answer of `max_tokens` do not fit the model together."""
    if set(metrics) == {"perplexity"}:
        return
    longest = max(encoded, key=lambda e: len(e.prompt_ids))
    if len(longest.prompt_ids) + request.max_tokens > context_length:
        raise InvalidParameter(
            f"The prompt of row {longest.example.row} has {len(longest.prompt_ids)} tokens; with `max_tokens` "
            f"{request.max_tokens} that is more than the {context_length} that the model can hold."
        )
    cut = sum(e.num_answer_tokens > request.max_tokens for e in encoded)
    if cut:
        message = f"{cut} right answers are longer than `max_tokens` {request.max_tokens}: they cannot be given."
        listen(Progress("warning", message=message))


def _fingerprint(request: EvaluateRequest, contenders: Contenders) -> str:
    """What answers and likelihoods depend on: the data, the prompts' form, and who is asked."""
    parts = [contenders.names, request.max_tokens, request.max_length, request.render, request.instruction]
    parts += [request.model, request.server, request.dtype]
    if request.reading != AS_IT_IS or request.tool_prompt:
        parts += [asdict(request.reading), request.tool_prompt]
    digest = hashlib.sha256(json.dumps(parts).encode() + bytes_of(request.data))
    if not request.server:
        for folder in request.adapters:
            digest.update((Path(folder) / TENSOR_FILE).read_bytes())
    return digest.hexdigest()


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
