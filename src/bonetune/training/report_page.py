"""report.html: a run on one page, which needs nothing but itself."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from bonetune.files import write_text
from bonetune.training.charts import Chart, Line, chart
from bonetune.training.facts import facts, loss_unit, metric_name, number
from bonetune.training.folder import REPORT_FILE
from bonetune.training.plots import Points, mean_window, points, running_mean, tokens_per_second
from bonetune.training.run_record import RunRecord, read_record

_ABSENT = "none"
# Values of a certificate that are parts of one.
_SHARES = ("greedy_agreement", "update_kept")


def write_report(folder: Path) -> Path:
    """Write report.html beside what a run left, and return its path.

    The page holds the run's figures, curves, settings, environment, findings of the data checks, answers before and after
    training, and the certificate of a merge: each as far as `folder` has the file for it. It loads nothing from elsewhere.

    Args:
        folder: a run's output_dir, with run.yaml and metrics.jsonl at least.

    Raises:
        InputError: `folder` holds no run, or a file that does not hold what it should.
    """
    record = read_record(folder)
    page = _template().render(
        record=record,
        name=record.folder.resolve().name,
        version=(record.environment.get("environment") or {}).get("bonetune"),
        facts=facts(record),
        notes=record.summary.get("notes") or [],
        findings=[
            (finding.get("severity", "warning"), finding.get("name", ""), finding.get("message", ""))
            for finding in record.summary.get("findings") or []
        ],
        charts=_charts(record),
        samples=[_sample(sample) for sample in record.samples],
        certificate=_certificate(record.certificate),
        holds=record.certificate.get("holds"),
        compared=(
            "Each merged weight, read back, and what training computes for its layer, compared on random inputs."
            if record.certificate.get("method") == "layers"
            else "The merged model and the adapted one, compared along the adapted one's greedy answers."
        ),
        environment=_environment(record.environment),
    )
    # a text may hold half of a surrogate pair, which UTF-8 cannot
    write_text(folder / REPORT_FILE, page.encode(errors="replace").decode())
    return folder / REPORT_FILE


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("bonetune.training")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "text": _text}
    return environment.get_template("report.html")


def _charts(record: RunRecord) -> list[Chart]:
    metrics, evaluations = record.metrics, record.evaluations
    losses = [*_with_mean(record.losses), Line("evaluation", "dots", evaluations.pop("eval_loss", []))]
    memory = [(step, value / 2**30) for step, value in points(metrics, "memory_bytes")]
    steps = [line["step"] for line in metrics] or [0]
    draw = partial(chart, span=(min(steps), max(steps)))
    drawn = [
        draw(f"Loss, {unit}" if (unit := loss_unit(record)) else "Loss", losses),
        *(draw(metric_name(name), [Line("evaluation", "dots", values)]) for name, values in evaluations.items()),
        draw("Learning rate", [Line("learning rate", "mean", points(metrics, "learning_rate"))], from_zero=True),
        draw("Gradient norm", _with_mean(points(metrics, "grad_norm"))),
        draw("Tokens a second", _with_mean(tokens_per_second(metrics)), from_zero=True),
        draw("Memory, GiB", [Line("memory", "mean", memory)], from_zero=True),
    ]
    return [one for one in drawn if one is not None]


def _with_mean(values: Points) -> list[Line]:
    window = mean_window(len(values))
    if window == 1:
        return [Line("each", "mean", values)]
    return [Line("each", "raw", values), Line(f"mean of {window}", "mean", running_mean(values, window), derived=True)]


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A question with its answers as texts, and which of the answers are the expected one up to white space at both ends."""
    expected = sample.get("expected")
    answers = [("Before training", sample.get("before")), ("After training", sample.get("after"))]
    shown = [
        (title, _text(answer), isinstance(expected, str) and isinstance(answer, str) and answer.strip() == expected.strip())
        for title, answer in answers
        if answer is not None
    ]
    return {"prompt": sample.get("prompt"), "expected": expected, "answers": shown}


def _certificate(certificate: dict[str, Any]) -> list[tuple[str, str]]:
    named = {
        "method": "Compared",
        "dtype": "Weights",
        "worst_layer": "Layer that differs most",
        "largest_error": "Its outputs' differences, over their size",
        "update_kept": "Part of the update in the weights",
        "unchanged": "Tensors that are the base model's",
        "prompts": "Prompts",
        "tokens": "Tokens compared",
        "size": "Logits, root mean square",
        "error": "Their differences, root mean square",
        "effect": "The adapter's effect, root mean square",
        "largest_logit_difference": "Largest difference",
        "largest_logit": "Largest logit",
        "mean_kl": "Mean KL divergence, nats a token",
        "greedy_agreement": "Greedy choices that agree",
    }
    return [
        (title, f"{100 * certificate[name]:.1f}%" if name in _SHARES else _text(certificate[name]))
        for name, title in named.items()
        if certificate.get(name) is not None
    ]


def _environment(content: dict[str, Any]) -> list[tuple[str, str]]:
    shown = [(str(name), _text(value)) for name, value in (content.get("environment") or {}).items()]
    if git := content.get("git"):
        state = ", with changes that are not committed" if git.get("dirty") else ""
        shown.append(("git", f"{git.get('commit')}{state}"))
    if command := content.get("command"):
        shown.append(("command", " ".join(map(str, command))))
    return shown


def _text(value: Any) -> str:
    """A value of JSON as people write it."""
    if isinstance(value, str):
        return value
    if value is None:
        return _ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(map(_text, value)) or _ABSENT
    return json.dumps(value, ensure_ascii=False) if value else _ABSENT
