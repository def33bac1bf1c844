"""report.html: a comparison on one page, which needs nothing but itself."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from bonetune.experiments import wording
from bonetune.experiments.curves import Curve
from bonetune.experiments.drawing import Forest, figures, forest
from bonetune.experiments.findings import BETTER, BROKEN, NO_SPREAD, TOO_FEW, WORSE, Analysis, Difference, Test
from bonetune.experiments.sentences import READING, RULE
from bonetune.experiments.tables import columns_of_sweep, tried
from bonetune.files import write_text

REPORT_FILE = "report.html"
# Colours of the palette; methods beyond have them again, dashed.
COLOURS = 7
_CLASS = {BETTER: "better", WORSE: "worse", TOO_FEW: "open", BROKEN: "open", NO_SPREAD: "open"}


@dataclass(frozen=True)
class Compared:
    """A table of differences to a reference by a test, with what is drawn in it."""

    test: Test
    reference: str
    rows: list[Difference]
    forest: Forest

    @property
    def has_counts(self) -> bool:
        """Whether any row tells which items one alone got right."""
        return any(row.only_method is not None for row in self.rows)


def write_page(folder: Path, found: Analysis, curves: Mapping[str, Mapping[int, Curve]]) -> Path:
    """Write report.html to a folder, and return its path.

    Args:
        folder: the comparison's.
        found: what it says.
        curves: the logged training steps of the runs that count: method, seed.
    """
    # a text may hold half of a surrogate pair, which UTF-8 cannot
    write_text(folder / REPORT_FILE, page(found, curves).encode(errors="replace").decode())
    return folder / REPORT_FILE


def page(found: Analysis, curves: Mapping[str, Mapping[int, Curve]]) -> str:
    """The page's HTML."""
    references = list(dict.fromkeys(found.question.references))
    compared = [
        (
            reference,
            [
                Compared(test, reference, rows, forest(rows, test))
                for test in found.tests
                if (rows := found.against(reference, test.name))
            ],
        )
        for reference in references
    ]
    drawn = figures(found, curves)
    return _template().render(
        found=found,
        title=found.question.title or "Comparison of fine-tuning methods",
        version=found.environment.shared.get("bonetune", "none").removeprefix("none"),
        references=references,
        compared=[(reference, tables) for reference, tables in compared if tables],
        drawn=drawn,
        rates=columns_of_sweep(found),
        tried=tried,
        protocols=[(test.name, test.protocol) for test in found.tests if test.protocol],
        environment=_environment(found),
        rule=RULE,
        reading=READING,
        colour={method.name: number for number, method in enumerate(found.methods)},
        colours=COLOURS,
    )


def _environment(found: Analysis) -> list[tuple[str, str]]:
    varying = {
        name: "; ".join(f"{value} ({count} of {found.runs} runs)" for value, count in values.items())
        for name, values in found.environment.varying.items()
    }
    return [(name, value) for name, value in (found.environment.shared | varying).items() if value != "none"]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bonetune.experiments"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        name.removesuffix("_text"): getattr(wording, name)
        for name in (
            "score_text",
            "interval_text",
            "rate_text",
            "p_text",
            "seconds_text",
            "bytes_text",
            "count_text",
            "ratio_text",
        )
    }
    environment.filters |= {"unit": wording.unit, "sentence": sentence, "verdict": lambda verdict: _CLASS.get(verdict, "none")}
    return environment.get_template("comparison.html")


def sentence(text: str) -> Markup:
    """A sentence with the names between backticks set apart."""
    return Markup(re.sub("`([^`]*)`", r"<b>\1</b>", html.escape(text)))  # noqa: S704
