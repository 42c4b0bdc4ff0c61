"""`/openapi.json`: a sound document that knows the key, with a request for each route that runs as it stands."""

from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate

from manylora.api.examples import BODIES, PARAMETERS
from manylora.settings import Settings
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from tests.catalog.rig import running, sound_files, write_sound

pytestmark = pytest.mark.anyio
# What cannot be tried here, without a hub, a model, a classifier and sound; and what takes the adapter away.
ELSEWHERE = {
    "POST /v1/adapters",
    "POST /v1/files",
    "GET /v1/adapters/{name}/versions/{n}/inspection",
    "POST /v1/classify",
    "POST /classify",
    "POST /v1/audio/transcriptions",
    "POST /v1/audio/translations",
    "POST /v1/question-answering",
}
LAST = ("POST /v1/unload_lora_adapter", "POST /v1/fine_tuning/jobs/{job_id}/cancel")


async def test_the_document_is_sound_and_every_route_knows_the_key(settings: Settings) -> None:
    async with running(settings) as rig:
        schema = (await rig.call("GET", "/openapi.json")).json()
    validate(schema)
    assert schema["security"] == [{"key": []}, {"x-api-key": []}]
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    open_paths = {
        path
        for path, operations in schema["paths"].items()
        if any(each.get("security") == [] for each in operations.values())
    }
    assert open_paths == {"/health", "/ready", "/ping", "/version", "/api/version"}
    without = [
        f"{method.upper()} {path}"
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
        if method in ("post", "patch", "put")
        and "application/json" in operation.get("requestBody", {}).get("content", {})
        and "example" not in operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    ]
    assert without == [], "each body has an example"
    assert "HTTPValidationError" not in schema["components"]["schemas"]


async def test_every_example_runs(settings: Settings, tmp_path: Path) -> None:
    loaded = write_sound(tmp_path / "allowed" / "loaded", 5.0)
    allowing = settings.model_copy(update={"import_allow": (f"file://{tmp_path / 'allowed'}",)})
    async with running(allowing, "ops:admin") as rig:
        for seed in (1.0, 2.0, 3.0):
            await rig.push("billing", {**sound_files(seed), "README.md": b"# Bills"}, "ops:admin")
        canary = "PUT /v1/adapters/{name}/canary"  # one that is to be shown before it is begun by its example
        await rig.call("PUT", "/v1/adapters/billing/canary", "ops:admin", json=BODIES[canary])
        key, _ = KeyStore(rig.catalog.database).create("acme", Role.USER)
        schema = (await rig.call("GET", "/openapi.json")).json()
        rows = {"file": ("rows.jsonl", b'{"prompt": "1+1=", "completion": "2"}\n')}
        file = await rig.call("POST", "/v1/files", "ops:admin", data={"purpose": "fine-tune"}, files=rows)
        asked_for = {**BODIES["POST /v1/fine_tuning/jobs"], "training_file": file.json()["id"]}
        job = await rig.call("POST", "/v1/fine_tuning/jobs", "ops:admin", json=asked_for)
        values = {**PARAMETERS, "key_id": key.id, "file_id": file.json()["id"], "job_id": job.json()["id"]}
        routes = [f"{method.upper()} {path}" for path, operations in schema["paths"].items() for method in operations]
        asked = [route for route in routes if not route.startswith("DELETE") and route not in ELSEWHERE]
        failed = {}
        for route in sorted(asked, key=lambda each: (each in LAST, each)):
            method, _, path = route.partition(" ")
            body: dict[str, Any] | None = dict(BODIES[route]) if route in BODIES else None
            if route == "POST /v1/fine_tuning/jobs":
                body = asked_for
            if route == "POST /v1/load_lora_adapter":
                body = {**BODIES[route], "lora_path": str(loaded)}
            answer = await rig.call(method, path.format(**values), "ops:admin", json=body)
            if answer.status_code >= 400:
                failed[route] = answer.text
        assert failed == {}
        assert len(asked) > 40


async def test_the_schema_of_an_upload_names_its_fields(settings: Settings) -> None:
    async with running(settings) as rig:
        schema = (await rig.call("GET", "/openapi.json")).json()
    content = schema["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]
    fields = content["multipart/form-data"]["schema"]["properties"]
    assert {"name", "description", "pinned", "activate", "note"} == set(fields) - {"files", "archive"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_adapter_size=4 * 2**20)
