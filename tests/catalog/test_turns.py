"""More adapters than slots on a real server: everybody gets its own answer, as if alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .real_server import serving
from .rig import sound_files

pytestmark = pytest.mark.slow

NAMES = [f"a{n}" for n in range(7)]
NUM_TOKENS = 48


@pytest.mark.parametrize("host_tier", ["64MiB", "1"], ids=["files in host memory", "files on disk"])
def test_adapters_that_share_too_few_slots_answer_as_they_do_alone(
    tiny_base: Path, tmp_path: Path, host_tier: str
) -> None:
    with serving(tiny_base, tmp_path / "server", max_slots=2, host_tier_memory=host_tier) as server:
        for number, name in enumerate(NAMES):
            assert server.push(name, sound_files(1.0 + number)).status_code == 201

        def ask(name: str) -> tuple[str, str]:
            body = {
                "model": name,
                "prompt": "The quick",
                "max_tokens": NUM_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            }
            response = server.client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return response.json()["choices"][0]["text"], response.headers["x-manylora-adapter"]

        alone = {name: ask(name)[0] for name in NAMES}
        assert len(set(alone.values())) > 1
        with ThreadPoolExecutor(21) as pool:
            for name, (text, answered_by) in zip(NAMES * 3, pool.map(ask, NAMES * 3), strict=True):
                assert answered_by == f"{name}@1"
                assert text == alone[name]
        stats = server.client.get("/v1/stats").json()
        assert (stats["running"], stats["waiting"]) == (0, 0)
