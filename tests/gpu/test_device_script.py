"""The script for a device, on the CPU: what it says, and that a part which fails is told and stops no other."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import device


def test_deltas_are_held_against_float64() -> None:
    lines = list(itertools.islice(device.right(torch.device("cpu")), 6))
    assert {line["dtype"] for line in lines} == {"torch.float32", "torch.bfloat16", "torch.float16"}
    assert {line["formats"] for line in lines} == {1, 4}


def test_a_part_that_fails_or_takes_too_long_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = """if sys.argv[-1] != "lora":
    print(json.dumps({"what": "copy", "gb_s": 12.3456}), flush=True)
if sys.argv[-1] == "step":
    time.sleep(60)
sys.exit(3 * (sys.argv[-1] == "lora"))"""
    script = tmp_path / "part"
    script.write_text(f"#!{sys.executable}\nimport json, sys, time\n{program}\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    out = tmp_path / "device.json"
    flags = ["--device", "cpu", "--only", "step,lora,serve", "--minutes", "0.1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["device", *flags])

    assert device.main() == 1

    outcomes = {line["part"]: line["outcome"] for line in json.loads(out.read_text()) if "outcome" in line}
    assert outcomes == {"step": "not done after 3 s", "lora": "ended with 3", "serve": "done"}
    assert capsys.readouterr().out.count("copy  gb_s 12.3") == 2


def test_an_unknown_part_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["device", "--device", "cpu", "--only", "lora,lorra"])
    with pytest.raises(SystemExit):
        device.main()
    assert "no part lorra; there are ceilings, right" in capsys.readouterr().err
