import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from svc import settings
from svc.settings import Settings

SECRET = "hunter2"
URL = f"postgresql://svc:{SECRET}@db.internal:5432/config"


@pytest.fixture(autouse=True)
def env_file(tmp_path, monkeypatch) -> Path:
    """A file that stands for svc/.env. No setting comes from this process, and none that a test makes stays in it."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setitem(Settings.model_config, "env_file", tmp_path / ".env")
    settings.load.cache_clear()
    yield tmp_path / ".env"
    settings.load.cache_clear()


def load(monkeypatch, **environment: Any) -> Settings:
    """The settings of a process that has this environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    settings.load.cache_clear()
    return settings.load()


def refusal(monkeypatch, **environment: Any) -> str:
    """The line with which a process ends that has this environment."""
    with pytest.raises(SystemExit) as caught:
        load(monkeypatch, **environment)
    assert "\n" not in caught.value.code
    assert SECRET not in caught.value.code
    return caught.value.code.removeprefix("settings: ")


def test_the_example_file_names_every_setting_with_its_default(env_file, monkeypatch):
    given = Path(settings.__file__).with_name(".env.example").read_text()
    example = dict(re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", given, re.MULTILINE))
    assert list(example) == [name.upper() for name in Settings.model_fields]
    example |= {"DATABASE_URL": "", "AUTH": ""}
    env_file.write_text("\n".join(f"{name}={value}" for name, value in example.items()))
    assert settings.load().model_dump() == Settings.model_construct().model_dump()


BOUNDS = {"WORKERS": 64, "DB_MIN_CONNECTIONS": 8, "DB_LOCK_TIMEOUT": 3, "DB_DEADLINE": 3, "MAX_BODY_BYTES": 8 * 1024**2}


def test_a_setting_is_taken_at_its_bound(monkeypatch):
    loaded = load(monkeypatch, **BOUNDS)
    assert [getattr(loaded, name.lower()) for name in BOUNDS] == list(BOUNDS.values())


BAD = {
    "WORKERS": ("65", "Input should be less than or equal to 64"),
    "MAX_BODY_BYTES": ("8388609", "Input should be less than or equal to 8388608"),
    "DB_DEADLINE": ("0", "Input should be greater than 0"),
    "BODY_TIMEOUT": ("inf", "Input should be a finite number"),
    "AUTH": ("yes-7", "Input should be 'on' or 'off'"),
    "DEBUG": ("perhaps-7", "Input should be a valid boolean, unable to interpret input"),
}


@pytest.mark.parametrize(("name", "value", "reason"), [(name, *bad) for name, bad in BAD.items()], ids=BAD)
def test_a_wrong_value_stops_the_process_with_a_line_that_names_it_and_shows_no_value(monkeypatch, name, value, reason):
    assert refusal(monkeypatch, **{name: value}) == f"{name}: {reason}"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://svc:{SECRET}",
        f"{URL}?sslmod=require",
        f"postgresql://svc:x@{SECRET}@db.internal/config",
        f"postgresql://svc:{SECRET}/x@db.internal/config",
        f"postgresql://svc:12/{SECRET}@db.internal/config",
    ],
)
def test_a_wrong_address_of_the_database_is_told_how_to_write_a_password(monkeypatch, url):
    line = refusal(monkeypatch, DATABASE_URL=url)
    assert line.startswith("DATABASE_URL: must be a URL such as postgresql://user:password@host:5432/database")
    assert line.endswith("in the password write %40 for @, %2F for /, %25 for %")


@pytest.mark.parametrize(
    "url",
    [
        URL,
        f"host=/run/postgresql user=svc password={SECRET}",
        "postgresql://a,b:5433,[::1]:5434/x?target_session_attrs=read-write",
        f"postgresql://svc:{SECRET}%40%2F%25@db.internal/config",
        "host=@abstract dbname=config",
    ],
)
def test_the_database_is_given_out_but_never_shown(monkeypatch, url):
    loaded = load(monkeypatch, DATABASE_URL=url)
    assert loaded.database() == url
    assert SECRET not in repr(loaded) + loaded.model_dump_json()


def test_a_missing_database_is_told_where_to_give_it_and_where_there_is_one():
    with pytest.raises(SystemExit, match=r"^DATABASE_URL is not set, .* svc/.env: `pipenv run dev` prints .*$"):
        settings.load().database()


def test_settings_that_contradict_each_other_stop_the_process_with_a_line_that_names_them(monkeypatch):
    order = "DB_LOCK_TIMEOUT must not be above DB_STATEMENT_TIMEOUT, nor that above DB_DEADLINE"
    assert refusal(monkeypatch, DB_STATEMENT_TIMEOUT=1.5) == order
    assert refusal(monkeypatch, DB_STATEMENT_TIMEOUT=4.6) == order
    connections = "DB_MIN_CONNECTIONS must not be above DB_MAX_CONNECTIONS"
    assert refusal(monkeypatch, DB_MIN_CONNECTIONS=5, DB_MAX_CONNECTIONS=4) == connections


def test_debug_wins_over_the_level(monkeypatch):
    assert load(monkeypatch, LOG_LEVEL="ERROR").level == "ERROR"
    assert load(monkeypatch, DEBUG="true").level == "DEBUG"


def test_the_environment_wins_over_the_file_and_an_empty_variable_counts_as_not_set(env_file, monkeypatch):
    env_file.write_text(f"# said\n\nPORT=9000\nexport WORKERS=2\nHOST='::1'\nDATABASE_URL={URL}\n")
    loaded = load(monkeypatch, WORKERS=3, HOST="")
    assert (loaded.port, loaded.workers, loaded.host, loaded.database()) == (9000, 3, "::1", URL)


FILES = {
    "a line that is none": (f"PORT=9000\n{SECRET} is it\n", "could not parse statement starting at line 2"),
    "an unknown name": (f"PROT={SECRET}\n", "PROT stands in svc/.env, and there is no such setting"),
    "UTF-16": (f"HOST={SECRET}\n".encode("utf-16"), "svc/.env: 'utf-8' codec can't decode byte 0xff in position 0"),
}


@pytest.mark.parametrize(("content", "reason"), FILES.values(), ids=FILES)
def test_a_broken_file_stops_the_process_with_a_line_that_says_where(env_file, monkeypatch, content, reason):
    env_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(monkeypatch)
    assert "svc/.env" in line
    assert reason in line


def test_every_program_ends_with_one_line_that_names_all_that_is_wrong(tmp_path):
    shutil.copytree(Path(__file__).parent, tmp_path / "svc", ignore=shutil.ignore_patterns(".*", "*_test.py"))
    (tmp_path / "svc/.env").write_text(f"DATABASE_URL={SECRET}\nPORT={SECRET}\n")
    given = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    options = {"cwd": tmp_path, "env": given, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    modules = ("svc.app", "svc.migrations", "svc.dev")
    for program in [subprocess.Popen([sys.executable, "-m", module], **options) for module in modules]:
        out, err = program.communicate()
        assert (program.returncode, out, err.count("\n")) == (1, "", 1)
        assert re.match(r"settings: DATABASE_URL: must be .*; PORT: Input should be ", err)
        assert SECRET not in err
