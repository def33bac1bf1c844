"""Hand-made records of `benchmarks.learning` whose differences are known."""

import json

import pytest

from benchmarks.learning import METHODS, SEEDS, STEPS, Run
from benchmarks.learning_statistics import read_records, select

SWEEP = {1e-3: 0.5, 2e-3: 0.25, 4e-3: 0.75}


class Records:
    """A folder of them."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, run, *, training=None, validation=0.25, items=None, parameters=1_234_567):
        record = {
            "method": run.method,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "parameters": parameters,
            "training_losses": training or [2.0 / (step + 1) for step in range(STEPS)],
            "validation_loss": validation,
            "commit": "abc1234",
            "torch": "2.6.0",
            "seconds": 1.0,
        }
        if items is not None:
            record["test_items"] = [{"loss": loss, "tokens": tokens, "correct": correct} for loss, tokens, correct in items]
        (self.folder / run.file).write_text(json.dumps(record))

    def complete(self):
        """Every run there should be: each method's best rate is 2e-3, `two_items` are its test items."""
        for name, method in METHODS.items():
            for rate, loss in SWEEP.items() if method.rates else ():
                self.write(Run(name, rate, 0), validation=loss)
            for seed in SEEDS:
                self.write(Run(name, 2e-3, seed), items=two_items(name, seed))
        return self

    def remove(self, pattern):
        for file in self.folder.glob(pattern):
            file.unlink()

    def study(self):
        return select(read_records(self.folder))


def two_items(method, seed):
    """10 and 30 tokens; bone's first item costs `seed` nats more than the others', its second 3 less and is answered."""
    bone = method == "bone"
    return [(20.0 + seed * bone, 10, True), (40.0 - 3 * bone, 30, bone)]


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    return Records(folder)
