"""Data for the comparisons of this folder, from what every installation has: python examples/compare/data.py FOLDER

words-{train,validation,test}.jsonl: lists of 5 to 9 words, to be written in reverse order (reasoning-gym's problems, short
prompts). text.jsonl: plain English that has nothing to do with them, the beginnings of sections of Python's reference
(`pydoc_data.topics`), on which forgetting is measured.
"""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

from bonetune.data import read_rows

TASK = "reasoning-gym:word_sequence_reversal?min_words=5&max_words=9"
SIZES = {"train": 384, "validation": 128, "test": 160}
TEXTS, CHARACTERS = 24, 800


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, size in SIZES.items():
        rows = []
        for row in read_rows(TASK, f"{split}[:{size}]"):
            words = row["instruction"].strip().rpartition(": ")[2]
            if words not in seen:
                rows.append({"prompt": f"Reverse: {words}\nAnswer:", "completion": f" {row['output']}"})
                seen.add(words)
        write(folder / f"words-{split}.jsonl", rows)
    longest = sorted(topics.values(), key=len, reverse=True)[:TEXTS]
    write(folder / "text.jsonl", [{"text": text[:CHARACTERS]} for text in longest])


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
