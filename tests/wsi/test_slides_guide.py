"""docs/guide/slides.md says nothing that does not run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medkd.cli.slides import app

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "slides.md"
TEXT = GUIDE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = re.findall(r"^ {4}medkd slide (\w+)(.*(?:\\\n.*)*)", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_of_the_guide_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, f"{GUIDE.name}", "exec"), {"__name__": "guide"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", sorted({name for name, _ in COMMANDS}))
def test_options_of_the_guide_exist(command):
    named = {option for name, rest in COMMANDS if name == command for option in re.findall(r"--[a-z][a-z-]*", rest)}
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert named <= set(re.findall(r"--[a-z][a-z-]*", shown.output))


def test_pictures_of_the_guide_are_there_and_small():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXT)
    assert pictures
    for picture in pictures:
        assert 0 < (GUIDE.parent / picture).stat().st_size < 300_000, picture


def test_links_of_the_guide_lead_somewhere():
    titles = re.findall(r"^##+ (.+)$", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)!]+)\)", TEXT):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (GUIDE.parent / link).is_file(), link
