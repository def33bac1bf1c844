"""Everything that a comparison leaves for its readers: the page, the tables, the numbers."""

from collections.abc import Mapping
from pathlib import Path

from bonetune.experiments.analysis import Counting, Sweeps, analyse
from bonetune.experiments.curves import Curve
from bonetune.experiments.findings import Analysis, Question
from bonetune.experiments.page import write_page
from bonetune.experiments.tables import write_tables


def write_report(
    folder: Path,
    question: Question,
    sweeps: Sweeps,
    rates: Mapping[str, float],
    counting: Counting,
    curves: Mapping[str, Mapping[int, Curve]],
) -> Analysis:
    """Write report.html, results.json, results.md, runs.csv, curves.csv and items.csv, and return what they say.

    Args:
        folder: the comparison's.
        question: what was asked.
        sweeps: runs by which the rates were chosen: method, rate.
        rates: the rates chosen.
        counting: runs that count: method, seed.
        curves: the logged training steps of those: method, seed.
    """
    found = analyse(question, sweeps, rates, counting)
    outcomes = [outcome for runs in (*sweeps.values(), *counting.values()) for outcome in runs.values()]
    write_tables(folder, found, outcomes, curves)
    write_page(folder, found, curves)
    return found
