"""Data for the comparisons of this folder, from what every installation has: python examples/compare/data.py FOLDER

words-{train,validation,test}.jsonl: lists of 5 to 9 words, to be written in reverse order (reasoning-gym's problems, short
prompts). topics-{train,validation,test}.jsonl: passages of Python's reference (`pydoc_data.topics`), with the section that each
is from. text.jsonl: the beginnings of its longest sections, on which forgetting of the first task is measured.
"""

import json
import random
import re
import sys
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

from bonetune.data import read_rows

WORDS = "reasoning-gym:word_sequence_reversal?min_words=5&max_words=9"
SIZES = {"train": 384, "validation": 128, "test": 160}
TEXTS, CHARACTERS = 24, 800
SECTIONS = (
    "assignment",
    "compound",
    "debugger",
    "execmodel",
    "formatstrings",
    "import",
    "specialnames",
    "string-methods",
    "types",
)
PASSAGE = 200  # characters at most
SHARES = (("test", 0.25), ("validation", 0.15), ("train", 1.0))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, size in SIZES.items():
        rows = []
        for row in map(words, read_rows(WORDS, f"{split}[:{size}]")):
            if row["prompt"] not in seen:  # nor in another split
                rows.append(row)
                seen.add(row["prompt"])
        write(folder / f"words-{split}.jsonl", rows)
    rows = passages()
    random.Random(0).shuffle(rows)  # noqa: S311  (an order to be repeated)
    for split, share in SHARES:
        taken = round(share * len(rows))
        write(folder / f"topics-{split}.jsonl", rows[:taken])
        rows = rows[taken:]
    longest = sorted(topics.values(), key=len, reverse=True)[:TEXTS]
    write(folder / "text.jsonl", [{"text": text[:CHARACTERS]} for text in longest])


def passages() -> list[dict[str, str]]:
    """Pieces of the sections' paragraphs; one that stands in two sections is left out."""
    found: dict[str, set[str]] = {}
    for section in SECTIONS:
        for paragraph in re.split(r"\n\s*\n", topics[section]):
            for piece in textwrap.wrap(" ".join(paragraph.split()), PASSAGE):
                if len(piece) > PASSAGE // 3:
                    found.setdefault(piece, set()).add(section)
    return [{"text": piece, "label": sections.pop()} for piece, sections in found.items() if len(sections) == 1]


def words(row: dict[str, str]) -> dict[str, str]:
    listed = row["instruction"].strip().rpartition(": ")[2]
    return {"prompt": f"Reverse: {listed}\nAnswer:", "completion": f" {row['output']}"}


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
