"""What the README shows works as it is printed there."""

import re
import subprocess

from svc.settings import Settings
from svc.test.process import ROOT, service

README = (ROOT / "README.md").read_text()


def hide_what_differs(text: str) -> str:
    """The text without ids, times and versions of ETags, which no two runs have in common."""
    text = re.sub(r"[0-7][0-9A-HJKMNP-TV-Z]{25}", "ID", text)
    text = re.sub(r'"ID\.[^"\\]*', '"ID.VERSION', text)
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+", "TIME", text)


def test_the_first_session_of_the_readme_answers_what_is_printed_there(new_database, tmp_path):
    session = README.partition("\n## A first session")[2].partition("\n## Recipes")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", session, re.DOTALL | re.MULTILINE)
    commands = [code.replace("wait=2", "wait=0.1") for language, code in blocks if language == "sh"]  # less to wait for
    printed = [code for language, code in blocks if language != "sh"]
    assert len(commands) == len(printed) == 2
    with new_database() as url, service(url) as (_, base):
        script = re.sub(r"(http://)?localhost:8000", base, "\necho; echo ----\n".join(commands))
        shell = ["bash", "-euo", "pipefail", "-c", script]
        ran = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    answers = [answer.strip() for answer in ran.stdout.replace("\r", "").split("----\n")]
    assert hide_what_differs("\n".join(answers)) == hide_what_differs("\n".join(map(str.strip, printed)))


def test_the_readme_names_every_setting_and_every_file():
    for name in Settings.model_fields:
        assert name.upper() in README
    for file in (ROOT / "svc").glob("*.py"):
        assert file.name.endswith("_test.py") or file.name in ("__init__.py", "conftest.py") or file.name in README
