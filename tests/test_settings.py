"""Settings: sources and their order, sizes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.errors import InvalidSettings
from manylora.settings import PROFILES, Settings, load_settings, parse_size


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MANYLORA_{name.upper()}", raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("64k", 64_000),
        ("10B", 10),
        ("25%", 0.25),
        ("0.5%", 0.005),
        ("0.25", 0.25),
        ("1.0", 1.0),
        (7, 7),
        (0.5, 0.5),
    ],
)
def test_sizes_are_bytes_or_shares(text: object, expected: float) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "0%", "-1", "101%", "12 parsecs", "GiB", "1e9", "1.5", "0.0", True, 0, -5, 1.5, None, "nan"]
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@given(st.integers(1, 2**50))
def test_a_number_of_bytes_stays_what_it_is(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == size


def test_flags_beat_the_environment_beats_the_file_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = load_settings().max_num_seqs
    (tmp_path / "manylora.toml").write_text("max_num_seqs = 3\nport = 4\nhost = 'a'\n")
    monkeypatch.setenv("MANYLORA_PORT", "5")
    monkeypatch.setenv("MANYLORA_HOST", "b")

    settings = load_settings(host="c", max_num_batched_tokens=None)

    assert (settings.max_num_seqs, settings.port, settings.host) == (3, 5, "c")
    assert default not in (3, settings.port)
    assert settings.max_num_batched_tokens == Settings().max_num_batched_tokens


def test_an_unknown_key_is_an_error_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match="colour"):
        load_settings(colour="red")

    monkeypatch.setenv("MANYLORA_COLOUR", "red")
    with pytest.raises(InvalidSettings, match="MANYLORA_COLOUR"):
        load_settings()
    monkeypatch.delenv("MANYLORA_COLOUR")

    (tmp_path / "manylora.toml").write_text("colour = 'red'\n")
    with pytest.raises(InvalidSettings, match="colour"):
        load_settings()


def test_the_clients_own_variables_are_not_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_URL", "http://localhost:8000")
    monkeypatch.setenv("MANYLORA_KEY", "secret")

    load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "http"),
        ("device", "tpu"),
        ("dtype", "int4"),
        ("max_model_len", "1"),
        ("max_num_seqs", "0"),
        ("kv_cache_memory", "lots"),
        ("drain_timeout_s", "-1"),
        ("max_rank", "100000"),
    ],
)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidSettings, match=name):
        load_settings(**{name: value})


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(InvalidSettings, match=r"port.*; .*max_slots|max_slots.*; .*port"):
        load_settings(port="x", max_slots="y")


def test_a_file_that_is_no_toml_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "manylora.toml").write_text("port = = 1\n")

    with pytest.raises(InvalidSettings, match=r"manylora\.toml"):
        load_settings()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1  # type: ignore[misc]


def test_state_lives_in_the_data_directory_unless_a_url_says_otherwise(tmp_path: Path) -> None:
    settings = load_settings(data_dir=tmp_path)

    assert settings.resolved_database_url == f"sqlite:///{tmp_path}/registry.sqlite3"
    assert settings.resolved_store_url == f"file://{tmp_path}/store"
    assert load_settings(store_url="s3://bucket/x").resolved_store_url == "s3://bucket/x"


def test_a_profile_gives_defaults_and_every_other_source_beats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manylora.toml").write_text("profile = 'small'\nmax_slots = 3\n")
    monkeypatch.setenv("MANYLORA_MAX_NUM_SEQS", "5")
    found = load_settings(adapter_memory="1GiB")
    assert (found.quantization, found.kv_cache_dtype) == ("int4", "int8")
    assert (found.max_slots, found.max_num_seqs, found.adapter_memory) == (3, 5, 2**30)
    assert load_settings(profile="default", max_slots=None).quantization == "none"
    with pytest.raises(InvalidSettings, match="profile"):
        load_settings(profile="tiny")


def test_what_only_the_profile_says_yields_and_what_somebody_gave_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_settings()
    monkeypatch.setenv("MANYLORA_KV_CACHE_DTYPE", "int8")  # which the profile says, too
    found = load_settings(profile="small", max_slots=3)
    assert found.model_fields_set == {"profile", "kv_cache_dtype", "max_slots"}
    yielded = found.yielding("quantization", "kv_cache_dtype", "max_slots")
    assert (yielded.quantization, yielded.kv_cache_dtype, yielded.max_slots) == (plain.quantization, "int8", 3)
    assert yielded.max_num_seqs == found.max_num_seqs != plain.max_num_seqs
    assert found.quantization == "int4"


@pytest.mark.parametrize("profile", list(PROFILES))
def test_profiles_name_settings_and_change_what_they_name(profile: str) -> None:
    plain = load_settings()
    for name, value in PROFILES[profile].items():
        assert getattr(load_settings(profile=profile), name) == value != getattr(plain, name)
