"""The guide's table of features: each cell of ours names a test that exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "guide.md"
LINK = re.compile(r'\]\(\.\./(tests/[\w/]+\.py) "([^"]+)"\)')
TABLE = [line for line in GUIDE.read_text().partition("### Beside LoRA and MiSS")[2].splitlines() if line.startswith("| ")]
ROWS = [[cell.strip() for cell in line[1:-1].split("|")] for line in TABLE[1:]]
CLAIMS = [row for row in ROWS if any(row[1:])]


def test_there_is_a_table():
    assert len(CLAIMS) > 30


@pytest.mark.parametrize("row", CLAIMS, ids=lambda row: row[0])
def test_each_claim_names_its_test(row):
    if row[-1].startswith("untested"):
        return
    (file, name), *more = LINK.findall(row[-1])
    assert not more
    assert re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), (file, name)
