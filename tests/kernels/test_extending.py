"""The examples of docs/extending.md do what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import build_rig, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.lora.test_torch_kernel import Fleet
from tests.tiny_adapters import make_adapter

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's examples define, run one after the other."""
    names: dict[str, Any] = {}
    sections = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    for section in sections:
        if section.startswith(("A low-rank kernel\n", "A backend\n")):
            for example in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
                exec(compile(example, str(PAGE), "exec"), names)
    return names


def test_the_low_rank_kernel_agrees_with_the_reference(page: dict[str, Any]) -> None:
    ranks = [{0: 8, 1: 4, 2: 16}, {0: 3}, {1: 8}, {2: 1}]
    made = Fleet(page["LoopKernel"](), (24, 17, 40), ranks)
    made.check([*made.slots, -1, *reversed(made.slots), made.slots[0]], made.group())


@pytest.mark.parametrize("name", ["backend", "slowest"])
def test_the_backend_serves_adapters_and_the_base_in_one_batch(
    page: dict[str, Any], name: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", rank=2)
    rig = build_rig(load(tiny_llama_dir), {"tuned": adapter}, kernel=page[name])
    prompt = [3, 14, 15, 92, 65]
    for request, used in (("base", None), ("tuned", "tuned")):
        rig.add(request, prompt, used, max_tokens=4)
    rig.run()
    rig.close()
    for request, folder in (("base", None), ("tuned", adapter)):
        check_greedy(with_adapter(tiny_llama_dir, folder), prompt, rig.tokens(request))
