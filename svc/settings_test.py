import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from svc import settings
from svc.settings import Settings

SECRET = "hunter2"
URL = f"postgresql://svc:{SECRET}@db.internal:5432/config"

BOUNDS = {
    "port": (1, 65535),
    "workers": (1, 64),
    "db_min_connections": (0, None),
    "db_max_connections": (1, 1000),
    "db_queue_limit": (1, 100_000),
    "db_connect_timeout": (2, 60),
    "db_lock_timeout": (0.001, None),
    "db_statement_timeout": (2, None),
    "db_deadline": (3, 5),
    "db_slow_statement": (0.001, 3600),
    "migration_lock_timeout": (0.001, 3600),
    "migration_wait": (0.001, 3600),
    "max_body_bytes": (1024, 64 * 1024**2),
    "body_timeout": (0.001, 3600),
    "max_waiters": (1, 1_000_000),
    "shutdown_timeout": (1, 300),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No setting comes from this process, and none that a test makes stays in it."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    settings.load.cache_clear()
    yield
    settings.load.cache_clear()


def refusal(monkeypatch, **environment: Any) -> str:
    """The line with which a process ends that has this environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    settings.load.cache_clear()
    with pytest.raises(SystemExit) as caught:
        settings.load()
    assert isinstance(caught.value.code, str)
    assert "\n" not in caught.value.code
    return caught.value.code


def test_without_anything_set_there_are_defaults():
    assert settings.load().model_dump() == {
        "database_url": None,
        "database_test_url": None,
        "log_level": "INFO",
        "debug": False,
        "host": "127.0.0.1",
        "port": 8000,
        "workers": 1,
        "db_min_connections": 1,
        "db_max_connections": 8,
        "db_queue_limit": 1000,
        "db_connect_timeout": 2,
        "db_lock_timeout": 2,
        "db_statement_timeout": 3,
        "db_deadline": 4.5,
        "db_slow_statement": 0.5,
        "migration_lock_timeout": 5,
        "migration_wait": 60,
        "max_body_bytes": 1024**2,
        "body_timeout": 10,
        "max_waiters": 10_000,
        "shutdown_timeout": 10,
    }


def test_the_table_of_bounds_holds_every_number():
    numbers = {name for name, field in Settings.model_fields.items() if type(field.default) in (int, float)}
    assert set(BOUNDS) == numbers


@pytest.mark.parametrize(("name", "bounds"), BOUNDS.items(), ids=BOUNDS)
def test_a_number_is_taken_at_its_bounds(monkeypatch, name, bounds):
    for value in bounds:
        if value is not None:
            monkeypatch.setenv(name.upper(), str(value))
            settings.load.cache_clear()
            assert getattr(settings.load(), name) == value


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("value", ["-1", "1e9", "nan", "inf", "ten", "0x10", "1,5", "9" * 5000], ids=lambda v: v[:5])
def test_a_number_beyond_its_bounds_stops_the_process_with_a_line_that_names_it(monkeypatch, name, value):
    line = refusal(monkeypatch, **{name.upper(): value})
    assert line.startswith(f"settings: {name.upper()}: ")
    assert line.count(": ") == 2
    assert value not in line.split()


BAD = {
    "a whole number with a fraction": ("PORT", "8000.5"),
    "a level in lower case": ("LOG_LEVEL", "verbose-7"),
    "a switch that is neither on nor off": ("DEBUG", "perhaps-7"),
    "an address that is none": ("DATABASE_URL", f"{SECRET}@nowhere"),
    "an address with a port that is none": ("DATABASE_URL", URL.replace("5432", "54x32")),
    "an address with an unknown parameter": ("DATABASE_URL", URL + "?sslmod=require"),
    "a password with a slash": ("DATABASE_URL", f"postgresql://svc:{SECRET}/x@db.internal/config"),
    "a password with an at sign": ("DATABASE_URL", f"postgresql://svc:x@{SECRET}@db.internal/config"),
    "an address for tests that is none": ("DATABASE_TEST_URL", f"postgresql://{SECRET}:[/"),
}


@pytest.mark.parametrize(("name", "value"), BAD.values(), ids=BAD)
def test_a_wrong_value_stops_the_process_with_a_line_that_names_it_and_shows_no_value(monkeypatch, name, value):
    line = refusal(monkeypatch, **{name: value})
    assert line.startswith(f"settings: {name}: ")
    assert SECRET not in line
    assert value not in line


def test_all_that_is_wrong_stands_in_the_line(monkeypatch):
    line = refusal(monkeypatch, PORT="x", WORKERS="0", DATABASE_URL=f"{SECRET} {SECRET}")
    assert [part.partition(":")[0] for part in line.removeprefix("settings: ").split("; ")] == [
        "DATABASE_URL",
        "PORT",
        "WORKERS",
    ]
    assert SECRET not in line


RELATIONS = {
    "more connections at least than at most": (
        {"DB_MIN_CONNECTIONS": 5, "DB_MAX_CONNECTIONS": 4},
        "DB_MIN_CONNECTIONS must not be above DB_MAX_CONNECTIONS",
    ),
    "a lock outlasts its statement": (
        {"DB_LOCK_TIMEOUT": 2, "DB_STATEMENT_TIMEOUT": 1.5},
        "DB_LOCK_TIMEOUT must not be above DB_STATEMENT_TIMEOUT",
    ),
    "a statement outlasts the deadline": (
        {"DB_STATEMENT_TIMEOUT": 4.6, "DB_DEADLINE": 4.5},
        "DB_STATEMENT_TIMEOUT must not be above DB_DEADLINE",
    ),
}


@pytest.mark.parametrize(("environment", "reason"), RELATIONS.values(), ids=RELATIONS)
def test_settings_that_contradict_each_other_stop_the_process_with_a_line_that_names_both(
    monkeypatch, environment, reason
):
    line = refusal(monkeypatch, **environment)
    assert line == f"settings: {reason}"


def test_equal_settings_do_not_contradict_each_other(monkeypatch):
    for name in ("DB_LOCK_TIMEOUT", "DB_STATEMENT_TIMEOUT", "DB_DEADLINE"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("DB_MIN_CONNECTIONS", "8")
    assert settings.load().db_min_connections == settings.load().db_max_connections


def test_debug_wins_over_the_level(monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "ERROR")
    assert settings.load().level == "ERROR"
    monkeypatch.setenv("DEBUG", "true")
    settings.load.cache_clear()
    assert settings.load().level == "DEBUG"


def test_settings_are_read_once_and_do_not_change(monkeypatch):
    first = settings.load()
    monkeypatch.setenv("PORT", "9000")
    assert settings.load() is first
    with pytest.raises(ValidationError):
        first.port = 9000


def test_an_empty_variable_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("PORT", "")
    monkeypatch.setenv("DATABASE_URL", "")
    assert settings.load().port == 8000
    assert settings.load().database_url is None


def test_the_database_is_given_out_but_never_shown(monkeypatch):
    with pytest.raises(SystemExit) as caught:
        settings.load().database()
    assert caught.value.code == "DATABASE_URL is not set: give it in the environment or in svc/.env"
    for url in (
        URL,
        f"host=/run/postgresql user=svc password={SECRET}",
        "postgresql://a,b:5433,[::1]:5434/x?target_session_attrs=read-write",
        f"postgresql://svc:{SECRET}%40%2F@db.internal/config",
        "host=@abstract,/run dbname=config",
    ):
        monkeypatch.setenv("DATABASE_URL", url)
        settings.load.cache_clear()
        assert settings.load().database() == url
        assert SECRET not in repr(settings.load())
        assert SECRET not in settings.load().model_dump_json()


# --- svc/.env ---


@pytest.fixture
def env_file(tmp_path, monkeypatch):
    path = tmp_path / ".env"
    monkeypatch.setitem(Settings.model_config, "env_file", path)
    return path


def test_the_environment_wins_over_the_file(env_file, monkeypatch):
    env_file.write_text(f"# said\n\nPORT=9000\nexport WORKERS=2\nHOST='::1'\nDATABASE_URL={URL}\n")
    monkeypatch.setenv("WORKERS", "3")
    loaded = settings.load()
    assert (loaded.port, loaded.workers, loaded.host, loaded.database()) == (9000, 3, "::1", URL)


FILES = {
    "a line that is none": (f"PORT=9000\n{SECRET} is it\n".encode(), "settings: svc/.env: could not parse"),
    "a quote that does not end": (f"DATABASE_URL='{SECRET}\n".encode(), "settings: svc/.env: could not parse"),
    "an unknown name": (f"PROT={SECRET}\n".encode(), "settings: PROT: Extra inputs are not permitted"),
    "not UTF-8": (f"HOST={SECRET}".encode() + b"\xff\n", "settings: svc/.env: is not UTF-8"),
    "UTF-16": (f"HOST={SECRET}\n".encode("utf-16"), "settings: svc/.env: is not UTF-8"),
    "a wrong value": (f"PORT={SECRET}\n".encode(), "settings: PORT: Input should be a valid integer"),
}


@pytest.mark.parametrize(("content", "start"), FILES.values(), ids=FILES)
def test_a_broken_file_stops_the_process_with_one_line_that_shows_no_value(env_file, monkeypatch, content, start):
    env_file.write_bytes(content)
    line = refusal(monkeypatch)
    assert line.startswith(start)
    assert SECRET not in line


def test_the_line_that_cannot_be_read_is_named(env_file, monkeypatch):
    env_file.write_text("PORT=9000\nHOST=::1\n??? ???\n")
    assert refusal(monkeypatch).endswith("line 3")


def test_without_a_file_there_are_defaults(env_file):
    assert not env_file.exists()
    assert settings.load().port == 8000


def test_the_process_logs_as_before_after_its_settings_are_read(env_file, monkeypatch):
    env_file.write_text("??? ???\n")
    refusal(monkeypatch)
    assert logging.getLogger("dotenv.main").filters == []


@pytest.mark.parametrize("module", ["svc.app", "svc.migrations", "svc.dev"])
def test_every_program_ends_with_one_line_if_the_file_beside_it_is_broken(tmp_path, module):
    svc = tmp_path / "svc"
    svc.mkdir()
    for path in Path(__file__).parent.glob("*.py"):
        shutil.copy(path, svc)
    svc.joinpath(".env").write_text(f"DATABASE_URL={SECRET}\nPORT={SECRET}\n")
    coverage = {name for name in os.environ if name.startswith("COV_")}  # it would count the copies
    environment = {**{name: os.environ[name] for name in os.environ.keys() - coverage}, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-m", module], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    [line] = ended.stderr.splitlines()
    assert line.startswith("settings: DATABASE_URL: ")
    assert "; PORT: " in line
    assert SECRET not in line
