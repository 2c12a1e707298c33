"""Every environment variable, typed, with one prefix (GRAFT_); frozen, and refused when unsafe."""

import hashlib
import os
import re
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AnyHttpUrl,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from core.errors import GraftError, nearest

# The kernel takes no longer names for Unix sockets.
_SOCKET_PATH_MAX = 100
_KEY = re.compile(r"gr_[0-9a-f]{12}_[A-Za-z0-9_-]{24,128}")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Settings(BaseSettings):
    """Read once per process with `load()`. Paths below `home` are the defaults of everything."""

    model_config = SettingsConfigDict(env_prefix="GRAFT_", env_ignore_empty=True, frozen=True, extra="forbid")

    home: Path = Field(Path(".graft"), description="Folder of everything that has no place of its own.")
    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8000, ge=1, le=65535, description="Port the API listens on.")
    database_url: SecretStr | None = Field(
        None, description="SQLAlchemy URL; default: SQLite in the home folder."
    )
    broker_url: SecretStr | None = Field(
        None, description="Redis-protocol URL; default: the private server of `graft up`."
    )
    storage_url: str | None = Field(
        None, description="Folder or s3://bucket/prefix of data sets, checkpoints and adapters."
    )
    s3_endpoint_url: str | None = Field(
        None, description="Endpoint of an S3-compatible server; keys come from AWS_*."
    )
    models_dir: Path | None = Field(
        None, description="Folder of base models; default: models in the home folder."
    )
    models: dict[str, str] = Field({}, description='Further base models, JSON {"name": "folder or hub id"}.')
    default_model: str = Field(SMOLLM2, description="Base model of a job that names none.")
    allow_hub: bool = Field(
        True,
        description="Fetch base models that are not in the catalogue from the Hugging Face hub.",
    )
    engine_url: str = Field("http://127.0.0.1:8001", description="Inference engine with the OpenAI wire.")
    engine_key: SecretStr | None = Field(None, description="Bearer key the engine asks for.")
    engine_bits: int = Field(4, description="Precision of the served base model: 4 (NF4, as trained) or 16.")
    engine_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="The numbers the engine computes with; float32 gives a seed the same text in any company.",
    )
    engine_adapter_bytes: int = Field(2**30, ge=1, description="Memory of the engine for adapters.")
    engine_prefix_bytes: int = Field(
        2**28, ge=0, description="Memory of the engine for prompts' beginnings that may come again."
    )
    engine_cache_bytes: int | None = Field(
        None,
        ge=1,
        description="Memory of the engine for answers being written; default: a share of what is free.",
    )
    engine_running: int = Field(32, ge=1, description="Answers the engine writes at a time.")
    engine_waiting: int = Field(128, ge=8, description="Answers that may wait for them.")
    engine_answer_seconds: float = Field(600, gt=0, description="The longest that an answer may take.")
    engine_idle_seconds: float = Field(
        0, ge=0, description="Idle for so long, the engine gives its memory back; 0: never."
    )
    admin_key: SecretStr | None = Field(
        None, description="First admin key, where none exists yet; `graft up` makes one itself."
    )
    lease_seconds: float = Field(90, gt=0, description="A worker silent for so long has lost its job.")
    heartbeat_seconds: float = Field(5, gt=0, description="How often a worker renews its lease.")
    sweep_seconds: float = Field(5, gt=0, le=10, description="How often lost and unsent jobs are looked for.")
    max_crashes: int = Field(5, ge=1, description="Crashes after which a job fails for good.")
    stall_seconds: float = Field(
        1800, gt=0, description="A trainer without any report for so long is ended and tried again."
    )
    worker_slots: int = Field(1, ge=1, description="Jobs one worker runs at a time.")
    trainer_processes: int = Field(
        1, ge=1, le=64, description="Processes that train a job together, each on a GPU of its own."
    )
    trainer_sharding: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp: each of them holds the whole model; fsdp: each holds a part of it."
    )
    upload_max_bytes: int = Field(2 * 1024**3, ge=1, description="Largest data set file.")
    unpacked_max_bytes: int = Field(8 * 1024**3, ge=1, description="Largest data set file once unpacked.")
    line_max_bytes: int = Field(4 * 1024**2, ge=1, description="Longest line of a data set file.")
    rows_max: int = Field(10_000_000, ge=1, description="Most rows of a data set.")
    columns_max: int = Field(256, ge=1, description="Most columns of a data set.")
    nesting_max: int = Field(32, ge=1, le=200, description="Deepest nesting of a row.")
    log_level: str = Field("INFO", description="Python log level.")

    @field_validator("home", "models_dir", mode="after")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().resolve()

    @field_validator("storage_url")
    @classmethod
    def _folder_or_bucket(cls, url: str | None) -> str | None:
        if url is None or url.startswith("s3://"):
            return url
        if "://" in url:
            raise ValueError("must be a folder or s3://bucket/prefix")
        return str(Path(url).expanduser().resolve())

    @field_validator("engine_url")
    @classmethod
    def _address(cls, url: str) -> str:
        TypeAdapter(AnyHttpUrl).validate_python(url)
        return url

    @field_validator("engine_key")
    @classmethod
    def _sendable(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not (
            key.get_secret_value().isascii() and key.get_secret_value().isprintable()
        ):
            raise ValueError("must be printable ASCII: it is sent in a header")
        return key

    @field_validator("engine_bits")
    @classmethod
    def _bits(cls, bits: int) -> int:
        if bits not in (4, 16):
            raise ValueError("must be 4 or 16")
        return bits

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.lease_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                "GRAFT_LEASE_SECONDS must be at least three times GRAFT_HEARTBEAT_SECONDS: "
                "one late heartbeat must not lose a job"
            )
        if self.broker_url and urlsplit(self.broker_url.get_secret_value()).scheme not in (
            "redis",
            "rediss",
            "redis+socket",
            "unix",
        ):
            raise ValueError("GRAFT_BROKER_URL must be redis://, rediss:// or redis+socket://")
        if self.admin_key and not _KEY.fullmatch(self.admin_key.get_secret_value()):
            raise ValueError(
                "GRAFT_ADMIN_KEY must have the form gr_<12 hex digits>_<at least 24 letters and digits>"
            )
        return self

    @cached_property
    def database(self) -> str:
        if self.database_url is None:
            return f"sqlite:///{self.home / 'graft.db'}"
        url = self.database_url.get_secret_value()
        for short in ("postgresql://", "postgres://"):
            if url.startswith(short):
                return "postgresql+psycopg://" + url.removeprefix(short)
        return url

    @cached_property
    def broker(self) -> str:
        if self.broker_url:
            return self.broker_url.get_secret_value()
        return f"redis+socket://{self.broker_socket}"

    @cached_property
    def broker_socket(self) -> Path:
        path = self.home / "run" / "broker.sock"
        if len(os.fsencode(path)) < _SOCKET_PATH_MAX:
            return path
        short = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"graft-{os.getuid()}-{short}" / "broker.sock"

    @cached_property
    def storage(self) -> str:
        return self.storage_url or str(self.home / "storage")

    @cached_property
    def models_folder(self) -> Path:
        return self.models_dir or self.home / "models"

    @property
    def uploads(self) -> Path:
        """Where uploads are received: beside the rest, since /tmp is memory on many machines."""
        return self.home / "uploads"

    @property
    def scratch(self) -> Path:
        """Where running jobs work; nothing in it is needed once its process has ended."""
        return self.home / "runs"


def load(**overrides: Any) -> Settings:
    """The settings of this process.

    Raises:
        GraftError: `invalid_settings`, one line per wrong or unknown variable.
    """
    known = {f"GRAFT_{name.upper()}" for name in Settings.model_fields}
    # GRAFT_CLIENT_… is the command's, which may stand in the same environment.
    unknown = [
        name for name in os.environ if name.startswith("GRAFT_") and not name.startswith("GRAFT_CLIENT_")
    ]
    unknown = [name for name in unknown if name not in known]
    lines = [
        f"{name} is not a setting" + (f"; did you mean {near}?" if (near := nearest(name, known)) else ".")
        for name in unknown
    ]
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        for problem in error.errors(include_input=False, include_url=False):
            name = "_".join(str(part) for part in problem["loc"]).upper()
            lines.append((f"GRAFT_{name}: " if name else "") + problem["msg"].removeprefix("Value error, "))
    if lines:
        raise GraftError("invalid_settings", "\n".join(lines))
    return settings
