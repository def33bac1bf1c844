"""What a task found: its score, how sure that is, and a record for each item."""

from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """One task's outcome.

    Args:
        task: its name.
        score: exact match or accuracy in [0, 1], mean loss in nats a token, or another number that the protocol names.
        interval: 95% interval of the score; None where there is none.
        items: how many items were scored.
        records: one entry an item. `correct` (a truth value), or `loss` (mean, in nats a token) with `supervised_tokens`, is
            what the item adds to the score.
        metrics: further numbers, by name; `truncated` and `dropped`: rows that were cut or left out, as in training.
        protocol: in words, how the score came about: without it no two scores can be compared.
        higher_is_better: whether a larger score is a better one.
    """

    task: str
    score: float
    interval: tuple[float, float] | None
    items: int
    records: list[Record]
    metrics: dict[str, float] = field(default_factory=dict)
    protocol: str = ""
    higher_is_better: bool = True

    def summary(self) -> Record:
        """Everything but the records, as JSON writes it."""
        numbers = {"task": self.task, "protocol": self.protocol, "score": self.score, "interval": self.interval}
        return (
            numbers
            | {"items": self.items, "higher_is_better": self.higher_is_better}
            | ({"metrics": self.metrics} if self.metrics else {})
        )
