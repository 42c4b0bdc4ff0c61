"""Jobs that learn from preferences, or go on from an adapter, as they are asked for over HTTP."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from manylora.database.tables import JobRow, VersionRow
from manylora.jobs.order import Order
from manylora.jobs.queue import JobQueue, Spent
from manylora.settings import Settings
from tests.catalog.rig import Rig, files_of, running, write_sound

from .test_over_http import lines, rig, submit, upload, uploaded

__all__ = ["rig"]

pytestmark = pytest.mark.anyio


async def test_preferences_are_learnt_by_their_method_alone(rig: Rig) -> None:
    pairs = [{"prompt": "hi", "chosen": "hello", "rejected": "what"}]
    answer = await upload(rig, lines(pairs))
    assert answer.json()["manylora"] == {"rows": 1, "shape": "preference"}
    file_id = answer.json()["id"]
    refused = await submit(rig, file_id)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "method.type")
    judged = await submit(
        rig, file_id, method={"type": "dpo"}, validation_file=file_id, manylora={"activate": "if_better"}
    )
    assert judged.json()["error"]["param"] == "manylora.activate"

    chosen = {"beta": 0.5, "learning_rate_multiplier": 2}
    taken = await submit(rig, file_id, method={"type": "dpo", "dpo": {"hyperparameters": chosen}})
    assert taken.json()["method"] == {
        "type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 3, "batch_size": 8, **chosen}},
    }  # fmt: skip
    with rig.catalog.database.read() as session:
        order = Order.of(session.execute(select(JobRow.request)).scalar_one()["order"])
    assert (order.method, order.beta) == ("dpo", 0.5)
    assert order.schedule.lr == pytest.approx(1e-4)


async def test_a_job_tells_of_what_it_has_taken_so_far(settings: Settings) -> None:
    async with running(settings.model_copy(update={"price_training": 0.5}), "acme:manager") as priced:
        job_id = (await submit(priced, await uploaded(priced))).json()["id"]
        queue = JobQueue(priced.catalog.database)
        claim = queue.claim("w1", priced.catalog.base)
        assert claim is not None
        assert queue.plan(claim, 9_000)
        queue.renew(claim, step=3, spent=Spent(3_000, 2_500_000))
        found = (await priced.call("GET", f"/v1/fine_tuning/jobs/{job_id}", "acme:manager")).json()["manylora"]
        told = [found[name] for name in ("step", "tokens", "planned_tokens", "seconds", "cost")]
        assert told == [3, 3_000, 9_000, 2.5, 1.5]


async def test_a_job_goes_on_from_an_adapter_that_the_tenant_may_use(rig: Rig) -> None:
    file_id = await uploaded(rig)
    assert (await rig.push("mine", who="acme:manager")).status_code == 201
    assert (await rig.push("secret", who="other:manager")).status_code == 201
    for model, more, param in (
        ("mine@9", {}, "model"),
        ("secret", {}, "model"),
        ("other/secret", {}, "model"),
        ("mine", {"manylora": {"rank": 4}}, "manylora.rank"),
        ("mine", {"method": {"type": "dpo"}}, "method.type"),
    ):
        refused = await submit(rig, file_id, model=model, **more)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
    taken = (await submit(rig, file_id, model="mine")).json()
    version = (await rig.call("GET", "/v1/adapters/mine/versions/1", "acme:manager")).json()
    assert taken["model"] == "mine"
    assert (taken["manylora"]["started_from"], taken["manylora"]["rank"]) == ("mine@1", version["rank"])
    saved = {"name": "both", "mix": [{"name": "mine", "weight": 0.5}]}
    assert (await rig.call("POST", "/v1/adapters", "acme:manager", json=saved)).status_code == 201
    assert (await submit(rig, file_id, model="both")).json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_lora_weights": "eva"}, "init_lora_weights eva"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"lora_alpha": ...}, "lora_alpha"),
    ],
)
async def test_no_job_goes_on_from_an_adapter_that_training_would_refuse(
    rig: Rig, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    odd = await rig.push("odd", files_of(write_sound(tmp_path / "odd", **changes)), "acme:manager")
    assert odd.status_code == 201, odd.text
    refused = await submit(rig, await uploaded(rig), model="odd")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model"), refused.text
    message = refused.json()["error"]["message"]
    assert message.startswith("'odd@1' is no")
    assert said in message
    assert str(rig.settings.data_dir) not in message
    assert (await rig.call("GET", "/v1/fine_tuning/jobs", "acme:manager")).json()["data"] == []


async def test_no_job_goes_on_from_a_classifier(rig: Rig) -> None:
    assert (await rig.push("labels", who="acme:manager")).status_code == 201
    with rig.catalog.database.write(None) as session:
        session.execute(update(VersionRow).values(head="SEQ_CLS"))
    refused = await submit(rig, await uploaded(rig), model="labels")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model"), refused.text
    assert "a head for SEQ_CLS" in refused.json()["error"]["message"]
