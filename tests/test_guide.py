"""The tables of features and of troubles: each cell of ours names a test that exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r'\]\(\.\./(tests/[\w/]+\.py) "([^"]+)"\)')


def claims(page, heading):
    """The rows of the first table after a heading, without those that are headings themselves."""
    lines = (ROOT / "docs" / page).read_text().partition(heading)[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    end = next((number for number in range(start, len(lines)) if not lines[number].startswith("|")), len(lines))
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[start + 2 : end]]
    return [row for row in rows if any(row[1:])]


FEATURES, TROUBLES = claims("guide.md", "### Beside LoRA and MiSS"), claims("troubles.md", "# Troubles")


def test_there_are_tables():
    assert len(FEATURES) > 30
    assert len(TROUBLES) > 15


@pytest.mark.parametrize("row", FEATURES + TROUBLES, ids=lambda row: row[0])
def test_each_claim_names_its_test(row):
    if row[-1].startswith("untested"):
        return
    (file, name), *more = LINK.findall(row[-1])
    assert not more
    assert re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), (file, name)


def test_each_trouble_that_is_shown_is_told_of():
    told = {LINK.findall(row[-1])[0] for row in TROUBLES}
    for file in ROOT.glob("tests/*/test_troubles.py"):
        shown = re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
        assert shown
        assert {(str(file.relative_to(ROOT)), name) for name in shown} <= told
