import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from attribution.errors import InvalidRequest
from server.settings import (
    ENV_PREFIX,
    Settings,
    bound_spinning,
    environment_without_settings,
    is_loopback,
    load_settings,
    refuse_open_host,
    show_value,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that no sightline.toml is found but a test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_line_beats_the_environment_which_beats_the_file_which_beats_the_default(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    assert load_settings().port == 8000
    (elsewhere / "sightline.toml").write_text("port = 8001\nmax_queue = 5")
    assert load_settings().port == 8001
    monkeypatch.setenv("SIGHTLINE_PORT", "8002")
    assert load_settings().port == 8002
    assert load_settings(port=8003).port == 8003
    assert load_settings(port=8003).max_queue == 5


def test_the_class_itself_reads_the_same_sources(elsewhere: Path):
    (elsewhere / "sightline.toml").write_text('device = "cuda:1"')
    assert Settings().device == "cuda:1"  # pyright: ignore[reportCallIssue]


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().port = 1


def test_an_unknown_name_in_the_file_is_refused_with_the_nearest_one(elsewhere: Path):
    (elsewhere / "sightline.toml").write_text("max_bach = 3")
    with pytest.raises(InvalidRequest, match=r"'max_bach' in sightline.toml; did you mean max_batch\?"):
        load_settings()


def test_an_unknown_variable_is_refused_because_it_could_be_a_misspelt_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIGHTLINE_APIKEY", "secret")
    with pytest.raises(InvalidRequest, match=r"SIGHTLINE_APIKEY; did you mean api_key\?") as refusal:
        load_settings()
    assert "secret" not in str(refusal.value)


def test_a_file_that_is_no_toml_is_refused_with_the_line(elsewhere: Path):
    (elsewhere / "sightline.toml").write_text("port = 1\nhost = = 2\n")
    with pytest.raises(InvalidRequest, match=r"sightline.toml is not TOML: .*line 2"):
        load_settings()


def test_a_wrong_value_is_refused_naming_where_it_stood(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    (elsewhere / "sightline.toml").write_text("max_queue = 0")
    monkeypatch.setenv("SIGHTLINE_MAX_BATCH", "many")
    with pytest.raises(InvalidRequest) as refusal:
        load_settings(port=70000)
    message = str(refusal.value)
    assert "--port: Input should be less than or equal to 65535 (found 70000)" in message
    assert "SIGHTLINE_MAX_BATCH: Input should be a valid integer" in message
    assert "max_queue in sightline.toml: Input should be greater than or equal to 1 (found 0)" in message
    assert "\n" not in message


def test_an_api_key_shows_in_no_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIGHTLINE_API_KEY", "hidden")
    settings = load_settings()
    assert "hidden" not in repr(settings)
    assert settings.api_key == SecretStr("hidden")
    with pytest.raises(InvalidRequest) as refusal:
        load_settings(api_key=["hidden"])
    assert "hidden" not in str(refusal.value) + repr(refusal.value.__cause__)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIGHTLINE_API_KEY", "")
    monkeypatch.setenv("SIGHTLINE_PORT", "")
    assert (load_settings().api_key, load_settings().port) == (None, 8000)


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 * 2**30), ("1.5 MiB", 1572864), ("2GB", 2 * 10**9), ("300", 300)]
)
def test_sizes_are_read_with_their_units(text: str, size: int):
    assert load_settings(max_capture_bytes=text).max_capture_bytes == size


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("90s", timedelta(seconds=90)),
        ("30m", timedelta(minutes=30)),
        ("12h", timedelta(hours=12)),
        ("7d", timedelta(days=7)),
        ("2w", timedelta(weeks=2)),
        ("0.5d", timedelta(hours=12)),
    ],
)
def test_durations_are_read_with_their_units(text: str, duration: timedelta):
    assert load_settings(activations_ttl=text).activations_ttl == duration


@pytest.mark.parametrize("text", ["7", "7 days", "-1d", "0d", "d", "9999999d"])
def test_a_duration_that_says_nothing_sensible_is_refused(text: str):
    with pytest.raises(InvalidRequest, match=r"--activations-ttl: .*like 90s, 30m, 12h, 7d or 2w"):
        load_settings(activations_ttl=text)


@pytest.mark.parametrize("text", ["0", "-5", "lots"])
def test_a_size_that_is_none_is_refused(text: str):
    with pytest.raises(InvalidRequest, match="--max-capture-bytes"):
        load_settings(max_capture_bytes=text)


def test_the_word_none_takes_a_bound_away(monkeypatch: pytest.MonkeyPatch):
    assert load_settings().activations_max_bytes == 20 * 2**30
    monkeypatch.setenv("SIGHTLINE_ACTIVATIONS_MAX_BYTES", "none")
    assert load_settings().activations_max_bytes is None


def test_a_child_process_can_be_given_an_environment_without_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIGHTLINE_PORT", "1")
    monkeypatch.setenv("SIGHTLESS", "2")
    environment = environment_without_settings()
    assert ("SIGHTLINE_PORT" in environment, environment["SIGHTLESS"]) == (False, "2")


def test_a_model_and_no_model_exclude_each_other():
    with pytest.raises(InvalidRequest, match=r"no_model and model \('demo'\) exclude each other"):
        load_settings(model="demo", no_model=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.8.7", "localhost", "LOCALHOST", "::1", "[::1]"])
def test_loopback_needs_no_key(host: str):
    assert is_loopback(host)
    refuse_open_host(load_settings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.4", "8.8.8.8", "example.org", "localhost.evil.org"])
def test_any_other_host_needs_a_key(host: str):
    with pytest.raises(InvalidRequest, match="SIGHTLINE_API_KEY") as refusal:
        refuse_open_host(load_settings(host=host))
    assert refusal.value.param == "host"
    refuse_open_host(load_settings(host=host, api_key="k"))


def test_the_example_environment_names_every_setting_with_its_default():
    lines = (ROOT / ".env.example").read_text().splitlines()
    written = dict(match.groups() for line in lines if (match := re.fullmatch(r"#? ?([A-Z_]+)=(.*)", line)))
    fields = Settings.model_fields
    assert written == {f"{ENV_PREFIX}{name.upper()}": show_value(f.default) for name, f in fields.items()}


def test_every_setting_has_a_description_of_one_line():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description, name
        assert field.description.endswith("."), name


def test_spinning_is_bounded_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")  # so that it is put back as it was
    monkeypatch.delenv("GOMP_SPINCOUNT")
    bound_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    bound_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_torch_which_reads_that_when_it_is_imported_is_not_there_when_serve_begins():
    code = "import sys, server.cli, server.commands.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
