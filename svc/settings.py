"""The environment, typed: every setting with its bounds, from the environment, or else from `svc/.env`."""

import logging
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import psycopg2
from psycopg2.extensions import parse_dsn
from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_FILE = Path(__file__).with_name(".env")


def check_database(url: SecretStr) -> SecretStr:
    """The same URL. Raises ValueError if libpq cannot read it; libpq's own message would repeat the password."""
    with suppress(psycopg2.Error):
        given = parse_dsn(url.get_secret_value())
        # libpq takes the rest of a password with an @ or / for a host, a port or a database, and shows these in errors.
        host, port, database = (given.get(name, "") for name in ("host", "port", "dbname"))
        # @ begins the name of an abstract socket.
        if "@" not in host.lstrip("@") + database and not port.strip("0123456789,"):
            return url
    example = "postgresql://user:password@host:5432/database"
    raise ValueError(f"must be a URL such as {example}; in the password write %40 for @, %2F for /, %25 for %")


Database = Annotated[SecretStr, AfterValidator(check_database)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_file=ENV_FILE, env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    database_url: Database | None = None
    database_test_url: Database | None = None
    auth: Literal["on", "off"] | None = None  # None: not set, which means off
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    debug: bool = False
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    workers: int = Field(1, ge=1, le=64)

    db_min_connections: int = Field(1, ge=0, le=1000)
    db_max_connections: int = Field(12, ge=2, le=1000)  # a third is for lists
    db_queue_limit: int = Field(1000, ge=1, le=100_000)
    db_connect_timeout: int = Field(2, ge=2, le=60)  # whole seconds, and libpq raises 1 to 2
    db_lock_timeout: Seconds = 2
    db_statement_timeout: Seconds = 3
    db_deadline: float = Field(4.5, gt=0, le=5)  # room for two reads in a row that both connect to a silent host
    db_slow_statement: Seconds = 0.5

    migration_lock_timeout: Seconds = 5
    migration_wait: Seconds = 60

    max_body_bytes: int = Field(1024**2, ge=1024, le=8 * 1024**2)
    body_timeout: Seconds = 10
    max_waiters: int = Field(10_000, ge=1, le=1_000_000)
    shutdown_timeout: int = Field(10, ge=1, le=300)

    @model_validator(mode="after")
    def check_order(self) -> "Settings":
        if self.db_min_connections > self.db_max_connections:
            raise ValueError("DB_MIN_CONNECTIONS must not be above DB_MAX_CONNECTIONS")
        if not self.db_lock_timeout <= self.db_statement_timeout <= self.db_deadline:
            raise ValueError("DB_LOCK_TIMEOUT must not be above DB_STATEMENT_TIMEOUT, nor that above DB_DEADLINE")
        return self

    @property
    def level(self) -> str:
        """The level to log at: DEBUG wins over LOG_LEVEL."""
        return "DEBUG" if self.debug else self.log_level

    def database(self) -> str:
        """DATABASE_URL. Exits with one line if it is not set."""
        if self.database_url is None:
            raise SystemExit("DATABASE_URL is not set, nor in svc/.env: `pipenv run dev` prints a line that sets it")
        return self.database_url.get_secret_value()


@cache
def load() -> Settings:
    """The settings of this process, read once. Exits with one line that names what is wrong and shows no value."""
    logging.getLogger("dotenv.main").addFilter(refuse_line)
    try:
        return Settings()
    except ValidationError as error:
        wrong = "; ".join(map(describe, error.errors()))
    except (ValueError, OSError) as error:
        wrong = f"svc/.env: {error}"
    raise SystemExit(f"settings: {wrong}")


def refuse_line(warning: logging.LogRecord) -> bool:
    """dotenv only warns of a line that it cannot read, and goes on without it."""
    raise ValueError(warning.getMessage())


def describe(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":  # a name in the file; other names in the environment are not ours
        return f"{error['loc'][0].upper()} stands in svc/.env, and there is no such setting"
    return ": ".join([*map(str.upper, error["loc"]), error["msg"].removeprefix("Value error, ")])
