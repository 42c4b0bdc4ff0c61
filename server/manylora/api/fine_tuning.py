"""`/v1/fine_tuning/jobs`: OpenAI's routes for trainings, whose results are versions of adapters here."""

import asyncio
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from manylora.api.auth import Manager, author_of
from manylora.api.bodies import read_body
from manylora.api.fields import renamed
from manylora.api.fine_tuning_schemas import JobBody, check_goes_on, order_of
from manylora.api.json_body import documented
from manylora.api.naming import looked_up, parse_model, resolve, without_alias
from manylora.api.state import Services, ServicesDep
from manylora.catalog.service import Catalog
from manylora.database.tables import MICROSECONDS
from manylora.errors import AdapterNotFound, InvalidRequest, WrongModelType, quoted
from manylora.identity import AdapterRef, check_name
from manylora.jobs.board import Board, NewJob
from manylora.jobs.records import Event, Job
from manylora.tenants.interface import Principal
from manylora.usage.prices import Prices
from manylora.usage.report import UsageLine

__all__ = ["build_router"]

MAX_PAGE: Final = 1000
_NUMBER: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
T = TypeVar("T")
_View = Callable[[Job], dict[str, Any]]


def build_router(catalog: Catalog, board: Board, prices: Prices | None = None) -> APIRouter:
    """The routes over the board of jobs. With `prices` they say what a job has cost so far."""
    router = APIRouter(tags=["fine-tuning"])
    view = partial(_view, prices=prices)

    async def run(work: Callable[..., T], *args: Any) -> T:
        return await catalog.database.run(partial(work, *args))

    _add_submission(router, catalog, board, view)
    _add_reads(router, board, run, view)

    def add_change(action: str, change: Callable[[str, str], Job], said: str) -> None:
        async def change_job(job_id: str, caller: Manager) -> Response:
            return _private(view(await run(change, caller.tenant, job_id)))

        change_job.__doc__ = said
        path = f"/v1/fine_tuning/jobs/{{job_id}}/{action}"
        router.add_api_route(path, change_job, methods=["POST"], name=f"{action}_job")

    add_change("cancel", board.cancel, "End a job that has not ended; nothing more of it is published.")
    add_change("pause", board.pause, "Leave off after the step that runs; `resume` goes on from there.")
    add_change("resume", board.resume, "Put a paused job back into the queue.")
    return router


def _add_submission(router: APIRouter, catalog: Catalog, board: Board, view: _View) -> None:
    @router.post("/v1/fine_tuning/jobs", openapi_extra=documented("JobBody"))
    async def create_job(request: Request, caller: Manager, services: ServicesDep) -> Response:
        """Ask for a training on a file of rows, of the base or on from an adapter.

        What would end it is refused now, by its field.
        """
        body = await read_body(request, JobBody)
        try:
            start = await looked_up(partial(_start_of, body, caller, services), services.following)
        except AdapterNotFound as error:  # which is a field of this request, and not what the path names
            raise InvalidRequest(error.message, param="model") from None
        new = _new_job(body, caller, services, catalog.base, start)
        if start is not None:
            await asyncio.to_thread(board.check_start, start, catalog.local_folder)
        return _private(view(await catalog.database.run(partial(board.submit, new))))


def _start_of(body: JobBody, caller: Principal, services: Services) -> AdapterRef | None:
    """The version that `model` names, None for the base. Raises AdapterNotFound, or InvalidRequest for a mix."""
    base, aliases = services.engine.model.name, services.settings.resolved_model_aliases
    named = without_alias(services.directory, caller.tenant, base, aliases, body.model)
    wanted = parse_model(named, base)
    if wanted is None:
        return None
    check_goes_on(body)
    return resolve(services.directory, caller.tenant, wanted, written=body.model, param="model")


def _new_job(body: JobBody, caller: Principal, services: Services, base: str, start: AdapterRef | None) -> NewJob:
    model = services.engine.model
    if model.kind != "generate":
        raise WrongModelType("The base is an encoder, and jobs train bases that write text.", param="model")
    name = body.manylora.name or body.suffix
    if name is not None:
        try:
            check_name(name, reserved=model.name)
        except InvalidRequest as error:
            raise renamed(error, {"name": "manylora.name" if body.manylora.name else "suffix"}) from None
    order = order_of(body, services.settings, model.context_length)
    asked = body.manylora.model_dump(exclude_none=True, exclude={"name", "activate"})
    return NewJob(
        tenant=caller.tenant,
        base=base,
        order=order,
        training_file=body.training_file,
        validation_file=body.validation_file,
        name=name,
        activate=body.manylora.activate,
        metric=body.manylora.metric,
        min_gain=body.manylora.min_gain or 0.0,
        said={
            "model": body.model,
            "suffix": body.suffix,
            "metadata": body.metadata or {},
            "learning_rate_multiplier": body.chosen.learning_rate_multiplier or 1.0,
            "manylora": asked,
        },
        author=author_of(caller),
        start=start,
    )


def _add_reads(router: APIRouter, board: Board, run: Callable[..., Any], view: _View) -> None:
    @router.get("/v1/fine_tuning/jobs")
    async def list_jobs(caller: Manager, limit: _Limit = 20, after: str | None = None) -> Response:
        """The caller's jobs, newest first."""
        jobs, has_more = await run(board.page, caller.tenant, limit, after)
        return _private(_page([view(job) for job in jobs], has_more))

    @router.get("/v1/fine_tuning/jobs/{job_id}")
    async def get_job(job_id: str, caller: Manager) -> Response:
        """One job, as it stands now."""
        return _private(view(await run(board.get, caller.tenant, job_id)))

    @router.get("/v1/fine_tuning/jobs/{job_id}/events")
    async def list_events(job_id: str, caller: Manager, limit: _Limit = 20, after: str | None = None) -> Response:
        """What was told of a job, newest first: messages, and the losses of its steps (`type` `metrics`)."""
        before = None if after is None else _event_number(job_id, after)
        events, has_more = await run(board.events, caller.tenant, job_id, limit, before)
        return _private(_page([_event_view(job_id, event) for event in events], has_more))

    @router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
    async def list_checkpoints(job_id: str, caller: Manager, limit: _Limit = 10, after: str | None = None) -> Response:
        """The step that was kept: the one with the lowest loss on the validation file, else the last one.

        It is there once the job has succeeded.
        """
        job = await run(board.get, caller.tenant, job_id)
        data = [_checkpoint_view(job)] if job.status == "succeeded" else []
        if after is not None and after not in [each["id"] for each in data]:
            raise InvalidRequest(f"'after' is no checkpoint of this job: '{quoted(after)}'.", param="after")
        return _private(_page([] if after is not None else data[:limit], has_more=False))


def _page(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": has_more}


def _private(body: dict[str, Any]) -> Response:
    return JSONResponse(body, headers={"cache-control": "no-store"})


def _view(job: Job, *, prices: Prices | None) -> dict[str, Any]:
    said, order, result = job.request["said"], job.request["order"], job.result
    schedule = order["schedule"]
    hyperparameters = {
        "n_epochs": schedule["epochs"],
        "batch_size": schedule["batch_size"],
        "learning_rate_multiplier": said["learning_rate_multiplier"],
    }
    method = order.get("method", "supervised")  # of a job of an earlier release, which knew one
    more = {"beta": order["beta"]} if method == "dpo" else {}
    start = job.request.get("start")
    is_done = job.status == "succeeded"
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": _seconds(job.created),
        "estimated_finish": _seconds(job.estimated_finish),
        "finished_at": _seconds(job.finished),
        "error": dict(job.error) or None,
        "fine_tuned_model": result["label"] if is_done else None,
        "hyperparameters": hyperparameters,
        "method": {"type": method, method: {"hyperparameters": {**hyperparameters, **more}}},
        "model": said["model"],
        "organization_id": job.tenant,
        "result_files": [result["report"]] if is_done else [],
        "seed": schedule["seed"],
        "status": "running" if job.status in ("publishing", "judging") else job.status,
        "trained_tokens": result.get("tokens"),
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "integrations": None,
        "metadata": said["metadata"],
        "user_provided_suffix": said["suffix"],
        "manylora": {
            **said["manylora"],
            "name": job.request["name"],
            "activate": job.request["activate"],
            "rank": start["rank"] if start else order["lora"]["rank"],
            "started_from": start["label"] if start else None,
            "max_length": order["max_length"],
            "step": job.step,
            "tokens": job.tokens,
            "planned_tokens": job.planned_tokens or None,
            "seconds": job.microseconds / MICROSECONDS,
            "cost": None if prices is None else prices.cost(UsageLine(training_tokens=job.tokens)),
            "promotion": result.get("promotion"),
            "started_at": _seconds(job.started),
        },
    }


def _event_id(job_id: str, number: int | str) -> str:
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{number}"


def _event_number(job_id: str, event_id: str) -> int:
    """Raises InvalidRequest for what is no id of the job's events."""
    start = _event_id(job_id, "")
    number = event_id.removeprefix(start)
    if not event_id.startswith(start) or _NUMBER.fullmatch(number) is None:
        raise InvalidRequest(f"'after' is no event of this job: '{quoted(event_id)}'.", param="after")
    return int(number)


def _event_view(job_id: str, event: Event) -> dict[str, Any]:
    return {
        "id": _event_id(job_id, event.number),
        "object": "fine_tuning.job.event",
        "created_at": _seconds(event.created),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": dict(event.data) or None,
    }


def _checkpoint_view(job: Job) -> dict[str, Any]:
    result = job.result
    losses = {"train_loss": result["train_loss"], "full_valid_loss": result["best_eval_loss"]}
    return {
        "id": f"ftckpt-{job.id.removeprefix('ftjob-')}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": _seconds(job.finished),
        "fine_tuned_model_checkpoint": result["label"],
        "fine_tuning_job_id": job.id,
        "step_number": result["best_step"],
        "metrics": {"step": result["best_step"], **{name: loss for name, loss in losses.items() if loss is not None}},
    }


def _seconds(microseconds: int | None) -> int | None:
    return None if microseconds is None else microseconds // MICROSECONDS
