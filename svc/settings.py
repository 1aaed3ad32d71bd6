"""The environment, typed: every setting with its bounds, read from the environment over `svc/.env`."""

import logging
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import psycopg2
from psycopg2.extensions import parse_dsn
from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_FILE = Path(__file__).with_name(".env")


def check_database(url: SecretStr) -> SecretStr:
    """The same URL. Raises ValueError, without a word of it, if libpq cannot read it."""
    try:
        given = parse_dsn(url.get_secret_value())
    except psycopg2.Error:
        given = {"port": "unreadable"}
    # libpq quotes what it cannot read or find, here or when it connects. With a / or @ in it that is not written as
    # %2F or %40, the password would be taken for the port or the host.
    if re.search(r"[^\d,]", given.get("port", "")) or re.search(r"[^,]@", given.get("host", "")):
        raise ValueError("must be a PostgreSQL URL, such as postgresql://user:password@host:5432/database")
    return url


Database = Annotated[SecretStr, AfterValidator(check_database)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: Database | None = None
    database_test_url: Database | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    debug: bool = False
    host: str = "127.0.0.1"
    auth: Literal["on", "off"] | None = None
    port: int = Field(8000, ge=1, le=65535)
    workers: int = Field(1, ge=1, le=64)

    db_min_connections: int = Field(1, ge=0, le=1000)
    db_max_connections: int = Field(8, ge=1, le=1000)
    db_queue_limit: int = Field(1000, ge=1, le=100_000)
    db_connect_timeout: int = Field(2, ge=2, le=60)  # whole seconds, and libpq raises 1 to 2
    db_lock_timeout: Seconds = 2
    db_statement_timeout: Seconds = 3
    db_deadline: float = Field(4.5, gt=0, le=5)  # room for a read behind another, each with a connect to a silent host
    db_slow_statement: Seconds = 0.5

    migration_lock_timeout: Seconds = 5
    migration_wait: Seconds = 60

    max_body_bytes: int = Field(1024**2, ge=1024, le=8 * 1024**2)
    body_timeout: Seconds = 10
    max_waiters: int = Field(10_000, ge=1, le=1_000_000)
    shutdown_timeout: int = Field(10, ge=1, le=300)

    @model_validator(mode="after")
    def _relations(self) -> "Settings":
        for low, high in (
            ("db_min_connections", "db_max_connections"),
            ("db_lock_timeout", "db_statement_timeout"),
            ("db_statement_timeout", "db_deadline"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low.upper()} must not be above {high.upper()}")
        return self

    @property
    def level(self) -> str:
        """The level to log at: DEBUG wins over LOG_LEVEL."""
        return "DEBUG" if self.debug else self.log_level

    def database(self) -> str:
        """DATABASE_URL. Exits with one line if it is not set."""
        if self.database_url is None:
            raise SystemExit("DATABASE_URL is not set: give it in the environment or in svc/.env")
        return self.database_url.get_secret_value()


def _refuse(record: logging.LogRecord) -> bool:
    raise ValueError(record.getMessage().replace("python-dotenv could", "could"))


@cache
def load() -> Settings:
    """The settings of this process, read once. Exits with one line that names what is wrong and shows no value."""
    dotenv = logging.getLogger("dotenv.main")
    dotenv.addFilter(_refuse)  # it only warns of a line that it cannot read, and goes on without it
    try:
        return Settings()
    except ValidationError as error:
        found = (f"{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}".removeprefix(": ") for e in error.errors())
        raise SystemExit("settings: " + "; ".join(found).replace("Value error, ", "")) from None
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "is not UTF-8"
        raise SystemExit(f"settings: svc/.env: {reason}") from None
    finally:
        dotenv.removeFilter(_refuse)
