"""The settings of a server: one frozen value, built once, passed to the app factory.

The first source that names a field wins: the command line, then ``SIGHTLINE_…`` in the environment, then
``sightline.toml`` in the working directory, then the default. A name that no field has is refused in each of
them. The descriptions below are also the help texts of ``sightline serve``.
"""

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Collection, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from attribution.errors import InvalidRequest

ENV_PREFIX = "SIGHTLINE_"
TOML_FILE = "sightline.toml"

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_duration(value: object) -> object:
    """``"90s"``, ``"30m"``, ``"12h"``, ``"7d"`` or ``"2w"`` as a timedelta; anything else is as it was."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d+)?)\s*([smhdw])\s*", value)
    if match is None or float(match[1]) == 0:
        raise ValueError("a duration is a number above 0 and a unit, like 90s, 30m, 12h, 7d or 2w")
    return timedelta(seconds=float(match[1]) * _SECONDS[match[2]])


def _none_word(value: object) -> object:
    """The word ``none`` takes a bound away that has a default, where the source can only write strings."""
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


Bytes = Annotated[ByteSize, Field(gt=0)]
Duration = Annotated[timedelta, BeforeValidator(parse_duration), Field(gt=timedelta(0))]


class Settings(BaseSettings):
    """What `sightline serve` can be told."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        toml_file=TOML_FILE,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # one of the inputs is a key
    )

    model: str | None = Field(
        None,
        description="Model loaded at start: hub id, folder or alias; by default the embedded demo model.",
    )
    no_model: bool = Field(False, description="Start with no model loaded.")
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; other than loopback needs a key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(
        None,
        min_length=1,
        description="Key that every route but /health asks for; better set in the environment.",
    )
    device: str = Field("auto", description="Where models are put: auto, cpu, cuda or cuda:N.")
    dtype: str = Field(
        "auto",
        description="Number type of the weights: auto, float32, float64, bfloat16 or float16.",
    )
    attn_implementation: str | None = Field(None, description="Attention implementation: sdpa or eager.")
    revision: str | None = Field(None, description="Revision of the model on the hub.")
    trust_remote_code: bool = Field(False, description="Let a model run the Python code that its repository brings.")
    models_dir: Path | None = Field(None, description="Folder of models to list beside the Hugging Face cache.")
    max_batch: int = Field(16, ge=1, description="Sequences that share a forward pass; 1 repeats exactly.")
    max_queue: int = Field(256, ge=1, description="Requests that may wait for a model; one more is answered 429.")
    prefill_chunk: int = Field(512, ge=1, description="Prompt tokens processed between two decoding steps of others.")
    max_capture_bytes: Bytes = Field(
        ByteSize(4 * 1024**3), description="Most that the activations of one request may take in memory."
    )
    activations_dir: Path = Field(Path("/tmp/nnsight_activations"), description="Folder that runs are written to.")
    activations_max_bytes: Annotated[Bytes | None, BeforeValidator(_none_word)] = Field(
        ByteSize(20 * 1024**3),
        description="Bound of that folder: oldest runs are deleted first; none takes it away.",
    )
    activations_ttl: Annotated[Duration | None, BeforeValidator(_none_word)] = Field(
        None, description="Age at which a run is deleted: 90s, 30m, 12h, 7d or 2w; without it, runs are kept."
    )
    store_dir: Path = Field(Path("/tmp/nnsight_store"), description="Folder of the samples that are attributed.")
    store_ram: Bytes = Field(
        ByteSize(4 * 1024**3), description="Most of the stored samples that is kept in memory as well."
    )
    vectors_dir: Path | None = Field(
        None, description="Folder of the steering vectors; by default store_dir with _vectors after its name."
    )
    features: Path | None = Field(None, description="File that says which autoencoders there are: features.toml.")
    features_ram: Bytes = Field(
        ByteSize(8 * 1024**3),
        description="Most that the weights of autoencoders take in memory; the rest is read anew.",
    )
    max_tensor_bytes: Bytes = Field(
        ByteSize(1024**3), description="Most that the tensors of requests may have, of all under way together."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json (one object a line) or text; auto is text on a terminal and json elsewhere."
    )
    log_file: Path | None = Field(None, description="File that the log goes to as well.")

    @model_validator(mode="after")
    def _one_start(self) -> "Settings":
        if self.no_model and self.model is not None:
            raise ValueError(f"no_model and model ({self.model!r}) exclude each other: leave one out")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  the base class names them
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The order in the head of this module."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def environment_without_settings() -> dict[str, str]:
    """The environment for a server that is not to inherit the settings of this one."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}


def bound_spinning() -> None:
    """Let torch's threads wait asleep after a moment; call it before torch is imported.

    Threads of GNU OpenMP spin while they wait for each other. When another process wants the cores, a forward pass then
    takes many times as long; 10,000 turns cost nothing that can be measured on cores of one's own.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def load_settings(**given: Any) -> Settings:
    """Settings from all sources; `given` are those of the command line.

    Raises:
        InvalidRequest: a value does not fit or a name is unknown, in one line that names the source.
    """
    in_env = {name.upper() for name in os.environ if name.upper().startswith(ENV_PREFIX)}
    _refuse_unknown((name.removeprefix(ENV_PREFIX).lower(), f"the environment variable {name}") for name in in_env)
    in_file = _read_toml()
    _refuse_unknown((name, f"{name!r} in {TOML_FILE}") for name in in_file)
    try:
        return Settings(**given)
    except ValidationError as error:
        raise InvalidRequest("; ".join(_explain(error, given, in_env, in_file))) from error


def refuse_open_host(settings: Settings) -> None:
    """Refuse to listen where other machines can reach a server that asks for no key.

    Raises:
        InvalidRequest: the host is not loopback and there is no key.
    """
    if settings.api_key is None and not is_loopback(settings.host):
        raise InvalidRequest(
            f"host {settings.host} can be reached from other machines and no API key is set: set "
            f"{ENV_PREFIX}API_KEY (or --api-key), or listen on 127.0.0.1",
            param="host",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`: 127.0.0.0/8, ::1 or localhost; names are not looked up."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def show_value(value: object) -> str:
    """A field's value as one would write it on the command line; None is the empty string."""
    if value is None:
        return ""
    if isinstance(value, ByteSize):
        return value.human_readable(separator="").replace(".0", "")
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _read_toml() -> dict[str, Any]:
    """The settings file of the working directory; empty when there is none."""
    try:
        with open(TOML_FILE, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{TOML_FILE} is not TOML: {error}") from error


def _refuse_unknown(names: Iterable[tuple[str, str]]) -> None:
    for name, where in names:
        if name not in Settings.model_fields:
            close = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(Settings.model_fields)}"
            raise InvalidRequest(f"unknown setting: {where}{hint}", param=name)


def _explain(
    error: ValidationError, given: Collection[str], in_env: Collection[str], in_file: Collection[str]
) -> Iterable[str]:
    """One part a fault, each naming the source that brought the value."""
    for fault in error.errors(include_url=False):
        name = str(fault["loc"][0]) if fault["loc"] else ""
        message = fault["msg"].removeprefix("Value error, ")
        if not name:
            yield message
            continue
        if name in given:
            where = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        elif f"{ENV_PREFIX}{name.upper()}" in in_env:
            where = f"{ENV_PREFIX}{name.upper()}"
        else:
            where = f"{name} in {TOML_FILE}" if name in in_file else name
        found = "" if name == "api_key" else f" (found {fault['input']!r})"
        yield f"{where}: {message}{found}"
