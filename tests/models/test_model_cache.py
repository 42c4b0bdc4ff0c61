"""The cache of converted models: whole or absent, one builder at a time, damage is noticed."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manylora.errors import ModelUnusable
from manylora.models.model_cache import ModelCache, is_whole, sampled_digest


def write_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 20_000)
    (folder / "config.json").write_text("{}")


def refuse(folder: Path) -> None:
    raise AssertionError("built again")


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path / "a" / "b")

    folder = cache.get("m", write_model)

    assert cache.get("m", refuse) == folder
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "changed", "removed", "unlisted", "no manifest"])
def test_a_damaged_folder_is_built_again(tmp_path: Path, damage: str) -> None:
    cache = ModelCache(tmp_path)
    weights = cache.get("m", write_model) / "model.safetensors"
    if damage == "truncated":
        os.truncate(weights, 4_000_000)
    elif damage == "emptied":
        weights.write_bytes(bytes(weights.stat().st_size))
    elif damage == "changed":
        (tmp_path / "m" / "config.json").write_text("[]")
    elif damage == "removed":
        weights.unlink()
    elif damage == "unlisted":
        (tmp_path / "m" / "extra.json").write_text("{}")
    else:
        (tmp_path / "m" / "manifest.json").unlink()
    assert not is_whole(tmp_path / "m")

    folder = cache.get("m", write_model)

    assert is_whole(folder)
    assert weights.stat().st_size == 256 * 20_000


def test_a_failed_build_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_model(folder)
        raise ModelUnusable("no such weights")

    with pytest.raises(ModelUnusable, match="no such weights"):
        ModelCache(tmp_path).get("m", fail)

    assert [p.name for p in tmp_path.iterdir()] == ["m.lock"]


def test_a_cache_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ModelUnusable, match="XDG_CACHE_HOME"):
        ModelCache(tmp_path / "file" / "models").get("m", write_model)


def test_a_disk_that_is_full_is_explained(tmp_path: Path) -> None:
    def fill_up(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelUnusable, match="No space left on device"):
        ModelCache(tmp_path).get("m", fill_up)


def test_two_at_once_build_once_and_the_second_is_told_to_wait(tmp_path: Path) -> None:
    is_building, may_finish, is_waiting = threading.Event(), threading.Event(), threading.Event()
    cache, found = ModelCache(tmp_path), []

    def slow(folder: Path) -> None:
        is_building.set()
        assert may_finish.wait(30)
        write_model(folder)

    first = threading.Thread(target=lambda: found.append(cache.get("m", slow)))
    first.start()
    assert is_building.wait(30)
    second = threading.Thread(target=lambda: found.append(cache.get("m", refuse, on_wait=is_waiting.set)))
    second.start()
    assert is_waiting.wait(30)
    may_finish.set()
    first.join(30)
    second.join(30)

    assert found == [tmp_path / "m"] * 2


def test_a_kill_in_the_middle_leaves_no_model_and_no_lock(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from manylora.models.model_cache import ModelCache
def build(folder):
    (folder / "model.safetensors").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(600)
ModelCache(Path(sys.argv[1])).get("m", build)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "m").exists()

    folder = ModelCache(tmp_path).get("m", write_model)

    assert is_whole(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.lock"]


def test_a_sample_covers_small_files_wholly_and_the_ends_of_large_ones(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(100))
    large.write_bytes(bytes(5_000_000))
    digests = {sampled_digest(small), sampled_digest(large)}
    for path, place in ((small, 50), (large, 0), (large, 4_999_999)):
        data = bytearray(path.stat().st_size)
        data[place] = 1
        path.write_bytes(data)
        digests.add(sampled_digest(path))

    assert len(digests) == 5
